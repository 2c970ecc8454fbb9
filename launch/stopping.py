"""How a process stops: its signals, the one line that it ends with, and its end if its parent dies. Imports nothing slow."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from engine.shown import printable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# In the environment of a rank: the process id of the launcher that started it, and the pipe for its last line.
LAUNCHER = "FREESPEC_LAUNCHER"
LAST_LINE = "FREESPEC_LAST_LINE"

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
        """Hear the signals from now on; returns the handlers before."""
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        before = {number: signal.signal(number, self._hear) for number in SIGNALS if number not in ignored}
        # A launcher starts its ranks with all of them blocked, so that none comes before this.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return before

    def leave(self) -> None:
        """Raise no more: from here on the process only says its line and ends, or looks at `received` itself."""
        self._raises = False

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if self._raises and not _is_stopping():
            self.received = signal.Signals(number)
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)


def ignore_signals() -> dict[signal.Signals, object]:
    """Hear no signals from now on; returns the handlers before."""
    return {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}


@contextlib.contextmanager
def all_is_made() -> Iterator[None]:
    """Hear no signals in the block: everything is made, and being stopped while the process tidies up is no failure."""
    before = ignore_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RankEnvError(ValueError):
    """An environment that says of no rank which one it is."""


@dataclass(frozen=True, kw_only=True)
class RankEnv:
    """Which rank this process is, from the environment that torchrun and our launcher set."""

    rank: int
    world: int
    local_rank: int

    @classmethod
    def of_environment(cls) -> "RankEnv | None":
        """None for a process that nobody started as a rank; RankEnvError for values that are no numbers, or not of one world."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return None
        rank, world = _whole_number("RANK"), _whole_number("WORLD_SIZE")
        if rank >= world:
            raise RankEnvError(f"RANK {rank} is none of the ranks of WORLD_SIZE {world}, which count from 0; {_REMEDY}")
        return cls(
            rank=rank, world=world, local_rank=_whole_number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank
        )


_REMEDY = "unset RANK, LOCAL_RANK and WORLD_SIZE, or start with --nproc or torchrun"


def _whole_number(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal()) or len(text) > 9:  # no machine has a billion ranks
        raise RankEnvError(f"{name} must be a whole number, 0 or more, got {text!r}; {_REMEDY}")
    return int(text)


def say(message: str) -> None:
    """The one line that this process ends with, on stderr.

    A rank of our launcher hands it to the launcher, which says one line for all ranks. Of torchrun's ranks the first of
    each machine speaks.
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
    """Ask the kernel to end this rank if its launcher, ours or torchrun, dies without a word: no orphan keeps a GPU."""
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
