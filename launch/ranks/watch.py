"""Watch started ranks, and choose the final line and exit code of the run. Standard library only."""

import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from launch.process.stopping import StopSignals, show

# Time for ranks to end by themselves after one has failed: to notice a lost connection and save what was computed.
GRACE_SECONDS = 5.0
# Time for an interrupted rank 0 to save what was computed.
STOP_SECONDS = 120.0
POLL_SECONDS = 0.05
KEPT_LINES = 200  # torch's watchdog prints a page after our line

# The exit code of a rank that lost another one; see launch/process/exit_codes.py.
_LOST = 1


@dataclass(kw_only=True)
class Rank:
    """One rank that was started.

    Attributes:
        rank: its number.
        pid: of its process.
        lines: last lines of its stderr.
        code: its exit code, negative for a signal; None while it runs.
        ended: when it ended.
        said: its last line.
    """

    rank: int
    pid: int = 0
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    code: int | None = None
    ended: float = 0.0
    said: str = ""


def watch_ranks(
    ranks: Sequence[Rank], signals: StopSignals, *, receive: Callable[[], None], interrupt: Callable[[], None]
) -> None:
    """Return once all ranks have ended, or their time after a failure or an interruption is up.

    `receive` updates `ranks`. `interrupt` forwards a signal to rank 0 alone, which saves what was computed.
    """
    deadline, forwarded = None, False
    while True:
        receive()
        if all(rank.code is not None for rank in ranks):
            return
        now = time.monotonic()
        if signals.received and not forwarded:
            forwarded, deadline = True, now + STOP_SECONDS
            interrupt()
        elif any(rank.code for rank in ranks) and deadline is None:
            deadline = now + GRACE_SECONDS
        if forwarded and ranks[0].code is not None:
            return  # rank 0 has kept what there was
        if deadline is not None and now > deadline:
            return
        time.sleep(POLL_SECONDS)


def judge(ranks: Sequence[Rank], signals: StopSignals, *, verbose: bool) -> int:
    """Print the one line of a run that failed, and return its exit code."""
    first = ranks[0]
    if signals.received and first.code not in (0, 2):
        show(first.said or "stopped")
        return signals.code
    failed = [rank for rank in ranks if rank.code]
    if not failed:
        return 0
    cause = min(failed, key=_blame)
    if first.code == 0:  # it has made everything, which took all ranks
        show(f"note: rank {cause.rank} of {len(ranks)} {describe_end(cause.code, cause.lines)} after all work was done")
        return 0
    if cause.said:
        show(cause.said)
        return cause.code
    if (cause.code > 0 or cause.code == -signal.SIGABRT) and not verbose:
        # A traceback, or a backend's output before it aborts; rank 0's has been shown already.
        for line in cause.lines:
            show(f"[rank {cause.rank}] {line}")
    show(_describe(cause, ranks))
    return 1


def _blame(rank: Rank) -> tuple[int, float]:
    """Sort key of failures: ranks ended by a signal or a fault first, those that lost another rank last."""
    if rank.code < 0:
        return 0, rank.ended
    return (2 if rank.code == _LOST and rank.said else 1), rank.ended


def _describe(cause: Rank, ranks: Sequence[Rank]) -> str:
    others = "; the other ranks were stopped" if len(ranks) > 1 else ""
    first = ranks[0]
    noticed = f"; {first.said.removeprefix('error: ')}" if first.code == _LOST and first.said else ""
    where = f"rank {cause.rank} of {len(ranks)} (process {cause.pid})"
    return f"error: {where} {describe_end(cause.code, cause.lines)}{others}{noticed}"


def describe_end(code: int, lines: Sequence[str], *, verb: str = "failed") -> str:
    """Describe how a rank ended: its exit code, negative for a signal, and the last of its lines."""
    if code < 0:
        memory = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{memory}"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{verb} with exit code {code}" + (f" ({last})" if last else "")
