"""What the batch runner costs: per item against the engine in a plain loop, and with a cluster's worth of pretended replicas.

    python -m benchmarks.batch                  both parts, JSON to benchmarks/results
    python -m benchmarks.batch --part driver    the simulation alone: no model, no GPU

The first part makes the same items twice, with batch.py on one replica and with the engine in a loop that writes the same
files, and compares the seconds of an item between them. The second runs the real driver, queue, journal and files, with
replicas that finish an item when a simulated clock says so.
"""

import argparse
import contextlib
import dataclasses
import heapq
import itertools
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment, write
from engine.batch.driver import Done, Driver, Event, Ready
from engine.batch.files import BatchFiles, identity_of
from engine.batch.journal import FileJournal, read_status, table
from engine.batch.plan import plan_batch
from engine.batch.queue import Queue
from engine.batch.store import publish, read_lines, write_json
from engine.batch.suite import Prompt, Suite
from engine.config import RunConfig
from engine.engine import LongVideoEngine
from launch.cli import parse_run
from launch.replicas.worker import Worker

ROOT = Path(__file__).resolve().parent.parent
TARGET_SECONDS = 10.0


def main() -> None:
    """Run the parts that are asked for, print their figures, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["all", "overhead", "driver"], default="all")
    parser.add_argument("--items", type=int, default=10_000, help="simulated items")
    parser.add_argument("--replicas", type=int, default=256, help="simulated replicas")
    parser.add_argument("--videos", type=int, default=12, help="real items of the first part")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the JSON file")
    parser.add_argument("--note", default="", help="what a reader should know of the machine, such as other work on it")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.part in ("all", "overhead"):
            found["overhead"] = measure_overhead(Path(folder), arguments.videos)
            print(json.dumps(found["overhead"], indent=2))
        if arguments.part in ("all", "driver"):
            found["driver"] = simulate(Path(folder), arguments.items, arguments.replicas)
            print(json.dumps(found["driver"], indent=2))
    settings = {"items": arguments.items, "replicas": arguments.replicas, "videos": arguments.videos, **SETTINGS}
    where = environment(torch.device("cpu"), arguments.note)
    print(write(arguments.out, "batch", where, settings, [{"part": name} | tree for name, tree in found.items()]))


SETTINGS = {"video.num_frames": 65, "sampler.num_steps": 4, "output.progress": "off"}


def measure_overhead(folder: Path, videos: int) -> dict[str, Any]:
    """Seconds of an item in the runner less those of the same item in a loop, both from the second item on."""
    suite = folder / "prompts.txt"
    suite.write_text("a red circle bounces over a blue background\n")
    given = [f"--{name}={value}" for name, value in SETTINGS.items()]
    seeds = ",".join(map(str, range(videos)))
    own = [f"--suite={suite}", f"--out={folder / 'runner'}", f"--seeds={seeds}", "--methods=direct"]
    subprocess.run([sys.executable, "launch/batch.py", *given, *own], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    events = list(read_lines(folder / "runner/logs/shard-1-of-1.jsonl"))
    done = [event for event in events if event["event"] == "done"]
    sidecars = [json.loads(path.read_text()) for path in BatchFiles(root=folder / "runner").sidecars()]
    inside = [sum(s["run"]["seconds"][part] for part in ("text", "denoise", "decode")) for s in sidecars]
    _, config = parse_run(
        [*given, "--method.name=direct"], name="benchmark", description="", add_arguments=lambda _: None
    )
    loop = loop_seconds(config, folder / "loop", videos)
    runner = [event["seconds"] for event in done][1:]
    # Between `done` and the next `started` the driver does its own work; with the above this is all that an item takes.
    starts = [event for event in events if event["event"] == "started"]
    gaps = [_seconds(b["time"]) - _seconds(a["time"]) for a, b in zip(done, starts[1:], strict=False)]
    per_item = statistics.median(runner) + statistics.median(gaps)
    overhead = per_item - statistics.median(loop)
    return {
        "videos": videos,
        "loop_seconds": statistics.median(loop),
        "runner_seconds": per_item,
        "engine_seconds_inside_the_runner": statistics.median(inside),
        "driver_gap_seconds": statistics.median(gaps),
        "overhead_seconds": overhead,
        f"overhead_of_an_item_of_{TARGET_SECONDS:.0f}_s": overhead / TARGET_SECONDS,
    }


def loop_seconds(config: RunConfig, root: Path, videos: int) -> list[float]:
    """The same items and files from a loop in this process: no driver, no queue, no other process, no checkpoints."""
    suite = Suite(
        name="loop",
        sha256="0",
        prompts=(Prompt(prompt_id="p0000", line=1, text="a red circle bounces over a blue background"),),
    )
    batch = plan_batch(config, suite, methods=("direct",), seeds=range(videos), checkpoint="c", dtype="float32")
    seconds = []
    with contextlib.closing(LongVideoEngine(config)) as engine:
        worker = Worker(
            engine=engine, root=root, checkpoint_every=0, keep_latents=False, tell=lambda event, **fields: None
        )
        for item in batch.items:
            started = time.perf_counter()
            fields = {"suite": {}, "attempt": 1, "replica": "loop", "token": "t"}
            worker.make({"identity": identity_of(item), "name": item.name, **fields})
            seconds.append(time.perf_counter() - started)
    return seconds[1:]


@dataclasses.dataclass
class Simulated:
    """Time that passes when the driver waits, what is due in it, and real seconds that replicas have spent on files."""

    now: float = 0.0
    due: list[tuple[float, int, "FakeReplica", Event]] = dataclasses.field(default_factory=list)
    count: int = 0
    writing: float = 0.0

    def later(self, seconds: float, replica: "FakeReplica", event: Event) -> None:
        """An event of a replica, so many seconds from now."""
        self.count += 1
        heapq.heappush(self.due, (self.now + seconds, self.count, replica, event))

    def wait(self) -> None:
        """Go on by the driver's longest wait, and hand out what is due."""
        self.now += 0.2
        while self.due and self.due[0][0] <= self.now:
            _, _, replica, event = heapq.heappop(self.due)
            replica.told.append(event)


class FakeReplica:
    """Finishes an item after 5 to 15 simulated seconds, and writes the files of a tiny one."""

    def __init__(self, name: str, simulated: Simulated, files: BatchFiles, items: dict[str, Any]) -> None:
        self.name = name
        self.told: list[Event] = []
        self._simulated = simulated
        self._files = files
        self._items = items

    def start(self) -> None:
        """Loads for a minute."""
        self._simulated.later(60.0, self, Ready(seconds=60.0, place="simulated"))

    def make(self, task: dict[str, Any]) -> None:
        """Writes at once, is done later."""
        started = time.perf_counter()
        item = self._items[task["identity"]["item_id"]]
        of = self._files.of(item)
        of.make_folders()
        part = of.part("t")
        part.write_bytes(b"video")
        facts = publish(part, of.video, check=lambda path: None)
        record = identity_of(item) | {
            "status": "done",
            "output": dataclasses.asdict(facts),
            "video": {"num_frames": 1, "fps": 16, "height": 1, "width": 1},
            "latents": {"sha256": "0"},
        }
        write_json(of.sidecar, record)
        self._simulated.writing += time.perf_counter() - started  # on a cluster that is the replica's, not the driver's
        self._simulated.later(5.0 + int(item.item_id[:4], 16) / 0xFFFF * 10.0, self, Done(record=record))

    def events(self) -> list[Event]:
        """What is due."""
        told, self.told = self.told, []
        return told

    def stop(self, *, gently: bool) -> bool:
        """At once."""
        return True


class Silent:
    """A terminal that nobody looks at."""

    def event(self, event: Any) -> None:
        """Nothing."""

    def status(self, tree: Any) -> None:
        """Nothing."""


def simulate(folder: Path, items: int, replicas: int) -> dict[str, Any]:
    """Real seconds that the driver needs for so many items on so many replicas, and of all around it."""
    config = parse_run([], name="benchmark", description="", add_arguments=lambda _: None)[1]
    prompts = tuple(Prompt(prompt_id=f"p{i:04d}", line=i + 1, text=f"prompt number {i}") for i in range(-(-items // 4)))
    started = time.perf_counter()
    suite = Suite(name="simulated", sha256="0", prompts=prompts)
    batch = plan_batch(config, suite, methods=("freespec", "direct"), seeds=(0, 1), checkpoint="c", dtype="float32")
    every = batch.items[:items]
    planning = time.perf_counter() - started
    files, simulated = BatchFiles(root=folder / "simulated"), Simulated()
    files.root.mkdir()
    by_id = {item.item_id: item for item in every}
    loops: list[float] = []
    journal = FileJournal(
        log=files.root / "log", status=files.root / "status/shard-1-of-1.json", already=(0, 0), terminal=Silent()
    )
    fakes = [FakeReplica(f"replica-{i}", simulated, files, by_id) for i in range(replicas)]

    def wait() -> None:
        loops.append(time.perf_counter())
        simulated.wait()

    with journal:
        driver = Driver(
            queue=Queue.of(every),
            replicas=fakes,
            prepare=lambda item, attempt, replica: {"identity": identity_of(item)},
            hopeless=lambda item, failure: False,
            keep=lambda item, attempts: None,
            journal=journal,
            wait=wait,
            clock=lambda: simulated.now,
        )
        started = time.perf_counter()
        driver.run()
        running = time.perf_counter() - started - simulated.writing
        journal.write(driver, "done")
    timed = {}
    for name, call in (
        ("status", lambda: [table(shard, tree) for shard, tree in read_status(files.root)]),
        ("scan_of_what_is_done", lambda: [files.is_done(item, "size") for item in every]),
        ("manifest", files.write_manifest),
    ):
        started = time.perf_counter()
        call()
        timed[f"{name}_seconds"] = time.perf_counter() - started
    turns = sorted(b - a for a, b in itertools.pairwise(loops))
    shutil.rmtree(files.root)
    return {
        "items": items,
        "replicas": replicas,
        "simulated_hours": simulated.now / 3600,
        "planning_seconds": planning,
        "driver_seconds": running,
        "items_per_second": items / running,
        "busy_share_of_the_driver": running / simulated.now,
        "turn_milliseconds": {
            "median": 1e3 * statistics.median(turns),
            "p99": 1e3 * quantile(turns, 0.99),
            "most": 1e3 * turns[-1],
        },
        **timed,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "done": len(driver.queue.done),
    }


def quantile(ordered: Sequence[float], share: float) -> float:
    """The number below which this share of ordered numbers lies."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


if __name__ == "__main__":
    main()
