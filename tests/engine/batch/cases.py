"""Small batches for tests without a model: items, files of a worker, and simulated replicas."""

import hashlib
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.batch.driver import Done, Failed, Ready, ReplicaEvent, Step
from engine.batch.files import BatchFiles, identity_of
from engine.batch.items import Batch, Item, plan_batch
from engine.batch.queue import Failure
from engine.batch.store import publish
from engine.batch.suite import Prompt, Suite
from engine.batch.variants import Variant
from engine.config import MethodConfig, ModelConfig, RunConfig, SamplerConfig, VideoConfig
from engine.files.whole import write_json


def config(**sampler: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path="nowhere"),
        video=VideoConfig(num_frames=17, height=32, width=32),
        sampler=SamplerConfig(num_steps=4, **sampler),
        method=MethodConfig(name="freespec", window_frames=3),
    )


def suite(*texts: str) -> Suite:
    prompts = [Prompt(prompt_id=f"p{i:04d}", line=i + 1, text=text) for i, text in enumerate(texts)]
    return Suite(name="prompts.txt", sha256="0" * 64, prompts=tuple(prompts))


def batch(
    *texts: str, methods: tuple[str, ...] = ("freespec", "direct"), seeds: tuple[int, ...] = (0, 1), **sampler: Any
) -> Batch:
    given = suite(*(texts or ("a red circle", "a blue star")))
    variants = [Variant.of(config(**sampler), name) for name in methods]
    return plan_batch(variants, given, seeds=seeds, checkpoint="c" * 64, dtype="float32")


def check_bytes(path: Path) -> None:
    """Stands for decoding: the content says how long it must be."""
    data = path.read_bytes()
    if len(data) < 4 or len(data) != int.from_bytes(data[:4], "little"):
        raise OSError(f"{path} is not whole")


def content(item: Item) -> bytes:
    body = hashlib.sha256(item.item_id.encode()).digest() * 8
    return (len(body) + 4).to_bytes(4, "little") + body


def write_item(files: BatchFiles, item: Item, token: str = "t") -> None:
    """Write the files of a video in a worker's order, with arbitrary bytes as the video."""
    of = files.of(item)
    of.make_folders()
    of.snapshot.write_bytes(b"steps")
    part = of.part(token)
    part.write_bytes(content(item))
    facts = publish(part, of.video, check=check_bytes)
    output = {"file": facts.file, "bytes": facts.bytes, "sha256": facts.sha256}
    video = {"num_frames": 17, "fps": 16, "height": 32, "width": 32}
    latents = {"sha256": hashlib.sha256(content(item)).hexdigest()}
    record = identity_of(item) | {"status": "done", "output": output, "video": video, "latents": latents}
    write_json(of.sidecar, record)
    of.snapshot.unlink(missing_ok=True)


@dataclass
class Clock:
    """A clock that advances when someone waits."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self) -> None:
        self.now += 1.0


# What becomes of an item's attempt: seconds, and what it ends with; None never ends.
Script = Callable[[str, int], tuple[float, ReplicaEvent | None]]


def succeed(item_id: str, attempt: int) -> tuple[float, ReplicaEvent]:
    return 10.0, Done(record={})


def lost(broken: bool = True) -> Failed:
    return Failed(failure=Failure("lost", "rank 1 of 2 was ended by SIGKILL", "tail"), broken=broken)


@dataclass
class FakeReplica:
    """A simulated replica: loads in `loads_in` seconds, then follows the script."""

    name: str
    clock: Callable[[], float]
    script: Script = succeed
    step_every: float | None = None
    loads_in: float = 5.0
    loads: int = 0
    stopped: int = 0
    made: list[str] = field(default_factory=list)
    loading: ReplicaEvent = field(default_factory=lambda: Ready(seconds=5.0, place="here"))
    _due: list[tuple[float, int, ReplicaEvent]] = field(default_factory=list)
    _order: Any = field(default_factory=itertools.count)

    def start(self) -> None:
        self.loads += 1
        self._later(self.loads_in, self.loading)

    def make(self, task: dict[str, Any]) -> None:
        item_id = task["identity"]["item_id"]
        self.made.append(item_id)
        seconds, event = self.script(item_id, task["attempt"])
        steps = int(seconds / self.step_every) if self.step_every is not None else 0
        for step in range(steps):
            self._later((step + 1) * self.step_every, Step(finished=step + 1, total=steps))
        if event is not None:
            self._later(seconds, event)

    def events(self) -> list[ReplicaEvent]:
        found = []
        while self._due and self._due[0][0] <= self.clock():
            found.append(heapq.heappop(self._due)[2])
        return found

    def stop(self, *, gently: bool) -> bool:
        self.stopped += 1
        self._due = []
        return True

    def _later(self, seconds: float, event: ReplicaEvent) -> None:
        heapq.heappush(self._due, (self.clock() + seconds, next(self._order), event))
