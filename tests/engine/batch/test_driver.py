"""The driver with replicas that pretend: every item once, whatever dies, hangs or fails, and never more than three times."""

import random
from collections import Counter
from typing import Any

import pytest

from engine.batch.driver import MOST_STARTS, Done, Driver, Ended, Event, Failed, Limits
from engine.batch.plan import Item
from engine.batch.queue import MOST_ATTEMPTS, Failure, Queue
from tests.engine.batch.cases import Clock, FakeReplica, Script, batch, lost, succeed

ITEMS = batch("a", "b", "c").items


class Memory:
    """A journal that remembers."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def event(self, name: str, **fields: Any) -> None:
        self.events.append({"event": name, **fields})

    def tick(self, driver: Driver) -> None:
        every = Counter(item.item_id for item in (*driver.queue.waiting, *driver.queue.running.values()))
        every.update(driver.queue.done)
        every.update(driver.queue.given_up)
        assert every == Counter(item.item_id for item in ITEMS), "every item is in exactly one place"

    def named(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]


def prepare(item: Item, attempt: int, replica: str) -> dict[str, Any]:
    return {"identity": {"item_id": item.item_id}, "attempt": attempt}


def drive(script: Script = succeed, *, replicas: int = 2, limits: Limits | None = None, **fields: Any) -> Any:
    clock, kept = Clock(), []
    fakes = [FakeReplica(f"replica-{i}", clock, script, **fields) for i in range(replicas)]
    driver = Driver(
        queue=Queue.of(ITEMS),
        replicas=fakes,
        prepare=prepare,
        hopeless=lambda item, failure: failure.kind == "mistake",
        keep=lambda item, attempts: kept.append((item.item_id, len(attempts))),
        journal=Memory(),
        limits=limits or Limits(),
        wait=clock.wait,
        clock=clock,
    )
    driver.run()
    return driver, fakes, kept


def test_every_item_is_made_once() -> None:
    driver, fakes, kept = drive(replicas=5)
    assert driver.queue.done == {item.item_id for item in ITEMS}
    made = Counter(item_id for fake in fakes for item_id in fake.made)
    assert set(made.values()) == {1}
    assert kept == []
    assert [fake.loads for fake in fakes] == [1] * 5


def test_no_more_replicas_are_loaded_than_there_are_items() -> None:
    _, fakes, _ = drive(replicas=50)
    assert sum(fake.loads for fake in fakes) == len(ITEMS)


def test_a_dead_replica_costs_the_item_in_flight_alone() -> None:
    victim = ITEMS[3].item_id

    def script(item_id: str, attempt: int) -> tuple[float, Event]:
        return (4.0, lost()) if item_id == victim and attempt == 1 else succeed(item_id, attempt)

    driver, fakes, kept = drive(script)
    made = Counter(item_id for fake in fakes for item_id in fake.made)
    assert driver.queue.done == {item.item_id for item in ITEMS}
    assert made[victim] == 2
    assert sum(made.values()) == len(ITEMS) + 1
    assert sorted(fake.loads for fake in fakes) == [1, 2]
    assert kept == []


def test_an_item_that_always_fails_is_given_up_after_three_attempts() -> None:
    victim = ITEMS[0].item_id

    def script(item_id: str, attempt: int) -> tuple[float, Event]:
        return (1.0, lost()) if item_id == victim else succeed(item_id, attempt)

    driver, fakes, kept = drive(script)
    assert kept == [(victim, MOST_ATTEMPTS)]
    assert len(driver.queue.done) == len(ITEMS) - 1
    assert sum(fake.made.count(victim) for fake in fakes) == MOST_ATTEMPTS
    assert [event["verdict"] for event in driver.journal.named("failed")] == ["again", "again", "quarantine"]


def test_a_mistake_is_not_tried_again_and_costs_no_replica() -> None:
    victim, failure = ITEMS[0].item_id, Failure("mistake", "too long")

    def script(item_id: str, attempt: int) -> tuple[float, Event]:
        return (1.0, Failed(failure=failure, broken=False)) if item_id == victim else succeed(item_id, attempt)

    _, fakes, kept = drive(script)
    assert kept == [(victim, 1)]
    assert [fake.loads for fake in fakes] == [1, 1]


def test_a_hung_item_is_ended_by_its_limit() -> None:
    victim = ITEMS[2].item_id

    def script(item_id: str, attempt: int) -> tuple[float, Event | None]:
        return (0.0, None) if item_id == victim and attempt == 1 else succeed(item_id, attempt)

    driver, fakes, _ = drive(script, limits=Limits(item=60.0))
    assert len(driver.queue.done) == len(ITEMS)
    (failed,) = driver.journal.named("failed")
    assert (failed["kind"], failed["message"][:23]) == ("time", "took longer than 60 s a")
    assert sum(fake.loads for fake in fakes) == 3


def test_without_a_limit_one_is_worked_out_from_what_is_done() -> None:
    victim = ITEMS[-1].item_id

    def script(item_id: str, attempt: int) -> tuple[float, Event | None]:
        return (0.0, None) if item_id == victim and attempt == 1 else (100.0, Done(record={}))

    driver, _, _ = drive(script)
    assert len(driver.queue.done) == len(ITEMS)
    (failed,) = driver.journal.named("failed")
    assert failed["message"].startswith("took longer than 10") and "00 s" in failed["message"]


def test_the_very_first_item_hangs_and_is_ended() -> None:
    victim = ITEMS[0].item_id

    def script(item_id: str, attempt: int) -> tuple[float, Event | None]:
        return (0.0, None) if item_id == victim and attempt == 1 else (100.0, Done(record={}))

    driver, _, _ = drive(script, replicas=1)
    assert len(driver.queue.done) == len(ITEMS)
    (failed,) = driver.journal.named("failed")
    assert failed["message"] == "finished no step for 3600 s after step 0 of 0 and was ended"


def test_an_item_that_goes_on_slowly_is_no_hanging_one() -> None:
    driver, _, _ = drive(lambda item_id, attempt: (20_000.0, Done(record={})), replicas=1, step_every=3_000.0)
    assert len(driver.queue.done) == len(ITEMS)
    assert not driver.journal.named("failed")


def test_the_rest_of_a_resumed_item_says_nothing_of_how_long_a_whole_one_takes() -> None:
    """A batch that is started again: three items only have to be decoded, and the others take fifty minutes."""
    resumed = {item.item_id for item in ITEMS[:3]}

    def script(item_id: str, attempt: int) -> tuple[float, Event]:
        seconds, step = (40.0, 50) if item_id in resumed else (3000.0, 0)
        return seconds, Done(record={"run": {"resumed_at": step}})

    driver, _, _ = drive(script, replicas=3, step_every=100.0)
    assert len(driver.queue.done) == len(ITEMS)
    assert not driver.journal.named("failed")
    assert driver.item_limit == pytest.approx(30_000.0, rel=0.01)


def test_the_time_left_counts_whole_items_and_the_replicas_that_work() -> None:
    driver, _, _ = drive(replicas=2)
    driver.queue = Queue.of(ITEMS[:6])
    driver.seconds = [90.0, 110.0]
    assert [seat.state for seat in driver.seats] == ["idle", "idle"]
    assert driver.eta == pytest.approx(6 * 100.0 / 2)
    driver.seats[0].state = "gone"
    assert driver.eta == pytest.approx(6 * 100.0)
    driver.seconds = []
    assert driver.eta is None


def test_what_comes_late_from_a_replica_that_was_ended_is_nobody_s() -> None:
    clock = Clock()
    late = FakeReplica("late", clock, lambda item_id, attempt: (70.0, Done(record={})))
    end = late.stop
    # It takes its time to end, and its event comes meanwhile.
    late.stop = lambda *, gently: clock.now % 200 > 150 and end(gently=gently)
    queue = Queue.of(ITEMS[:1])
    driver = Driver(
        queue=queue,
        replicas=[late],
        prepare=prepare,
        hopeless=lambda item, failure: False,
        keep=lambda item, attempts: None,
        journal=type("Quiet", (Memory,), {"tick": lambda self, driver: None})(),
        limits=Limits(item=60.0),
        wait=clock.wait,
        clock=clock,
    )
    driver.run()
    assert len(queue.attempts[ITEMS[0].item_id]) == MOST_ATTEMPTS
    assert queue.given_up == {ITEMS[0].item_id}


def test_a_full_disk_halts_and_costs_no_attempt() -> None:
    failure = Failure("disk", "No space left on device")

    def script(item_id: str, attempt: int) -> tuple[float, Event]:
        return (1.0, Failed(failure=failure, broken=True)) if item_id == ITEMS[4].item_id else succeed(item_id, attempt)

    driver, _, kept = drive(script)
    assert driver.halted == failure
    assert (driver.queue.attempts, kept) == ({}, [])
    assert len(driver.queue.done) in (4, 5)
    assert driver.queue.left == len(ITEMS) - len(driver.queue.done)


def test_a_wrong_configuration_halts_at_once() -> None:
    wrong = Ended(failure=Failure("mistake", "no such checkpoint"), final=True)
    driver, fakes, _ = drive(loading=wrong)
    assert driver.halted.message == "no such checkpoint"
    assert sum(fake.loads for fake in fakes) <= 2


def drive_one_that_cannot_load(place: int, *, seconds: float = 5.0) -> tuple[Driver, list[FakeReplica]]:
    """Three replicas, one of which says that its settings cannot work: its GPU has no room for the model."""
    clock = Clock()
    fakes = [FakeReplica(f"replica-{i}", clock) for i in range(3)]
    fakes[place].loading = Ended(failure=Failure("mistake", "out of memory"), final=True)
    fakes[place].loads_in = seconds
    driver = Driver(
        queue=Queue.of(ITEMS),
        replicas=fakes,
        prepare=prepare,
        hopeless=lambda item, failure: False,
        keep=lambda item, attempts: None,
        journal=Memory(),
        wait=clock.wait,
        clock=clock,
    )
    driver.run()
    return driver, fakes


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("seconds", [1.0, 5.0, 20.0])
def test_one_replica_that_cannot_load_costs_itself_alone(place: int, seconds: float) -> None:
    """Whether it says so before, with or after the others' first word."""
    driver, fakes = drive_one_that_cannot_load(place, seconds=seconds)
    assert driver.halted is None
    assert driver.queue.done == {item.item_id for item in ITEMS}
    assert 1 <= fakes[place].loads <= MOST_STARTS
    assert driver.seats[place].failure.message == "out of memory"
    assert driver.seats[place].state != "idle"


def test_replicas_that_never_start_are_given_up() -> None:
    dead = Ended(failure=Failure("lost", "ended by SIGKILL"), final=False)
    driver, fakes, _ = drive(loading=dead)
    assert [fake.loads for fake in fakes] == [MOST_STARTS] * 2
    assert "no replica could be started 3 times in a row; the last: ended by SIGKILL" in driver.halted.message
    assert driver.queue.left == len(ITEMS)


@pytest.mark.parametrize("seed", range(20))
def test_random_deaths_lose_and_repeat_nothing(seed: int) -> None:
    rng = random.Random(seed)
    finished: Counter[str] = Counter()

    def script(item_id: str, attempt: int) -> tuple[float, Event | None]:
        if attempt < MOST_ATTEMPTS and rng.random() < 0.5:
            return rng.uniform(0, 30), rng.choice([lost(), lost(broken=False), None])
        finished[item_id] += 1
        return rng.uniform(1, 50), Done(record={})

    driver, _, kept = drive(script, replicas=rng.randint(1, 6), limits=Limits(item=60.0))
    assert driver.queue.done == set(finished) == {item.item_id for item in ITEMS}
    assert set(finished.values()) == {1}
    assert kept == []
