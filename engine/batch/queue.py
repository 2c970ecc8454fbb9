"""Which item is next, and what becomes of one that failed: no files, no clock, no processes."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.batch.plan import Item

MOST_ATTEMPTS = 3

# Why an attempt failed. `mistake`: the same would happen again (a prompt that is too long). `disk`: no attempt of this
# item's own, as every other one would end the same way. `lost`: a rank or a replica ended. `time`: it took too long.
Kind = Literal["mistake", "disk", "memory", "lost", "time", "fault"]
Verdict = Literal["again", "quarantine"]


@dataclass(frozen=True)
class Failure:
    """How an attempt ended: one line, and the traceback or the last lines of the rank's stderr."""

    kind: Kind
    message: str
    traceback: str = ""


@dataclass
class Queue:
    """The items of one driver: waiting, running, done or given up; every item is in exactly one of them.

    Attributes:
        waiting: in the order in which they are handed out; what failed comes to the end.
        running: by item_id.
        done: item_ids.
        given_up: item_ids.
        attempts: what was tried and failed, by item_id.
    """

    waiting: deque[Item]
    running: dict[str, Item] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    given_up: set[str] = field(default_factory=set)
    attempts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, items: Iterable[Item]) -> "Queue":
        """Nothing tried yet."""
        return cls(waiting=deque(items))

    @property
    def left(self) -> int:
        """Items that are neither done nor given up."""
        return len(self.waiting) + len(self.running)

    def take(self) -> Item | None:
        """The next item, which is running from now on; None if none waits."""
        if not self.waiting:
            return None
        item = self.waiting.popleft()
        self.running[item.item_id] = item
        return item

    def attempt_of(self, item: Item) -> int:
        """Which attempt of the item comes now, from 1."""
        return len(self.attempts.get(item.item_id, ())) + 1

    def finish(self, item: Item) -> None:
        """A running item is whole."""
        del self.running[item.item_id]
        self.done.add(item.item_id)

    def put_back(self, item: Item) -> None:
        """A running item waits again, first of all, as if it had not been tried."""
        self.waiting.appendleft(self.running.pop(item.item_id))

    def fail(self, item: Item, failure: Failure, *, replica: str, hopeless: bool = False) -> Verdict:
        """Note a failed attempt; the item waits again, unless it was the third or the same would happen again."""
        del self.running[item.item_id]
        tried = self.attempts.setdefault(item.item_id, [])
        tried.append(
            {
                "attempt": len(tried) + 1,
                "kind": failure.kind,
                "message": failure.message,
                "traceback": failure.traceback,
                "replica": replica,
            }
        )
        if hopeless or len(tried) >= MOST_ATTEMPTS:
            self.given_up.add(item.item_id)
            return "quarantine"
        self.waiting.append(item)
        return "again"
