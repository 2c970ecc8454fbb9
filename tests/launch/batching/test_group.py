"""A replica out of ranks: one event of what all of them say, and the cause before its consequences."""

import signal
from typing import Any

import pytest

from engine.batch.driver import Done, Ended, Failed, Note, Placed, Placing, Ready, Step
from launch.batching.group import GRACE_SECONDS, Group
from tests.engine.batch.cases import Clock

TASK = {"identity": {"item_id": "x"}}


class FakeRanks:
    """Ranks that say what a test makes them say."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.told: list[tuple[int, dict[str, Any]]] = []
        self.lines: list[str] = []
        self.killed = self.interrupted = 0

    def start(self, setup: object) -> None:
        self.told = []

    def send(self, line: str) -> None:
        self.lines.append(line)

    def drain(self) -> list[tuple[int, dict[str, Any]]]:
        told, self.told = self.told, []
        return told

    def interrupt(self) -> None:
        self.interrupted += 1

    def kill(self) -> None:
        self.killed += 1

    def say(self, rank: int, event: str, **fields: Any) -> None:
        self.told.append((rank, {"event": event, **fields}))

    def ready(self) -> None:
        for rank in range(self.count):
            self.say(rank, "ready", seconds=2.0, place=f"place {rank}")

    def fail(self, rank: int, kind: str, *, whole: bool = False) -> None:
        self.say(rank, "failed", item="x", kind=kind, message=f"{kind} of {rank}", traceback="T", whole=whole)

    def exit(self, rank: int, code: int | None, said: str = "") -> None:
        self.say(rank, "exit", code=code, pid=7, said=said, tail=["last words"])


@pytest.fixture
def ranks() -> FakeRanks:
    return FakeRanks(2)


@pytest.fixture
def group(ranks: FakeRanks) -> Group:
    group = Group(name="replica-0", ranks=ranks, setup={}, clock=Clock())
    group.start()
    return group


@pytest.fixture
def busy(group: Group, ranks: FakeRanks) -> Group:
    ranks.ready()
    assert group.events() == [Ready(seconds=2.0, place="place 0")]
    group.make(TASK)
    return group


def test_ready_and_done_need_every_rank(group: Group, ranks: FakeRanks) -> None:
    ranks.say(0, "placing")
    ranks.say(0, "note", text="waits")
    ranks.say(0, "placed")
    ranks.say(0, "ready", seconds=2.0, place="here")
    assert group.events() == [Placing(), Note(text="waits"), Placed()]
    ranks.say(1, "ready", seconds=3.0, place="there")
    assert group.events() == [Ready(seconds=2.0, place="here")]
    group.make(TASK)
    assert ranks.lines == ['{"identity": {"item_id": "x"}}']
    ranks.say(0, "step", item="x", finished=1, total=4)
    ranks.say(0, "step", item="former", finished=3, total=4)
    ranks.say(0, "done", item="x", record={"a": 1})
    assert group.events() == [Step(finished=1, total=4)]
    ranks.say(1, "done", item="x", record=None)
    assert group.events() == [Done(record={"a": 1})]
    assert group.events() == []


def test_mistake_raised_by_all_ranks_keeps_the_replica(busy: Group, ranks: FakeRanks) -> None:
    for rank in (0, 1):
        ranks.fail(rank, "mistake", whole=True)
    (event,) = busy.events()
    assert isinstance(event, Failed)
    assert (event.broken, event.failure.kind, event.failure.message) == (False, "mistake", "mistake of 0")
    busy.make(TASK)
    for rank in (0, 1):
        ranks.say(rank, "done", item="x", record={})
    assert busy.events() == [Done(record={})]


def test_the_others_get_a_moment_and_the_cause_comes_before_who_noticed(busy: Group, ranks: FakeRanks) -> None:
    ranks.fail(0, "lost")
    assert busy.events() == []
    busy.clock.now += GRACE_SECONDS / 2
    ranks.exit(1, -9)
    ranks.exit(0, 1, "error: lost the others")
    (event,) = busy.events()
    assert event.broken
    assert (
        event.failure.message == "rank 1 of 2 (process 7) was ended by SIGKILL, as the system does when memory runs out"
    )
    assert event.failure.traceback == "last words"


def test_silent_rank_is_not_waited_for(busy: Group, ranks: FakeRanks) -> None:
    ranks.fail(0, "memory")
    assert busy.events() == []
    busy.clock.now += GRACE_SECONDS + 1
    (event,) = busy.events()
    assert (event.broken, event.failure.kind, event.failure.message) == (True, "memory", "rank 0 of 2: memory of 0")


def test_settings_that_cannot_work_are_final_and_a_death_is_not(group: Group, ranks: FakeRanks) -> None:
    for rank in (0, 1):
        ranks.exit(rank, 2, "error: no such checkpoint")
    (event,) = group.events()
    assert isinstance(event, Ended)
    assert (event.final, event.failure.message) == (True, "no such checkpoint")
    group.stop(gently=False)
    group.start()
    ranks.exit(0, None, "the Ray actor of rank 0 of 2: died")
    ranks.exit(1, 1)
    (event,) = group.events()
    assert (event.final, event.failure.message) == (False, "the Ray actor of rank 0 of 2: died")


def test_stopping_waits_for_every_rank(busy: Group, ranks: FakeRanks) -> None:
    assert not busy.stop(gently=True)
    assert not busy.stop(gently=True)
    assert (ranks.interrupted, ranks.killed) == (1, 0)
    ranks.exit(0, 130, "stopped")
    assert not busy.stop(gently=True)
    assert ranks.killed == 1
    ranks.exit(1, -9)
    assert busy.stop(gently=True)
    assert busy.events() == []


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (-signal.SIGKILL, "lost", "was ended by SIGKILL, as the system does when memory runs out"),
        (-signal.SIGTERM, "lost", "was ended by SIGTERM"),
        (-signal.SIGSEGV, "fault", "was ended by SIGSEGV"),
        (1, "lost", "ended with exit code 1 (last words)"),
        (None, "lost", "node is gone"),
    ],
)
def test_crash_is_distinguished_from_preemption(
    busy: Group, ranks: FakeRanks, code: int | None, kind: str, words: str
) -> None:
    ranks.exit(1, code, "node is gone" if code is None else "")
    ranks.exit(0, -signal.SIGKILL if code is None else code)
    (event,) = busy.events()
    assert event.failure.kind == kind
    assert words in event.failure.message
