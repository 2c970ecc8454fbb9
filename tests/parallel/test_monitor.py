"""The monitor names the collective that a rank waits in, once and in time, and says nothing of a healthy run."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from parallel.collectives import CollectiveTrace, gather_copies, ignore_bytes
from parallel.monitor import Monitor
from tests.parallel.worlds import small_mesh
from tests.ranks import run_ranks

TIMEOUT = timedelta(seconds=600)


@dataclass
class Device:
    """A device that does what is queued, in order, when the test lets it; `told` are the lines of a monitor."""

    queued: int = 0
    finished: int = 0
    told: list[str] = field(default_factory=list)

    def mark(self) -> Callable[[], bool]:
        self.queued += 1
        place = self.queued
        return lambda: self.finished >= place

    def monitor(self, timeout: timedelta = TIMEOUT) -> Monitor:
        return Monitor(rank=3, timeout=timeout, mark=self.mark, report=self.told.append)


@dataclass
class State:
    """A label that changes, as that of a run does."""

    step: int = 0

    def __str__(self) -> str:
        return f"step {self.step} layer 7"


def test_the_oldest_unfinished_call_is_named_once_and_in_time() -> None:
    device, state = Device(), State()
    monitor = device.monitor()
    for step, operation in enumerate(("ring shift", "all-to-all", "gather")):
        state.step = step
        with monitor.following(operation, state):
            pass
    started = time.monotonic()
    device.finished = 1  # the second hangs, and the third waits behind it
    assert monitor.look(started + 590) is None
    line = monitor.look(started + 596)
    assert line is not None
    assert line.startswith("rank 3, step 1 layer 7: all-to-all has not finished for 59")
    assert "its timeout of 600 s is about to end this process" in line
    assert monitor.look(started + 597) is None
    device.finished = 2  # it came after all; the next one hangs
    assert "gather has not finished" in str(monitor.look(started + 598))
    device.finished = 3
    assert monitor.look(started + 10_000) is None


def test_a_call_that_does_not_return_is_named_and_one_that_fails_is_not() -> None:
    device = Device()
    monitor = device.monitor()
    with pytest.raises(RuntimeError, match="lost"), monitor.following("gather", "step 0 layer 0"):
        raise RuntimeError("lost")
    late = time.monotonic() + 700
    assert monitor.look(late) is None
    with monitor.following("halo exchange", "step 2 layer 1"):
        assert str(monitor.look(late)).startswith("rank 3, step 2 layer 1: halo exchange has not finished")


def test_monitor_thread_reports_only_hangs() -> None:
    before = set(threading.enumerate())
    healthy, hung = Device(finished=10**9), Device()
    monitors = [device.monitor(timedelta(seconds=5)) for device in (healthy, hung)]
    for monitor in monitors:
        monitor.start(lambda: None)
        with monitor.following("all-to-all", "step 4 layer 2"):
            pass
    while not hung.told:
        with monitors[0].following("all-to-all", "step 4 layer 3"):
            pass
        time.sleep(0.001)
    assert [line.partition(" has")[0] for line in hung.told] == ["rank 3, step 4 layer 2: all-to-all"]
    assert healthy.told == []
    threads = set(threading.enumerate()) - before
    assert len(threads) == 2
    for monitor in monitors:
        monitor.close()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()


def late_to_a_gather(rank: int, told_file: str) -> list[str]:
    """The line of rank 0 while it waits for rank 1, which comes after the line and before the timeout."""
    mesh, told = small_mesh(ulysses=2), []

    def report(line: str) -> None:
        told.append(line)
        Path(told_file).touch()

    monitor = Monitor(rank=rank, timeout=timedelta(seconds=1), mark=lambda: lambda: True, report=report)
    monitor.start(lambda: None)
    trace = CollectiveTrace(label=State(step=5), on_bytes=ignore_bytes, on_call=monitor.following)
    if rank == 1:
        while not Path(told_file).exists():
            time.sleep(0.05)
    gather_copies(torch.ones(1), "agreement", group=mesh.ulysses.group, trace=trace)
    monitor.close()
    return told


def test_monitor_names_the_collective_that_waits(tmp_path: Path) -> None:
    [[waited, _]] = run_ranks(2, late_to_a_gather, [str(tmp_path / "told")], tmp_path)
    assert len(waited) == 1
    assert waited[0].startswith("rank 0, step 5 layer 7: all-gather (agreement) has not finished")


def test_a_followed_call_costs_one_mark_and_leaves_nothing() -> None:
    device = Device(finished=10**9)
    monitor = device.monitor()
    for calls in range(1, 4):
        with monitor.following("all-to-all", "step 0 layer 0"):
            pass
        assert device.queued == calls
    assert monitor.look(time.monotonic() + 10_000) is None
    device.finished = 0  # those that have ended are not asked again
    assert monitor.look(time.monotonic() + 10_000) is None
