"""Start the ranks of one command as local processes. Standard library only."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from launch.cli.argv import asked_value
from launch.process.stopping import SIGNALS, StopSignals, show
from launch.ranks.environment import LAST_LINE, LAUNCHER, STORE, rank_environment, without_place
from launch.ranks.watch import Rank, judge, watch_ranks


def start_ranks(num_ranks: int, command: Sequence[str], *, signals: StopSignals) -> int:
    """Start `num_ranks` processes of a Python command on this machine, wait for them, and return the exit code.

    If one fails, the others end within seconds, and one line names the first failure. An interruption goes to rank 0
    alone, which keeps what was computed; the others follow it. No rank outlives this process.
    """
    signals.leave()
    verbose = asked_value(command, "--verbose") not in (None, "false")
    children: list[_Child] = []

    def hear() -> None:
        for child in children:
            child.hear()

    def interrupt() -> None:
        if children[0].code is None:
            children[0].process.send_signal(signals.received)

    with socket.create_server(("127.0.0.1", 0)) as store:
        try:
            for rank in range(num_ranks):
                environment = _environment(rank, num_ranks, store)
                try:
                    children.append(_Child.start(rank, command, environment, store=store, verbose=verbose))
                except OSError as error:  # those before are ended
                    show(_describe_limit(rank, num_ranks, error))
                    return 2
            store.close()
            watch_ranks(children, signals, hear=hear, interrupt=interrupt)
        finally:
            for child in children:
                child.end()
    return judge(children, signals, verbose=verbose)


def _describe_limit(rank: int, num_ranks: int, error: OSError) -> str:
    return (
        f"error: rank {rank} of {num_ranks} cannot be started on this machine ({error.strerror}); give a smaller --nproc, or "
        "raise the limits of processes and open files (ulimit -u, ulimit -n)"
    )


@dataclass(kw_only=True)
class _Child(Rank):
    """A rank as a local process, with the pipe for its last line."""

    process: subprocess.Popen
    pipe: int
    reader: threading.Thread | None = None

    @classmethod
    def start(
        cls, rank: int, command: Sequence[str], environment: dict[str, str], *, store: socket.socket, verbose: bool
    ) -> "_Child":
        """Start a rank. Rank 0 writes to the terminal itself, for its progress bars, unless every line gets a prefix."""
        listen = rank > 0 or verbose
        reading, writing = os.pipe()
        child = None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited, until the rank can handle them
        try:
            process = subprocess.Popen(
                [sys.executable, *command],
                env=environment | {LAST_LINE: str(writing)},
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE if listen else None,
                text=True,
                errors="replace",
                pass_fds=(writing, *([store.fileno()] if rank == 0 else [])),
                # So that a terminal's Ctrl-C reaches the launcher alone.
                start_new_session=True,
            )
            child = cls(rank=rank, pid=process.pid, process=process, pipe=reading)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(writing)
            if child is None:
                os.close(reading)
        if listen:
            child.read(verbose)
        return child

    def read(self, verbose: bool) -> None:
        """Start a thread that keeps the last lines of stderr; if it cannot start, kill the rank and raise OSError."""
        reader = threading.Thread(target=self._listen, args=(verbose,), daemon=True)
        try:
            reader.start()
        except RuntimeError as error:
            self.end()
            raise OSError(errno.EAGAIN, str(error)) from error
        self.reader = reader

    def hear(self) -> None:
        """Note how and when the rank has ended, if it has."""
        if self.code is None and (code := self.process.poll()) is not None:
            self.code, self.ended = code, time.monotonic()
            with os.fdopen(self.pipe, encoding="utf-8", errors="replace") as pipe:
                self.said = pipe.read()

    def end(self) -> None:
        """Kill the rank if it runs, and reap it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.reader is not None:
            self.reader.join(timeout=1)

    def _listen(self, verbose: bool) -> None:
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if verbose:
                print(f"[rank {self.rank}] {line}", end="", file=sys.stderr, flush=True)


def _environment(rank: int, num_ranks: int, store: socket.socket) -> dict[str, str]:
    port = store.getsockname()[1]
    kept = without_place(os.environ) | {LAUNCHER: str(os.getpid())}
    kept |= rank_environment(rank, num_ranks, local_rank=rank, local_size=num_ranks, address="127.0.0.1", port=port)
    if rank == 0:
        kept[STORE] = str(store.fileno())
    # As torchrun does: ranks that each take all cores slow each other down by an order of magnitude.
    kept.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_ranks)))
    return kept
