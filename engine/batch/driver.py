"""Drive replicas over the items of a queue: assign items, end replicas that hang, and restart those that died.

The driver is independent of processes, Ray and items: a replica is anything with the methods of `Replica`, `prepare`
makes its task, and `is_permanent` decides whether a failure would repeat.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from engine.batch.items import Item
from engine.batch.queue import Failure, Queue
from engine.files.storage import is_storage_fault

# Without --item_timeout: an item hangs if it takes ten times the median, and at least ten minutes.
TIMEOUT_FACTOR = 10.0
TIMEOUT_LEAST = 600.0
TIMEOUT_NEEDS = 3
# Before TIMEOUT_NEEDS items are done there is no median: an item hangs if it finishes no step for this many seconds.
SILENT_LONGEST = 3600.0

MOST_STARTS = 3


@dataclass(frozen=True, kw_only=True)
class Placing:
    """A replica waits for room on a cluster; `Placed` follows. Nothing has been started yet."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A replica has its place and begins to load."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A replica has loaded its model in `seconds`; `place` describes where its ranks are."""

    seconds: float
    place: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """`finished` of `total` steps of the item are done."""

    finished: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Done:
    """The item is done; `record` is its sidecar."""

    record: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The item failed; a `broken` replica must be rebuilt before it makes another."""

    failure: Failure
    broken: bool


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A replica ended without an item. `final`: other replicas would fail the same way, unless one has already loaded."""

    failure: Failure
    final: bool


@dataclass(frozen=True, kw_only=True)
class Note:
    """A message for the user while a replica loads."""

    text: str


ReplicaEvent = Note | Placing | Placed | Ready | Step | Done | Failed | Ended


class Replica(Protocol):
    """A group of ranks that makes one item at a time. No method blocks."""

    name: str

    def start(self) -> None:
        """Begin to load; `Ready` or `Ended` follows, on a cluster after `Placing` and `Placed`."""

    def make(self, task: dict[str, Any]) -> None:
        """Begin an item; `Step`s, and `Done` or `Failed` follow."""

    def events(self) -> list[ReplicaEvent]:
        """Events since the last call."""

    def stop(self, *, gently: bool) -> bool:
        """End all ranks, at once or after they have saved their steps; returns whether all have ended. May be repeated."""


State = Literal["waiting", "placing", "loading", "idle", "busy", "stopping", "gone"]


@dataclass
class ReplicaState:
    """State of a replica in the driver.

    Attributes:
        progressed: time at which its item last finished a step, or was assigned.
        starts: starts since it was last ready.
        failure: why it last ended before it was ready.
    """

    replica: Replica
    state: State = "waiting"
    since: float = 0.0
    progressed: float = 0.0
    item: Item | None = None
    step: int = 0
    total: int = 0
    done: int = 0
    starts: int = 0
    place: str = ""
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Time limits in seconds; `item` None is ten times the median of the items that are done.

    Attributes:
        item: limit of one item.
        start: limit of loading a replica, once it has its place.
    """

    item: float | None = None
    start: float = 1800.0


class Journal(Protocol):
    """Receives the events of a run."""

    def event(self, name: str, **fields: Any) -> None:
        """Log one event."""

    def tick(self, driver: "Driver") -> None:
        """Called on every turn of the driver; shows the state at intervals."""


@dataclass
class Driver:
    """One run over a queue.

    Attributes:
        queue: the items.
        replicas: the replicas that make them.
        prepare: makes the task of an item's attempt for a named replica.
        is_permanent: whether an item that failed in this way would fail again.
        keep: called with an item that is given up, and its attempts.
        release: called with a given-up item that is requeued.
        kept: number of saved steps of an item.
        journal: receives the events.
        limits: time limits.
        wait: waits a moment, or until something happens.
        open: whether items may still arrive, as in a service: the run waits for them, and replicas load before the first.
        clock: time in seconds.
        halted: why the batch has halted, or None.
        refused: the reason why a replica could not load, if the others would fail the same way.
        proven: whether any replica has ever loaded, so that `refused` concerns one replica alone.
    """

    queue: Queue
    replicas: Sequence[Replica]
    prepare: Callable[[Item, int, str], dict[str, Any]]
    is_permanent: Callable[[Item, Failure], bool]
    keep: Callable[[Item, list[dict[str, Any]]], None]
    journal: Journal
    release: Callable[[Item], None] = lambda item: None
    kept: Callable[[Item], int] = lambda item: 0
    limits: Limits = field(default_factory=Limits)
    wait: Callable[[], None] = lambda: time.sleep(0.05)
    open: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.monotonic
    halted: Failure | None = None
    refused: Failure | None = None
    proven: bool = False

    def __post_init__(self) -> None:
        """`seconds` collects the times of items made without a resume."""
        self.entries = [ReplicaState(replica=replica) for replica in self.replicas]
        self.seconds: list[float] = []
        self.started = self.clock()

    def run(self) -> None:
        """Run until every item is done or given up and no more may come, or the batch halts."""
        while (self.queue.left or self.open()) and not (self.halted and not self.queue.running):
            for entry in self.entries:
                self._handle_events(entry)
                self._enforce(entry)
            self._dispatch()
            self._check_replicas()
            self.journal.tick(self)
            self.wait()
        self.journal.tick(self)

    def stop(self, *, gently: bool, patience: float = 30.0) -> None:
        """End all replicas; `gently` gives them `patience` seconds to save their steps."""
        until = self.clock() + patience
        left = [entry for entry in self.entries if entry.state not in ("waiting", "gone")]
        while left and gently and self.clock() < until:
            left = [entry for entry in left if not entry.replica.stop(gently=True)]
            self.wait()
        for entry in left:
            entry.replica.stop(gently=False)

    @property
    def item_limit(self) -> float | None:
        """Current time limit of an item in seconds; None while too few are done."""
        if self.limits.item is not None or len(self.seconds) < TIMEOUT_NEEDS:
            return self.limits.item
        return max(TIMEOUT_LEAST, TIMEOUT_FACTOR * statistics.median(self.seconds[-1000:]))

    @property
    def eta(self) -> float | None:
        """Estimated seconds until all is done; None before the first item."""
        working = sum(entry.state in ("busy", "idle", "loading") for entry in self.entries)
        if not self.seconds or not working:
            return None
        recent = self.seconds[-1000:]
        return self.queue.left * sum(recent) / len(recent) / min(working, max(self.queue.left, 1))

    def _handle_events(self, entry: ReplicaState) -> None:
        for event in entry.replica.events():
            match event:
                case Note():
                    self.journal.event("note", replica=entry.replica.name, message=event.text)
                # Late events from a replica that is stopping are dropped.
                case Placing() if entry.state == "loading":
                    self._set(entry, "placing")
                case Placed() if entry.state == "placing":
                    self._set(entry, "loading")
                case Ready() if entry.state in ("placing", "loading"):
                    self._set(entry, "idle")
                    entry.place, entry.starts, self.proven = event.place, 0, True
                    self.journal.event("ready", replica=entry.replica.name, seconds=event.seconds, place=event.place)
                case Step() if entry.state == "busy":
                    entry.step, entry.total, entry.progressed = event.finished, event.total, self.clock()
                case Done() if entry.state == "busy":
                    self._done(entry, resumed=is_resumed(event.record))
                case Failed() if entry.state == "busy":
                    self._failed(entry, event.failure, broken=event.broken)
                case Ended() if entry.state in ("placing", "loading", "idle"):
                    self._ended(entry, event.failure, final=event.final)

    def _done(self, entry: ReplicaState, *, resumed: bool) -> None:
        item, seconds = entry.item, self.clock() - entry.since
        assert item is not None
        self.queue.finish(item)
        if not resumed:  # a resumed item does not have the time of a whole one
            self.seconds.append(seconds)
        entry.done, entry.item = entry.done + 1, None
        self._set(entry, "idle")
        self.journal.event("done", item=item.label, id=item.item_id, replica=entry.replica.name, seconds=seconds)

    def _failed(self, entry: ReplicaState, failure: Failure, *, broken: bool) -> None:
        item = entry.item
        assert item is not None
        entry.item, entry.step, entry.total = None, 0, 0
        self._set(entry, "stopping" if broken else "idle")
        name = entry.replica.name
        if failure.kind == "cancelled":
            self.queue.drop(item)
            self.journal.event("cancelled", item=item.label, id=item.item_id, replica=name)
            return
        if failure.kind == "disk":  # every other item would end the same way
            self.queue.put_back(item)
            self._halt(failure, item, name)
            return
        fields = {"item": item.label, "id": item.item_id, "kind": failure.kind, "message": failure.message}
        try:
            is_permanent, kept = self.is_permanent(item, failure), self.kept(item)
            given_up = [other for other in self.queue.similar if other.item_id in self.queue.given_up]
            verdict = self.queue.fail(item, failure, replica=name, is_permanent=is_permanent, kept=kept)
            self.journal.event("failed", replica=name, verdict=verdict, **fields)
            if verdict == "quarantine":
                self.keep(item, self.queue.attempts[item.item_id])
            elif verdict == "halt":
                message = f"{self.queue.num_similar} items in a row failed with the same error: {failure.message}"
                self._halt(Failure("alike", message, failure.traceback), item, name)
                for other in given_up:
                    self.release(other)
        except OSError as error:
            if not is_storage_fault(error):
                raise
            self.queue.put_back(item)
            self._halt(Failure("disk", str(error)), item, name)

    def _halt(self, failure: Failure, item: Item, replica: str) -> None:
        """Halt the batch because of an item's failure."""
        self.halted = self.halted or failure
        fields = {"item": item.label, "id": item.item_id, "kind": failure.kind, "message": failure.message}
        self.journal.event("halted", replica=replica, traceback=failure.traceback, **fields)

    def _ended(self, entry: ReplicaState, failure: Failure, *, final: bool) -> None:
        self.journal.event("ended", replica=entry.replica.name, kind=failure.kind, message=failure.message)
        entry.failure = failure
        if final and failure.kind == "disk":
            self.halted = self.halted or failure
        elif final:
            self.refused = self.refused or failure
        self._set(entry, "stopping")

    def _enforce(self, entry: ReplicaState) -> None:
        """Apply time limits, and restart replicas once all their ranks have ended."""
        age = self.clock() - entry.since
        limit = self.item_limit
        if entry.state == "busy" and limit is not None and age > limit:
            message = f"took longer than {limit:.0f} s and was ended at step {entry.step} of {entry.total}"
            self._failed(entry, Failure("time", message), broken=True)
        elif entry.state == "busy" and limit is None and self.clock() - entry.progressed > SILENT_LONGEST:
            message = (
                f"finished no step for {SILENT_LONGEST:.0f} s after step {entry.step} of {entry.total} and was ended"
            )
            self._failed(entry, Failure("time", message), broken=True)
        elif entry.state == "loading" and age > self.limits.start:
            message = f"{entry.replica.name} had not loaded after {self.limits.start:.0f} s"
            self._ended(entry, Failure("time", message), final=False)
        elif entry.state == "stopping":
            if entry.replica.stop(gently=False):
                self._set(entry, "gone" if entry.starts >= MOST_STARTS else "waiting")
        elif entry.state == "waiting" and self._wanted(entry):
            entry.starts += 1
            self._set(entry, "loading")
            entry.replica.start()

    def _wanted(self, entry: ReplicaState) -> bool:
        """Whether more items wait, or may come, than other replicas could take."""
        if self.halted or (self.refused and not self.proven):
            return False
        ready = sum(other.state in ("idle", "loading", "placing") for other in self.entries if other is not entry)
        return len(self.queue.waiting) > ready or self.open()

    def _dispatch(self) -> None:
        for entry in self.entries:
            if entry.state != "idle" or self.halted:
                continue
            item = self.queue.take()
            if item is None:
                return
            attempt = self.queue.attempt_of(item)
            entry.item, entry.step, entry.total, entry.progressed = item, 0, 0, self.clock()
            self._set(entry, "busy")
            fields = {"item": item.label, "id": item.item_id, "attempt": attempt}
            self.journal.event("started", replica=entry.replica.name, **fields)
            entry.replica.make(self.prepare(item, attempt, entry.replica.name))

    def _check_replicas(self) -> None:
        """Halt if no replica can be started any more, or loading fails for a reason that all share."""
        if self.halted or not (self.queue.left or self.open()):
            return
        states = {entry.state for entry in self.entries}
        if self.refused and not self.proven and not states & {"placing", "loading", "stopping"}:
            self.halted = self.refused
        elif states == {"gone"}:
            failure = self.entries[-1].failure
            assert failure is not None
            self.halted = Failure(
                "lost", f"no replica could be started {MOST_STARTS} times in a row; the last: {failure.message}"
            )

    def _set(self, entry: ReplicaState, state: State) -> None:
        entry.state, entry.since = state, self.clock()


def is_resumed(record: Mapping[str, Any]) -> bool:
    """Whether a sidecar says that the item resumed from saved steps."""
    return record.get("run", {}).get("resumed_at", 0) > 0
