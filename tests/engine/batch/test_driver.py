"""The driver with simulated replicas: every item is made once despite kills, hangs and failures, with at most three attempts."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from engine.batch.driver import MOST_STARTS, Done, Driver, Ended, Failed, Limits, Placed, Placing, ReplicaEvent
from engine.batch.items import Item
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


def drive(
    script: Script = succeed,
    *,
    replicas: int = 2,
    limits: Limits | None = None,
    steps: Callable[[int], int] = lambda tried: 0,
    release: Callable[[Item], None] = lambda item: None,
    **fields: Any,
) -> Any:
    """`steps(tried)` lie on the disk of an item that failed `tried` times before."""
    clock, kept, queue = Clock(), [], Queue.of(ITEMS)
    fakes = [FakeReplica(f"replica-{i}", clock, script, **fields) for i in range(replicas)]
    driver = Driver(
        queue=queue,
        replicas=fakes,
        prepare=prepare,
        is_permanent=lambda item, failure: failure.kind == "mistake",
        keep=lambda item, attempts: kept.append((item.item_id, len(attempts))),
        release=release,
        kept=lambda item: steps(len(queue.attempts.get(item.item_id, ()))),
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

    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent]:
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

    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent]:
        return (1.0, lost()) if item_id == victim else succeed(item_id, attempt)

    driver, fakes, kept = drive(script)
    assert kept == [(victim, MOST_ATTEMPTS)]
    assert len(driver.queue.done) == len(ITEMS) - 1
    assert sum(fake.made.count(victim) for fake in fakes) == MOST_ATTEMPTS
    assert [event["verdict"] for event in driver.journal.named("failed")] == ["again", "again", "quarantine"]


def test_a_mistake_is_not_tried_again_and_costs_no_replica() -> None:
    victim, failure = ITEMS[0].item_id, Failure("mistake", "too long")

    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent]:
        return (1.0, Failed(failure=failure, broken=False)) if item_id == victim else succeed(item_id, attempt)

    _, fakes, kept = drive(script)
    assert kept == [(victim, 1)]
    assert [fake.loads for fake in fakes] == [1, 1]


def test_a_hung_item_is_ended_by_its_limit() -> None:
    victim = ITEMS[2].item_id

    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent | None]:
        return (0.0, None) if item_id == victim and attempt == 1 else succeed(item_id, attempt)

    driver, fakes, _ = drive(script, limits=Limits(item=60.0))
    assert len(driver.queue.done) == len(ITEMS)
    (failed,) = driver.journal.named("failed")
    assert (failed["kind"], failed["message"][:23]) == ("time", "took longer than 60 s a")
    assert sum(fake.loads for fake in fakes) == 3


def test_without_a_limit_one_is_worked_out_from_what_is_done() -> None:
    victim = ITEMS[-1].item_id

    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent | None]:
        return (0.0, None) if item_id == victim and attempt == 1 else (100.0, Done(record={}))

    driver, _, _ = drive(script)
    assert len(driver.queue.done) == len(ITEMS)
    (failed,) = driver.journal.named("failed")
    assert failed["message"].startswith("took longer than 10") and "00 s" in failed["message"]


def test_the_very_first_item_hangs_and_is_ended() -> None:
    victim = ITEMS[0].item_id

    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent | None]:
        return (0.0, None) if item_id == victim and attempt == 1 else (100.0, Done(record={}))

    driver, _, _ = drive(script, replicas=1)
    assert len(driver.queue.done) == len(ITEMS)
    (failed,) = driver.journal.named("failed")
    assert failed["message"] == "finished no step for 3600 s after step 0 of 0 and was ended"


def test_slow_item_is_not_hanging() -> None:
    driver, _, _ = drive(lambda item_id, attempt: (20_000.0, Done(record={})), replicas=1, step_every=3_000.0)
    assert len(driver.queue.done) == len(ITEMS)
    assert not driver.journal.named("failed")


def test_resumed_items_do_not_count_for_the_time_limit() -> None:
    """A batch that is started again: three items only have to be decoded, and the others take fifty minutes."""
    resumed = {item.item_id for item in ITEMS[:3]}

    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent]:
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
    assert [entry.state for entry in driver.entries] == ["idle", "idle"]
    assert driver.eta == pytest.approx(6 * 100.0 / 2)
    driver.entries[0].state = "gone"
    assert driver.eta == pytest.approx(6 * 100.0)
    driver.seconds = []
    assert driver.eta is None


def test_late_events_of_an_ended_replica_are_dropped() -> None:
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
        is_permanent=lambda item, failure: False,
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

    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent]:
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
    """Three replicas, one of which reports that its GPU has no room for the model."""
    clock = Clock()
    fakes = [FakeReplica(f"replica-{i}", clock) for i in range(3)]
    fakes[place].loading = Ended(failure=Failure("mistake", "out of memory"), final=True)
    fakes[place].loads_in = seconds
    driver = Driver(
        queue=Queue.of(ITEMS),
        replicas=fakes,
        prepare=prepare,
        is_permanent=lambda item, failure: False,
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
    """In any order of its report and the others'."""
    driver, fakes = drive_one_that_cannot_load(place, seconds=seconds)
    assert driver.halted is None
    assert driver.queue.done == {item.item_id for item in ITEMS}
    assert 1 <= fakes[place].loads <= MOST_STARTS
    assert driver.entries[place].failure.message == "out of memory"
    assert driver.entries[place].state != "idle"


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

    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent | None]:
        if attempt < MOST_ATTEMPTS and rng.random() < 0.5:
            return rng.uniform(0, 30), rng.choice([lost(), lost(broken=False), None])
        finished[item_id] += 1
        return rng.uniform(1, 50), Done(record={})

    driver, _, kept = drive(script, replicas=rng.randint(1, 6), limits=Limits(item=60.0))
    assert driver.queue.done == set(finished) == {item.item_id for item in ITEMS}
    assert set(finished.values()) == {1}
    assert kept == []


def fault(message: str = "KeyError: 'x'") -> Failed:
    return Failed(failure=Failure("fault", message, "Traceback"), broken=True)


def test_lost_rank_costs_no_attempt_while_the_item_advances() -> None:
    """Ended from outside after 1, 4, 7, 11 and 15 of its 20 steps, as where nodes are taken away."""
    victim, kept = ITEMS[0].item_id, [1, 4, 7, 11, 15]

    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent]:
        return (4.0, lost()) if item_id == victim and attempt <= len(kept) else succeed(item_id, attempt)

    driver, fakes, given_up = drive(script, steps=kept.__getitem__)
    assert driver.queue.done == {item.item_id for item in ITEMS}
    assert given_up == []
    assert sum(fake.made.count(victim) for fake in fakes) == len(kept) + 1
    assert [attempt["counts"] for attempt in driver.queue.attempts[victim]] == [False] * len(kept)


def test_attempts_that_do_not_advance_count() -> None:
    victim, kept = ITEMS[0].item_id, [4, 4, 8, 8, 3, 12]

    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent]:
        return (4.0, lost()) if item_id == victim else succeed(item_id, attempt)

    driver, _, given_up = drive(script, steps=kept.__getitem__)
    assert [attempt["counts"] for attempt in driver.queue.attempts[victim]] == [False, True, False, True, True]
    assert given_up == [(victim, 5)]


def test_other_failures_count_though_the_item_advances() -> None:
    victim = ITEMS[0].item_id

    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent]:
        return (4.0, fault()) if item_id == victim else succeed(item_id, attempt)

    _, _, given_up = drive(script, steps=lambda tried: 5 * (tried + 1))
    assert given_up == [(victim, MOST_ATTEMPTS)]


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("kind", ["fault", "memory"])
def test_equal_failures_in_a_row_halt_the_batch(replicas: int, kind: str) -> None:
    """Messages differ only in numbers, paths and names."""

    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent]:
        message = f"KeyError: '{item_id}' at 0x{item_id[:6]} in /out/{item_id}.mp4, line {attempt}"
        return 10.0, Failed(failure=Failure(kind, message, "Traceback"), broken=True)

    driver, fakes, given_up = drive(script, replicas=replicas)
    assert driver.halted.kind == "alike"
    assert driver.halted.message.startswith("3 items in a row failed with the same error: KeyError: ")
    assert driver.halted.traceback == "Traceback"
    assert (given_up, driver.queue.given_up, driver.queue.left) == ([], set(), len(ITEMS))
    assert sum(len(fake.made) for fake in fakes) <= 3 * replicas


def test_equal_mistakes_halt_and_their_items_are_requeued() -> None:
    released: list[str] = []

    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent]:
        return 1.0, Failed(failure=Failure("mistake", "numbers of the latents are not finite"), broken=False)

    driver, _, given_up = drive(script, replicas=1, release=lambda item: released.append(item.item_id))
    assert driver.halted.kind == "alike"
    # The items of a prompt count once, as the prompt may be the mistake.
    prompts = {item.item_id: item.prompt.prompt_id for item in ITEMS}
    assert [prompts[item_id] for item_id in released] == ["p0000", "p0000", "p0001", "p0001"]
    assert released == [item_id for item_id, _ in given_up]
    assert (driver.queue.given_up, driver.queue.left) == (set(), len(ITEMS))


def test_mistakes_of_single_prompts_halt_nothing() -> None:
    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent]:
        tokens = 100 + next(item for item in ITEMS if item.item_id == item_id).prompt.line
        return 1.0, Failed(failure=Failure("mistake", f"a prompt has {tokens} tokens"), broken=False)

    driver, _, given_up = drive(script)
    assert driver.halted is None
    assert len(given_up) == len(ITEMS)


def test_failures_with_something_done_in_between_halt_nothing() -> None:
    """Nor do they when the bad items are tried again one after the other, after all others."""
    failing = {item.item_id for item in ITEMS[::2]}

    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent]:
        return (1.0, fault()) if item_id in failing else succeed(item_id, attempt)

    driver, _, given_up = drive(script, replicas=1)
    assert driver.halted is None
    assert {item_id for item_id, _ in given_up} == failing
    assert len(driver.queue.done) == len(ITEMS) - len(failing)


def test_a_node_that_takes_all_replicas_along_halts_nothing() -> None:
    """They fail with the same error at the same time, every second time."""

    def script(item_id: str, attempt: int) -> tuple[float, ReplicaEvent]:
        return (10.0, lost()) if attempt < MOST_ATTEMPTS else succeed(item_id, attempt)

    driver, _, given_up = drive(script, replicas=len(ITEMS))
    assert (driver.halted, given_up) == (None, [])
    driver, _, given_up = drive(
        lambda item_id, attempt: (10.0, fault()) if attempt < MOST_ATTEMPTS else succeed(item_id, attempt),
        replicas=len(ITEMS),
    )
    assert (driver.halted, given_up) == (None, [])


class PlacedReplica(FakeReplica):
    """A replica that waits a day for its place on a cluster."""

    def start(self) -> None:
        self.loads += 1
        for seconds, event in ((1.0, Placing()), (86_400.0, Placed()), (86_400.0 + self.loads_in, self.loading)):
            self._later(seconds, event)


def drive_placed(loads_in: float) -> Driver:
    clock = Clock()
    driver = Driver(
        queue=Queue.of(ITEMS),
        replicas=[PlacedReplica("replica-0", clock, loads_in=loads_in)],
        prepare=prepare,
        is_permanent=lambda item, failure: False,
        keep=lambda item, attempts: None,
        journal=Memory(),
        wait=lambda: setattr(clock, "now", clock.now + 10.0),
        clock=clock,
    )
    driver.run()
    return driver


def test_waiting_for_a_place_does_not_count_as_starting() -> None:
    driver = drive_placed(1000.0)
    assert driver.queue.done == {item.item_id for item in ITEMS}
    assert not driver.journal.named("ended")
    driver = drive_placed(2000.0)  # longer than a replica may take to load
    assert len(driver.journal.named("ended")) == MOST_STARTS
    assert driver.halted.message.endswith("the last: replica-0 had not loaded after 1800 s")
