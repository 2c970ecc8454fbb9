"""One rank as a local process that exchanges JSON lines with its starter and never outlives it. Standard library only."""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from engine.files.processes import start_time
from engine.paths import REPOSITORY
from launch.process.environment import EVENTS, LAST_LINE, LAUNCHER, STORE, without_place
from launch.process.stopping import SIGNALS, show

TAIL_LINES = 60
TAIL_BYTES = 20_000
# Time for killed ranks to end; until then they hold their memory.
END_SECONDS = 30.0
# A driver polls its actors every few seconds; after this long without a poll it is gone, and the rank must end.
ORPHAN_SECONDS = 60.0

Event = dict[str, Any]
RankEvent = tuple[int, Event]


class RankProcesses(Protocol):
    """The ranks of a replica or of a command, local or on Ray. No method blocks."""

    count: int

    @property
    def num_running(self) -> int:
        """Number of ranks that have been started and are not known to have ended."""

    def start(self, setup: Mapping[str, Any] | None) -> None:
        """Start all ranks and send each the setup, if there is one; ranks of an earlier start have ended."""

    def send(self, line: str) -> None:
        """Send every rank one line."""

    def drain(self) -> list[RankEvent]:
        """Return events of the ranks of the last start; `exit` is the last of each."""

    def interrupt(self) -> None:
        """Ask rank 0 to save its state and end."""

    def kill(self) -> None:
        """Kill every rank; an `exit` of each follows."""


def end_ranks(started: Sequence[RankProcesses]) -> None:
    """Kill all ranks and wait until they are known to have ended, so that the next command finds their memory free.

    Prints a line if some are not after END_SECONDS. Ctrl-C ends the wait alone: what the command has made is reported.
    """
    until = time.monotonic() + END_SECONDS
    with contextlib.suppress(KeyboardInterrupt):
        num = sum(ranks.num_running for ranks in started)
        while True:
            for ranks in started:
                ranks.kill()
                ranks.drain()
            left = sum(ranks.num_running for ranks in started)
            if left == 0:
                return
            if time.monotonic() > until:
                show(
                    f"warning: {left} of {num} ranks were not seen to end within {END_SECONDS:g} s after they were killed, "
                    "and may still hold memory of a GPU; look for them on their machines before you start another command"
                )
                return
            time.sleep(0.02)


class RankHost:
    """Start a rank, send it lines, and collect its events; `exit` is always the last one.

    As a separate process a rank can be killed at any time, dies with its host (by the kernel), and is the same locally
    and in a Ray actor.
    """

    def __init__(self, wake: Callable[[], None] | None = None) -> None:
        """`wake` is called from another thread for every new event."""
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._wake = wake or (lambda: None)
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None
        self._started = threading.Event()
        self._listening: socket.socket | None = None
        self._seen = time.monotonic()

    @property
    def is_running(self) -> bool:
        """Whether the rank has been started and has not ended."""
        keeper, process = self._keeper, self._process
        return keeper is not None and keeper.is_alive() and (process is None or process.poll() is None)

    @property
    def process(self) -> tuple[int, int] | None:
        """Id and start time of the rank's process; None if it could not be started, or has ended."""
        started = None if self._process is None else start_time(self._process.pid)
        return None if self._process is None or started is None else (self._process.pid, started)

    def listen(self, address: str) -> int:
        """Open the port of the rendezvous; the process that is started next inherits it."""
        self._listening = socket.create_server((address, 0))
        return self._listening.getsockname()[1]

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        log: str | None = None,
        cwd: str | None = None,
        inherited: Sequence[str] = (),
    ) -> None:
        """Start `python COMMAND` in the folder `cwd`.

        Its output is appended to the file `log`, whose folder exists. If that is None, `stdout` and `stderr` become events,
        or are those of this process if they are `inherited`.
        """
        # The kernel ends a rank with the thread that started it, so the thread stays until the rank has ended.
        given = (list(command), dict(environment), log, cwd, inherited)
        keeper = threading.Thread(target=self._keep, args=given, daemon=True)
        try:
            keeper.start()
        except RuntimeError as error:  # no more threads
            self._refuse(str(error))
        else:
            self._keeper = keeper
            self._started.wait()

    def send(self, line: str) -> None:
        """Send the rank one line; does nothing once it has ended."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError, ValueError):
                self._process.stdin.write(f"{line}\n".encode())
                self._process.stdin.flush()

    def drain(self) -> list[Event]:
        """Return the events since the last call."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._events.get_nowait())
        return found

    def poll(self, seconds: float) -> list[Event]:
        """Return the events since the last call, waiting up to `seconds` for the first."""
        self._seen = time.monotonic()
        try:
            first = self._events.get(timeout=seconds)
        except queue.Empty:
            return []
        finally:
            self._seen = time.monotonic()
        return [first, *self.drain()]

    def die_unless_polled(self, seconds: float) -> None:
        """Kill the rank after `seconds` without a poll: its driver is gone, and another one may make the same item."""

        def watch() -> None:
            while time.monotonic() - self._seen < seconds:
                time.sleep(1.0)
            self.kill()

        threading.Thread(target=watch, daemon=True).start()

    def interrupt(self) -> None:
        """Ask the rank to save its state and end."""
        self._signal(signal.SIGINT)

    def finish(self, seconds: float) -> None:
        """Close the stdin of the process, which then ends by itself; kill it if it has not within `seconds`."""
        try:
            if self._process is not None and self._process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the rank."""
        self._signal(signal.SIGKILL)

    def end(self) -> None:
        """Kill the rank and wait for its end."""
        self.kill()
        if self._keeper is not None:
            self._keeper.join()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _emit(self, event: Event) -> None:
        self._events.put(event)
        self._wake()

    def _refuse(self, why: str) -> None:
        said = f"error: cannot start a rank: {why}"
        self._emit({"event": "exit", "code": 1, "pid": 0, "said": said, "tail": [], "refused": why})

    def _keep(
        self,
        command: list[str],
        environment: dict[str, str],
        log: str | None,
        cwd: str | None,
        inherited: Sequence[str],
    ) -> None:
        """Start the process, forward its events and output, and queue its exit."""
        ends: list[IO[bytes]] = []
        try:
            for _ in range(2):
                ends += [os.fdopen(end, mode) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True)]
            events, events_end, last, last_end = ends
            output, start = self._open_log(log)
            streams = {kind: None if kind in inherited else output for kind in ("stdout", "stderr")}
            self._process = self._popen(command, environment, streams, (events_end, last_end), cwd)
            readers = [threading.Thread(target=self._follow, args=(events,), daemon=True)]
            piped = [kind for kind, stream in streams.items() if stream == subprocess.PIPE]
            readers += [threading.Thread(target=self._relay, args=(kind,), daemon=True) for kind in piped]
            for reader in readers:
                reader.start()
        except (OSError, RuntimeError) as error:
            self.kill()
            for end in ends:
                end.close()
            self._refuse(getattr(error, "strerror", None) or str(error))
            return
        finally:
            self._started.set()
        code = self._process.wait()
        for reader in readers:
            reader.join(timeout=5)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        with last:
            said = last.read().decode(errors="replace")
        tail = _tail(Path(log), start) if log is not None else []
        self._emit({"event": "exit", "code": code, "pid": self._process.pid, "said": said, "tail": tail})

    def _open_log(self, log: str | None) -> tuple[Any, int]:
        """Open the output of the process and return it with its current size; an unwritable log is replaced by /dev/null."""
        if log is None:
            return subprocess.PIPE, 0
        try:
            output = Path(log).open("ab")
        except OSError as error:
            why = error.strerror or str(error)
            self._emit({"event": "note", "text": f"cannot write {log}: {why}; the output of this rank is lost"})
            return Path(os.devnull).open("wb"), 0
        return output, output.tell()

    def _popen(
        self,
        command: list[str],
        environment: dict[str, str],
        streams: Mapping[str, Any],
        pipes: tuple[IO[bytes], IO[bytes]],
        cwd: str | None,
    ) -> subprocess.Popen[bytes]:
        events, last = (pipe.fileno() for pipe in pipes)
        variables = {
            **without_place(os.environ),
            **environment,
            EVENTS: str(events),
            LAST_LINE: str(last),
            LAUNCHER: str(os.getpid()),
        }
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        passed = [events, last]
        if self._listening is not None:
            passed.append(self._listening.fileno())
            variables[STORE] = str(self._listening.fileno())
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited, until the rank can handle them
        try:
            return subprocess.Popen(
                [sys.executable, *command],
                env=variables,
                cwd=cwd,
                stdin=subprocess.PIPE,
                **streams,
                pass_fds=passed,
                start_new_session=True,  # a terminal's Ctrl-C reaches the driver alone
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if self._listening is not None:
                self._listening.close()
                self._listening = None
            for opened in (*pipes, *streams.values()):
                if opened not in (None, subprocess.PIPE):
                    opened.close()

    def _follow(self, events: IO[bytes]) -> None:
        with events:
            for line in events:
                if line.endswith(b"\n"):  # a killed rank may leave half a line
                    self._emit(json.loads(line.decode(errors="replace")))

    def _relay(self, kind: str) -> None:
        stream = getattr(self._process, kind)
        while data := os.read(stream.fileno(), 1 << 16):
            self._emit({"event": kind, "text": data.decode(errors="replace")})


def _tail(path: Path, start: int) -> list[str]:
    """Return the last lines of a file, from byte `start` on."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    except OSError:
        return []
