"""Which collective a rank waits in, for backends whose calls return once they are queued.

Over NCCL a lost rank shows as a kernel that never ends: torch's watchdog ends the process after the group's timeout and names
the operation, but not the caller's step and layer. A `Monitor` follows the calls of one process and writes the line that does,
shortly before. It ends nothing.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch

# Margin before the watchdog, which ends the process in the middle of a line.
_MARGIN_SECONDS = 5.0
_MARGIN_SHARE = 0.1  # of a short timeout
_LOOKS_PER_MARGIN = 5

# Marks the end of the device's queue; returns a function that tells whether the device has passed the mark.
Mark = Callable[[], Callable[[], bool]]


@dataclass(slots=True)
class _Call:
    """A collective that was begun; `done` says whether it has ended, on the device too."""

    operation: str
    label: str
    started: float
    done: Callable[[], bool]


class Monitor:
    """Follows the collectives of one process, in the order in which they are begun; a thread looks at the oldest.

    `following` belongs into `parallel.collectives.CollectiveTrace`. It costs a string and a mark in the device's queue, microseconds beside
    the milliseconds of a layer.
    """

    def __init__(self, *, rank: int, timeout: timedelta, mark: Mark, report: Callable[[str], None]) -> None:
        self._rank, self._timeout = rank, timeout.total_seconds()
        self._mark, self._report = mark, report
        self._margin = min(_MARGIN_SECONDS, _MARGIN_SHARE * self._timeout)
        self._calls: deque[_Call] = deque()
        self._reported = False
        self._closed = threading.Event()

    @contextmanager
    def following(self, operation: str, label: object) -> Iterator[None]:
        """Context around a call. Keeps the current `label`, which changes long before the device reaches this call."""
        call = _Call(operation, str(label), time.monotonic(), lambda: False)
        self._calls.append(call)
        try:
            yield
        except BaseException:
            call.done = lambda: True  # it has its own error
            raise
        call.done = self._mark()

    def look(self, now: float) -> str | None:
        """The line about the oldest unfinished call, if its time is nearly over; once, until a call has ended since."""
        while self._calls and self._calls[0].done():
            self._calls.popleft()
            self._reported = False
        if not self._calls or self._reported:
            return None
        oldest = self._calls[0]
        waited = now - oldest.started
        if waited < self._timeout - self._margin:
            return None
        self._reported = True
        return (
            f"rank {self._rank}, {oldest.label}: {oldest.operation} has not finished for {waited:.0f} s; its timeout of "
            f"{self._timeout:g} s is about to end this process"
        )

    def start(self, prepare: Callable[[], None]) -> None:
        """Start a thread that calls `prepare` and then looks repeatedly."""
        threading.Thread(target=self._watch, args=(prepare,), name="monitor of collectives", daemon=True).start()

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()

    def _watch(self, prepare: Callable[[], None]) -> None:
        prepare()
        while not self._closed.wait(self._margin / _LOOKS_PER_MARGIN):
            try:
                line = self.look(time.monotonic())
            except RuntimeError:  # of the device, which every other call raises too
                return
            if line is not None:
                self._report(line)


def start_cuda_monitor(*, rank: int, timeout: timedelta) -> Monitor:
    """A monitor of this process's collectives on its current CUDA device, which writes to stderr."""
    device = torch.cuda.current_device()

    def mark() -> Callable[[], bool]:
        # The stream of the caller waits for the collective, or runs it, so that it comes here after it.
        event = torch.cuda.Event()
        event.record()
        return event.query

    def report(line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    monitor = Monitor(rank=rank, timeout=timeout, mark=mark, report=report)
    # A thread starts on device 0, and would take memory there.
    monitor.start(lambda: torch.cuda.set_device(device))
    return monitor
