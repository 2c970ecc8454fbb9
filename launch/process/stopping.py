"""Stop a process: signals, the last line, and ending with the parent. Imports nothing slow."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from engine.shown import printable
from launch.process.environment import LAST_LINE, LAUNCHER, RankEnv

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1


class Stopped(KeyboardInterrupt):
    """An interruption; the message says what was kept and how to continue."""


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP as KeyboardInterrupt; those that come while one is being handled, or after `leave()`, do nothing.

    SIGHUP, which a terminal sends when it closes, is left alone in a process that was started to ignore it (nohup).
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._raises = True

    @property
    def code(self) -> int:
        """The exit code of a process that was stopped: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + (self.received or signal.SIGINT)

    def install(self) -> dict[signal.Signals, object]:
        """Install the handlers, and hold signals back until `release()`; returns the previous handlers."""
        # A launcher starts its ranks with all of them blocked, so that none comes before this.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        return {number: signal.signal(number, self._on_signal) for number in SIGNALS if number not in ignored}

    def release(self) -> None:
        """Let signals come, those that were held back at once: called where KeyboardInterrupt is handled."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def leave(self) -> None:
        """Stop raising: the process prints its last line and ends, or checks `received`."""
        self._raises = False

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._raises and not _is_stopping():
            self.received = signal.Signals(number)
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)


def ignore_signals() -> dict[signal.Signals, object]:
    """Ignore the signals from now on; returns the previous handlers."""
    return {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}


@contextlib.contextmanager
def ignoring_signals() -> Iterator[None]:
    """Ignore signals in the block: all files are written, and an interrupted cleanup is not a failure."""
    before = ignore_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(message: str) -> None:
    """Print the line that this process ends with on stderr.

    A rank of our launcher sends it to the launcher, which prints one line for all ranks. Under torchrun the first rank
    of each machine prints it.
    """
    line = printable(" ".join(message.split()))
    if LAST_LINE in os.environ:
        os.write(int(os.environ[LAST_LINE]), line.encode())
        return
    rank_env = RankEnv.of_environment()
    if rank_env is None or 0 in (rank_env.rank, rank_env.local_rank):
        show(line)


def say_for_first(message: str) -> None:
    """Print a line on a rank where `say` does not: rank 0, which prints for all, may be missing.

    Does nothing if LOCAL_RANK is set, since `say` then prints on the first rank of each machine.
    """
    rank_env = RankEnv.of_environment()
    if rank_env is not None and rank_env.rank > 0 and not {LAST_LINE, "LOCAL_RANK"} & os.environ.keys():
        show(" ".join(message.split()))


def show(line: str) -> None:
    """Print a line on stderr, on a new line of a terminal, since a progress bar may be on the current one."""
    lead = "\n" if sys.stderr.isatty() else ""
    print(lead + printable(line), file=sys.stderr, flush=True)


def die_with_parent() -> None:
    """Have the kernel kill this rank when its launcher, ours or torchrun, dies, so that no orphan keeps a GPU."""
    launcher = os.environ.get(LAUNCHER)
    if not sys.platform.startswith("linux") or (launcher is None and "TORCHELASTIC_RUN_ID" not in os.environ):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if launcher is not None and os.getppid() != int(launcher):  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def _is_stopping() -> bool:
    """Whether an interruption is being handled; a second Ctrl-C must not stop it from saving the latents."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False
