"""Overhead of the batch runner: per item against a plain loop, and of the driver with simulated replicas.

    python -m benchmarks.batch                  both parts, JSON to benchmarks/results
    python -m benchmarks.batch --part driver    the simulation alone: no model, no GPU

The first part makes the same items with batch.py on one replica and with the engine in a plain loop, in alternating rounds. The overhead
of an item is the time between its start and the start of the next, without the seconds of text, denoising and decoding in its sidecar: the
runner decodes the written file, hashes and flushes it, writes a sidecar and takes the next item. Items have the preset's size and a tenth
of its steps, since the overhead does not depend on steps; the share is stated for an item of ten seconds. Saving a snapshot is part of
the denoising: it is timed separately and counted as often as a run with all of the preset's steps does it.

The second part runs the real driver, queue, journal and files, with replicas that finish an item by a simulated clock.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.measure import CPU, RESULTS, ROOT, environment, spread, write
from engine.batch.driver import Done, Driver
from engine.batch.files import BatchFiles, identity_of
from engine.batch.items import plan_batch
from engine.batch.journal import FileJournal, read_status, table
from engine.batch.queue import Queue
from engine.batch.suite import Prompt, Suite
from engine.batch.variants import Variant
from engine.denoise.snapshot import Snapshot
from engine.engine import LongVideoEngine
from engine.files.trees import read_lines
from engine.load.checkpoint import open_checkpoint
from engine.media.write_video import open_video
from engine.presets import read_preset
from tests.engine.batch.cases import Clock, FakeReplica, write_item

TARGET_SECONDS = 10.0


def main() -> None:
    """Run the requested parts, print and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["all", "overhead", "driver"], default="all")
    parser.add_argument("--items", type=int, default=10_000, help="simulated items")
    parser.add_argument("--replicas", type=int, default=256, help="simulated replicas")
    parser.add_argument("--videos", type=int, default=8, help="real items of the first part, in each round")
    parser.add_argument("--rounds", type=int, default=3, help="of the first part")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--note", default="", help="note on the machine, such as its load")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    where = environment(CPU, arguments.note)  # with the load before the benchmark
    with tempfile.TemporaryDirectory() as folder:
        if arguments.part in ("all", "overhead"):
            found["overhead"] = measure_overhead(Path(folder), arguments.videos, arguments.rounds)
            print(json.dumps(found["overhead"], indent=2))
        if arguments.part in ("all", "driver"):
            found["driver"] = simulate(Path(folder), arguments.items, arguments.replicas)
            print(json.dumps(found["driver"], indent=2))
    given = {name: getattr(arguments, name) for name in ("items", "replicas", "videos", "rounds")}
    settings = {**given, "affinity": len(os.sched_getaffinity(0)), **SETTINGS}
    print(write(arguments.out, "batch", where, settings, [{"part": name} | tree for name, tree in found.items()]))


PRESET = "tiny-wan"
SETTINGS = {"video.num_frames": 129, "sampler.num_steps": 2, "output.progress": "off"}
SNAPSHOT_EVERY = 5
PROMPT = "a red circle bounces over a blue background"


def measure_overhead(folder: Path, videos: int, rounds: int) -> dict[str, Any]:
    """Seconds of an item in a loop and in the runner, and the runner's overhead, snapshots included."""
    loop: list[float] = []
    runner: dict[str, list[float]] = {"wall_s": [], "added_s": []}
    for number in range(rounds):
        loop += loop_items(folder / f"loop{number}", videos)
        items = run_batch(folder / f"batch{number}", videos)
        runner["wall_s"] += [wall for wall, _ in items]
        runner["added_s"] += [added for _, added in items]
    keeping = time_keeping(folder / "kept.safetensors")
    kept = kept_steps(read_preset(PRESET).sampler.num_steps, SNAPSHOT_EVERY)
    added = statistics.median(runner["added_s"]) + kept * statistics.median(keeping)
    return {
        "videos": videos,
        "rounds": rounds,
        "loop": {"wall_s": spread(loop)},
        "runner": {kind: spread(values) for kind, values in runner.items()},
        "keeping_a_step_s": spread(keeping),
        "kept_steps": kept,
        "overhead_s": added,
        f"share_of_an_item_of_{TARGET_SECONDS:.0f}_s": added / TARGET_SECONDS,
    }


def run_batch(root: Path, videos: int) -> list[tuple[float, float]]:
    """For each item of a batch but the first: seconds to the start of the next, and the overhead in them."""
    suite = root.with_suffix(".txt")
    suite.write_text(f"{PROMPT}\n")
    own = {"prompts": suite, "out": root, "seeds": ",".join(map(str, range(videos))), "methods": "direct"}
    given = SETTINGS | own | {"snapshot_every": SNAPSHOT_EVERY}
    words = [f"--{name}={value}" for name, value in given.items()]
    subprocess.run([sys.executable, "launch/batch.py", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found = between_items(root)
    assert len(found) == videos - 2, (len(found), videos)
    return found


def between_items(root: Path) -> list[tuple[float, float]]:
    """For each item of a folder but the first: seconds to the start of the next, and the overhead in them."""
    events = read_lines(root / "logs/shard-1-of-1.jsonl")
    starts = [log_seconds(event["time"]) for event in events if event["event"] == "started"]
    sidecars = [json.loads(path.read_text()) for path in sorted(root.glob("direct/*/videos/*.json"))]
    made = sorted((each for each in sidecars if "run" in each), key=lambda each: each["started"])
    assert len(made) == len(starts), (len(made), len(starts))
    engine = [sum(each["run"]["seconds"][part] for part in ("text", "denoise", "decode")) for each in made]
    between = [b - a for a, b in itertools.pairwise(starts)]
    # The first item warms up, in the loop too.
    return [(wall, wall - own) for wall, own in zip(between, engine, strict=False)][1:]


def kept_steps(num_steps: int, every: int) -> int:
    """Number of snapshots of an item: after every `every` steps, and after the last."""
    return -(-num_steps // every)


def time_keeping(path: Path) -> list[float]:
    """Seconds of an snapshot, written atomically: a preset's latents, and the three tensors of their size that UniPC holds."""
    config = read_preset(PRESET, settings=SETTINGS)
    video, model = config.video, config.model
    spec = open_checkpoint(model).spec
    latents = torch.zeros(spec.latent_shape(video.num_frames, video.height, video.width))
    state = dict.fromkeys(("model_outputs.0", "model_outputs.1", "last_sample"), latents)
    found = []
    for step in range(9):
        started = time.perf_counter()
        Snapshot(path, {}).save(step, latents, (state, {}), {})
        found.append(time.perf_counter() - started)
    return found


def loop_items(root: Path, videos: int) -> list[float]:
    """Seconds of each of the same items but the first, in a minimal loop."""
    config = read_preset(PRESET, settings=SETTINGS | {"method.name": "direct"})
    root.mkdir()
    found = []
    with LongVideoEngine(config) as engine:
        for seed in range(videos):
            started = time.perf_counter()
            latents = engine.denoise(PROMPT, seed=seed).latents
            size = {"height": config.video.height, "width": config.video.width}
            with open_video(root / f"{seed}.mp4", fps=config.video.fps, crf=config.output.crf, **size) as video:
                for piece in engine.decode(latents):
                    video.write(piece)
            found.append(time.perf_counter() - started)
    return found[1:]


def simulate(folder: Path, items: int, replicas: int) -> dict[str, Any]:
    """Real seconds of the driver for so many items on so many replicas, and of planning, status and manifest."""
    config = read_preset(PRESET)
    prompts = tuple(Prompt(prompt_id=f"p{i:04d}", line=i + 1, text=f"prompt number {i}") for i in range(-(-items // 4)))
    started = time.perf_counter()
    suite = Suite(name="simulated", sha256="0", prompts=prompts)
    variants = [Variant.of(config, name) for name in ("freespec", "direct")]
    batch = plan_batch(variants, suite, seeds=(0, 1), checkpoint="c", dtype="float32")
    every = batch.items[:items]
    planning = time.perf_counter() - started
    files, clock = BatchFiles(root=folder / "simulated"), Clock()
    writing, writing_cpu = [0.0], [0.0]  # on a cluster the replicas do this, not the driver
    files.root.mkdir()
    by_id = {item.item_id: item for item in every}
    turns: list[tuple[float, float]] = []
    journal = FileJournal(
        log=files.root / "log",
        status=files.root / "status/shard-1-of-1.json",
        already=(0, 0),
        terminal=SimpleNamespace(**dict.fromkeys(("event", "status", "warn"), lambda *_: None)),
    )

    def make(item_id: str, _attempt: int) -> tuple[float, Done]:
        """Write the files of a tiny video at once, and finish after 5 to 15 simulated seconds."""
        started, cpu = time.perf_counter(), time.process_time()
        write_item(files, by_id[item_id])
        writing[0] += time.perf_counter() - started
        writing_cpu[0] += time.process_time() - cpu
        return 5.0 + int(item_id[:4], 16) / 0xFFFF * 10.0, Done(record={})

    def wait() -> None:
        turns.append((time.perf_counter(), writing[0]))
        clock.now += 0.2

    with journal:
        driver = Driver(
            queue=Queue.of(every),
            replicas=[FakeReplica(f"replica-{i}", clock, make, loads_in=60.0) for i in range(replicas)],
            prepare=lambda item, attempt, replica: {"identity": identity_of(item), "attempt": attempt},
            is_permanent=lambda item, failure: False,
            keep=lambda item, attempts: None,
            journal=journal,
            wait=wait,
            clock=clock,
        )
        started, cpu = time.perf_counter(), time.process_time()
        driver.run()
        running = time.perf_counter() - started - writing[0]
        working = time.process_time() - cpu - writing_cpu[0]
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
    # The replicas' seconds on files are not the driver's.
    lasted = sorted(b[0] - a[0] - (b[1] - a[1]) for a, b in itertools.pairwise(turns))
    shutil.rmtree(files.root)
    return {
        "items": items,
        "replicas": replicas,
        "simulated_hours": clock.now / 3600,
        "planning_seconds": planning,
        "driver_seconds": running,
        "driver_cpu_seconds": working,
        "items_per_second": items / running,
        "items_per_cpu_second": items / working,
        "busy_share_of_the_driver": running / clock.now,
        "turn_milliseconds": {
            "median": 1e3 * statistics.median(lasted),
            "p99": 1e3 * lasted[int(0.99 * len(lasted))],
            "most": 1e3 * lasted[-1],
        },
        **timed,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "done": len(driver.queue.done),
    }


def log_seconds(text: str) -> float:
    """The time of an event of a log."""
    return datetime.fromisoformat(text).timestamp()


if __name__ == "__main__":
    main()
