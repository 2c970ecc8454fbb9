"""Ranks as processes of this machine: started, watched until all have ended, and named if one fails. Standard library only."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from launch.cli.argv import asked_value
from launch.process.stopping import SIGNALS, StopSignals, show
from launch.ranks.environment import LAST_LINE, LAUNCHER, STORE

# How long ranks get to end by themselves after one has failed: to notice a lost connection and keep what was computed.
GRACE_SECONDS = 5.0
# How long an interrupted rank 0 gets to write what was computed.
STOP_SECONDS = 120.0
POLL_SECONDS = 0.05
KEPT_LINES = 200  # torch's watchdog writes a page of its own after our line

# The exit code of a rank that lost another one; see launch/process/exit_codes.py.
_LOST = 1


def start_ranks(num_ranks: int, command: Sequence[str], *, signals: StopSignals) -> int:
    """Start `num_ranks` processes of a Python command on this machine, wait for them, and return the exit code.

    If one fails, the others end within seconds, and one line names the first failure. An interruption goes to rank 0
    alone, which keeps what was computed; the others follow it. No rank outlives this process.
    """
    signals.leave()
    verbose = asked_value(command, "--verbose") not in (None, "false")
    children: list[_Child] = []
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
            _watch(children, signals)
        finally:
            for child in children:
                child.end()
    return judge(children, signals, verbose=verbose)


def _describe_limit(rank: int, num_ranks: int, error: OSError) -> str:
    return (
        f"error: rank {rank} of {num_ranks} cannot be started on this machine ({error.strerror}); give a smaller --nproc, or "
        "raise the limits of processes and open files (ulimit -u, ulimit -n)"
    )


@dataclass
class _Child:
    """One rank that was started: its process, the last lines of its stderr, the line it ends with, and how it ended."""

    rank: int
    process: subprocess.Popen
    pipe: int
    lines: deque = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    reader: threading.Thread | None = None
    code: int | None = None
    ended: float = 0.0
    said: str = ""

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
                # A terminal's Ctrl-C would reach the whole group of processes; as it is, it reaches the launcher.
                start_new_session=True,
            )
            child = cls(rank, process, reading)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(writing)
            if child is None:
                os.close(reading)
        if listen:
            child.read(verbose)
        return child

    def read(self, verbose: bool) -> None:
        """Keep the last lines of its stderr from now on. OSError, and no rank, where no thread can be had for it."""
        reader = threading.Thread(target=self._listen, args=(verbose,), daemon=True)
        try:
            reader.start()
        except RuntimeError as error:
            self.end()
            raise OSError(errno.EAGAIN, str(error)) from error
        self.reader = reader

    def has_ended(self) -> bool:
        """Whether the rank has ended; the first time that it has, how and when is noted."""
        if self.code is None and (code := self.process.poll()) is not None:
            self.code, self.ended = code, time.monotonic()
            with os.fdopen(self.pipe, encoding="utf-8", errors="replace") as pipe:
                self.said = pipe.read()
        return self.code is not None

    def end(self) -> None:
        """Kill the rank if it runs, and collect what it leaves."""
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
    # What torchrun set for this process is not for the ranks, or they would join its rendezvous.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_"))}
    kept |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    kept |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    kept |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.getsockname()[1]), LAUNCHER: str(os.getpid())}
    if rank == 0:
        kept[STORE] = str(store.fileno())
    # As torchrun does: ranks that each take all cores slow each other down by an order of magnitude.
    kept.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_ranks)))
    return kept


def _watch(children: Sequence[_Child], signals: StopSignals) -> None:
    """Return once all ranks have ended by themselves, or have had their time after a failure or an interruption."""
    deadline, forwarded = None, False
    while [child for child in children if not child.has_ended()]:
        now = time.monotonic()
        failed = any(child.code for child in children)
        if signals.received and not forwarded:
            forwarded = True
            deadline = now + STOP_SECONDS
            if children[0].code is None:
                children[0].process.send_signal(signals.received)
        elif failed and deadline is None:
            deadline = now + GRACE_SECONDS
        if forwarded and children[0].code is not None:
            return  # rank 0 has kept what there was
        if deadline is not None and now > deadline:
            return
        time.sleep(POLL_SECONDS)


def judge(children: Sequence[_Child], signals: StopSignals, *, verbose: bool) -> int:
    """Say the one line of a run that did not end well, and return its exit code."""
    first = children[0]
    if signals.received and first.code not in (0, 2):
        show(first.said or "stopped")
        return signals.code
    failed = [child for child in children if child.code]
    if not failed:
        return 0
    cause = min(failed, key=_blame)
    if first.code == 0:  # it has made everything, for which it needed the others
        show(f"note: rank {cause.rank} of {len(children)} {_describe_end(cause)} after everything was made")
        return 0
    if cause.said:
        show(cause.said)
        return cause.code
    if (cause.code > 0 or cause.code == -signal.SIGABRT) and not verbose:
        # A traceback, or what a backend says before it aborts the process; those of rank 0 have been seen.
        for line in cause.lines:
            show(f"[rank {cause.rank}] {line}")
    show(_describe(cause, children))
    return 1


def _blame(child: _Child) -> tuple[int, float]:
    """Sorts failures: a rank that a signal or a fault ended is the cause, and those that lost a rank noticed it later."""
    if child.code < 0:
        return 0, child.ended
    return (2 if child.code == _LOST and child.said else 1), child.ended


def _describe(cause: _Child, children: Sequence[_Child]) -> str:
    others = "; the other ranks were stopped" if len(children) > 1 else ""
    first = children[0]
    noticed = f"; {first.said.removeprefix('error: ')}" if first.code == _LOST and first.said else ""
    where = f"rank {cause.rank} of {len(children)} (process {cause.process.pid})"
    return f"error: {where} {_describe_end(cause)}{others}{noticed}"


def _describe_end(cause: _Child) -> str:
    if cause.code < 0:
        memory = ", as the system does when memory runs out" if cause.code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-cause.code).name}{memory}"
    last = next((line.strip() for line in reversed(cause.lines) if line.strip()), "")
    return f"failed with exit code {cause.code}" + (f" ({last})" if last else "")
