"""The queue of a driver: which item is next, and whether a failed one is retried. No files, clock or processes."""

import contextlib
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.batch.items import Item

MOST_ATTEMPTS = 3
# This many similar failures in a row have a common cause and halt the batch. Lost ranks and hanging items need more: on
# preemptible nodes several in a row are normal.
HALT_AFTER = 3
HALT_AFTER_LOST = 10

# Why an attempt failed. `mistake`: the same would happen again (a prompt that is too long). `disk`: a fault of the storage,
# which does not count as an attempt. `lost`: a rank or a replica ended. `time`: it took too long. `alike`: several items
# failed in the same way. `cancelled`: the item was cancelled.
Kind = Literal["mistake", "disk", "memory", "lost", "time", "fault", "alike", "cancelled"]
# The item is requeued, given up, or requeued while the batch halts.
Verdict = Literal["again", "quarantine", "halt"]


@dataclass(frozen=True)
class Failure:
    """How an attempt ended: one line, and the traceback or the last lines of the rank's stderr."""

    kind: Kind
    message: str
    traceback: str = ""

    @property
    def cause(self) -> str:
        """The message without numbers, addresses and paths, which is equal for similar failures.

        A mistake keeps its numbers: prompts of different lengths are different mistakes.
        """
        if self.kind == "mistake":
            return self.message
        return re.sub(r"0x[0-9a-f]+|'[^']*'|\"[^\"]*\"|(?<!\w)/\S+|\d+", "", f"{self.kind}: {self.message}")


@dataclass
class Queue:
    """The items of one driver: waiting, running, done or given up; every item is in exactly one of them.

    Attributes:
        waiting: items in the order in which they are handed out; failed ones are appended.
        running: by item_id.
        done: item_ids.
        given_up: item_ids.
        attempts: failed attempts, by item_id.
        halts: whether similar failures in a row halt the batch; the items of a service come from many clients, and each is
            judged alone.
        similar: items that failed in the same way, with none done in between.
        num_similar: how many of these count.
    """

    waiting: deque[Item]
    running: dict[str, Item] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    given_up: set[str] = field(default_factory=set)
    attempts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    halts: bool = True
    similar: list[Item] = field(default_factory=list)
    num_similar: int = 0
    _cause: str = ""
    _handed: int = 0
    _similar_since: int = 0
    _counted: set[str] = field(default_factory=set)
    _turn: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, items: Iterable[Item]) -> "Queue":
        """A queue with nothing tried yet."""
        return cls(waiting=deque(items))

    @property
    def left(self) -> int:
        """Items that are neither done nor given up."""
        return len(self.waiting) + len(self.running)

    def add(self, item: Item) -> None:
        """Append an item that is new, or wanted once more after it was done or given up."""
        self.drop(item)
        self.waiting.append(item)

    def drop(self, item: Item) -> None:
        """Forget an item and its attempts."""
        with contextlib.suppress(ValueError):
            self.waiting.remove(item)
        self.running.pop(item.item_id, None)
        self.attempts.pop(item.item_id, None)
        for found in (self.done, self.given_up):
            found.discard(item.item_id)

    def take(self) -> Item | None:
        """Take the next item, which is now running; None if none waits."""
        if not self.waiting:
            return None
        item = self.waiting.popleft()
        self.running[item.item_id] = item
        self._handed += 1
        self._turn[item.item_id] = self._handed
        return item

    def attempt_of(self, item: Item) -> int:
        """Number of the item's next attempt, from 1."""
        return len(self.attempts.get(item.item_id, ())) + 1

    def finish(self, item: Item) -> None:
        """Mark a running item as done."""
        del self.running[item.item_id]
        self.done.add(item.item_id)
        self.similar, self.num_similar, self._similar_since = [], 0, 0

    def put_back(self, item: Item) -> None:
        """Return an item to the front, as if it had not been tried."""
        self.running.pop(item.item_id, None)
        self.given_up.discard(item.item_id)
        if item not in self.waiting:
            self.waiting.appendleft(item)

    def fail(self, item: Item, failure: Failure, *, replica: str, is_permanent: bool = False, kept: int = 0) -> Verdict:
        """Record a failed attempt of an item with `kept` saved steps; returns the verdict.

        An attempt counts unless a rank was lost, as by preemption, and the item had saved more steps than before. The item is
        given up at the third that counts, or if it would fail in the same way again (`is_permanent`).
        """
        del self.running[item.item_id]
        tried = self.attempts.setdefault(item.item_id, [])
        advanced = failure.kind == "lost" and kept > max((attempt["kept"] for attempt in tried), default=0)
        tried.append(
            {
                "attempt": len(tried) + 1,
                "kind": failure.kind,
                "message": failure.message,
                "traceback": failure.traceback,
                "replica": replica,
                "kept": kept,
                "counts": not advanced,
            }
        )
        if not advanced and self.halts and self._repeats_enough(item, failure):
            self._take_back(item)
            return "halt"
        if is_permanent or sum(attempt["counts"] for attempt in tried) >= MOST_ATTEMPTS:
            self.given_up.add(item.item_id)
            return "quarantine"
        self.waiting.append(item)
        return "again"

    def _repeats_enough(self, item: Item, failure: Failure) -> bool:
        """Add the item to those that failed in the same way; returns whether they are enough to halt.

        An item handed out before the last counted failure does not count: both may have met one event, such as the loss of
        a node with several replicas. Nor does an item that has counted before, such as a retry, or another item of the same
        faulty prompt.
        """
        if failure.cause != self._cause:
            self.similar, self.num_similar, self._cause, self._similar_since = [], 0, failure.cause, 0
        self.similar.append(item)
        name = item.prompt.prompt_id if failure.kind == "mistake" else item.item_id
        if name in self._counted or self._turn[item.item_id] <= self._similar_since:
            return False
        self._counted.add(name)
        self.num_similar += 1
        self._similar_since = self._handed
        return self.num_similar >= (HALT_AFTER_LOST if failure.kind in ("lost", "time") else HALT_AFTER)

    def _take_back(self, item: Item) -> None:
        """Requeue the items that failed in the same way, since none of them is at fault."""
        for other in self.similar:
            if other.item_id in self.given_up:
                self.given_up.discard(other.item_id)
                self.waiting.append(other)
        self.waiting.append(item)
