"""Stop a process: its signals, its last line, and its end when its parent dies. Imports nothing slow."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from engine.shown import printable
from launch.ranks.environment import LAST_LINE, LAUNCHER, RankEnv

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1


class Stopped(KeyboardInterrupt):
    """An interruption, with what was kept and how to go on."""


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
        """Install the handlers; returns the previous ones."""
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        before = {number: signal.signal(number, self._hear) for number in SIGNALS if number not in ignored}
        # A launcher starts its ranks with all of them blocked, so that none comes before this.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return before

    def leave(self) -> None:
        """Stop raising: the process prints its last line and ends, or reads `received`."""
        self._raises = False

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if self._raises and not _is_stopping():
            self.received = signal.Signals(number)
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)


def ignore_signals() -> dict[signal.Signals, object]:
    """Ignore the signals from now on; returns the previous handlers."""
    return {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}


@contextlib.contextmanager
def all_is_made() -> Iterator[None]:
    """Ignore signals in the block: all files are written, and an interruption of the cleanup is no failure."""
    before = ignore_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(message: str) -> None:
    """The one line that this process ends with, on stderr.

    A rank of our launcher sends it to the launcher, which prints one line for all ranks. Of torchrun's ranks the first of
    each machine prints.
    """
    line = printable(" ".join(message.split()))
    if LAST_LINE in os.environ:
        os.write(int(os.environ[LAST_LINE]), line.encode())
        return
    rank_env = RankEnv.of_environment()
    if rank_env is None or 0 in (rank_env.rank, rank_env.local_rank):
        show(line)


def say_for_first(message: str) -> None:
    """`say` on a rank that it leaves silent, for want of a rank 0 that speaks for all.

    Without LOCAL_RANK no rank knows to be the first of its machine; where it is set, that one speaks anyway.
    """
    rank_env = RankEnv.of_environment()
    if rank_env is not None and rank_env.rank > 0 and not {LAST_LINE, "LOCAL_RANK"} & os.environ.keys():
        show(" ".join(message.split()))


def show(line: str) -> None:
    """A line on stderr; a progress bar may have left a terminal's cursor in the middle of another."""
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
    """Whether an interruption is being handled: its latents are on their way to the disk, and a second Ctrl-C must wait."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False
