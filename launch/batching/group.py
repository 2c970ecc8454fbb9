"""A replica of several ranks: each item goes to all ranks, and their answers are merged into one event."""

import json
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.batch.driver import Done, Ended, Failed, Note, Placed, Placing, Ready, ReplicaEvent, Step
from engine.batch.queue import Failure, Kind
from launch.ranks.host import RankProcesses
from launch.ranks.watch import describe_end

# Time for the other ranks to answer after the first failure: they notice a lost connection by themselves.
GRACE_SECONDS = 5.0

# Signals of a fault in the rank's own code.
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)

# Kinds of failure by how likely they are the cause: ranks that lost another one come last.
_BLAME = ("disk", "memory", "mistake", "fault", "ended", "lost", "cancelled")


@dataclass
class Group:
    """A `Replica` of the driver made of `RankProcesses`; `setup` is sent to every rank first.

    Attributes:
        name: for logs.
        ranks: its ranks.
        setup: the settings; see `launch.batching.worker`.
        clock: seconds.
    """

    name: str
    ranks: RankProcesses
    setup: Mapping[str, Any]
    clock: Callable[[], float] = time.monotonic
    _answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    _exits: dict[int, dict[str, Any]] = field(default_factory=dict)
    _item: str | None = None
    _ready: bool = False
    _failing: float | None = None
    _running: bool = False
    _interrupted: bool = False

    def start(self) -> None:
        """See `Replica`."""
        self._answers, self._exits, self._item = {}, {}, None
        self._ready, self._failing, self._interrupted, self._running = False, None, False, True
        self.ranks.start(self.setup)

    def make(self, task: dict[str, Any]) -> None:
        """See `Replica`."""
        self._item, self._answers = task["identity"]["item_id"], {}
        self.ranks.send(json.dumps(task))

    def stop(self, *, gently: bool) -> bool:
        """See `Replica`."""
        if not self._running:
            return True
        if gently and not self._interrupted:
            self._interrupted = True
            self.ranks.interrupt()
        elif not gently:
            self.ranks.kill()
        for rank, event in self.ranks.drain():
            if event["event"] == "exit":
                self._exits[rank] = event
        if gently and 0 in self._exits:  # rank 0 has kept what there was
            self.ranks.kill()
        self._running = len(self._exits) < self.ranks.count
        return not self._running

    def events(self) -> list[ReplicaEvent]:
        """See `Replica`."""
        if not self._running:
            return []
        found: list[ReplicaEvent] = []
        for rank, event in self.ranks.drain():
            match event["event"]:
                case "step" if event["item"] == self._item:
                    found.append(Step(finished=event["finished"], total=event["total"]))
                case "note":
                    found.append(Note(text=event["text"]))
                case "placing":
                    found.append(Placing())
                case "placed":
                    found.append(Placed())
                case "ready":
                    self._answers[rank] = event
                case "done" | "failed" if event["item"] == self._item:
                    self._answers[rank] = event
                case "exit":
                    self._exits[rank] = event
        return found + self._judge()

    def _judge(self) -> list[ReplicaEvent]:
        """Merge the answers so far into an event, if they are complete."""
        failed = [rank for rank, answer in self._answers.items() if answer["event"] == "failed"]
        missing = [rank for rank in range(self.ranks.count) if rank not in self._answers and rank not in self._exits]
        if not failed and not self._exits:
            return [] if missing else self._all_well()
        if missing:
            now = self.clock()
            self._failing = now if self._failing is None else self._failing
            if now - self._failing < GRACE_SECONDS:
                return []
        return self._report_failure(failed)

    def _all_well(self) -> list[ReplicaEvent]:
        first = self._answers[0]
        if not self._ready:
            self._ready, self._answers = True, {}
            return [Ready(seconds=max(first["seconds"], 0.0), place=first["place"])]
        if self._item is None:
            return []
        self._item, self._answers = None, {}
        return [Done(record=first["record"])]

    def _report_failure(self, failed: list[int]) -> list[ReplicaEvent]:
        """Report the most likely cause as the failure of the item, or of the replica if it has no item."""
        failures = [self._failure_of(rank, self._answers[rank]) for rank in failed]
        failures += [self._exit_of(rank, event) for rank, event in self._exits.items() if rank not in failed]
        kind, failure = min(failures, key=lambda pair: _BLAME.index(pair[0]))
        whole = not self._exits and len(failed) == self.ranks.count and all(self._answers[r]["whole"] for r in failed)
        self._failing = None
        if self._item is None:
            self._answers = {}
            # A mistake in the settings would end the next start in the same way.
            return [Ended(failure=failure, final=kind in ("mistake", "disk"))]
        self._item, self._answers = None, {}
        return [Failed(failure=failure, broken=not whole)]

    def _failure_of(self, rank: int, answer: Mapping[str, Any]) -> tuple[str, Failure]:
        of = f"rank {rank} of {self.ranks.count}: " if self.ranks.count > 1 and not answer["whole"] else ""
        return answer["kind"], Failure(answer["kind"], f"{of}{answer['message']}", answer["traceback"])

    def _exit_of(self, rank: int, event: Mapping[str, Any]) -> tuple[str, Failure]:
        """Describe the end of a rank that reported no failure: a signal, an exit code, or the line of a mistake."""
        tail, said, code = "\n".join(event["tail"]), event["said"].removeprefix("error: "), event["code"]
        if code == 2 and said:
            return "mistake", Failure("mistake", said, tail)
        if code is None:  # its Ray actor is gone
            return "ended", Failure("lost", said, tail)
        who = f"rank {rank} of {self.ranks.count} (process {event['pid']})"
        how = f"{who} {describe_end(code, event['tail'], verb='ended')}"
        if code < 0:
            kind: Kind = "fault" if -code in _CRASHES else "lost"  # a fault of the rank, or a signal from outside
            return "ended", Failure(kind, how, tail)
        return ("lost", Failure("lost", said, tail)) if said else ("ended", Failure("lost", how, tail))
