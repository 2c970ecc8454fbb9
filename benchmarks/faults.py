"""Kill processes of a batch on a local Ray, round after round; the batch must be complete and correct in the end.

    python -m benchmarks.faults --rounds 20            writes benchmarks/results/faults-cpu-DATE.json
    python -m benchmarks.faults --rounds 4 --minutes 10

A round is a batch of small videos of the embedded model on replicas of two ranks. At a random time, in turn, SIGKILL goes
to one rank, to all actors of a replica, to the driver, or to the Ray node process (raylet) of the driver's Ray. If the driver
ends, it is started again. At the end every item must exist exactly once, every SHA-256 must match
its file, the latents must equal those of an undisturbed batch, and no unfinished file may be left.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.batch import log_seconds
from benchmarks.measure import CPU, RESULTS, ROOT, environment, write
from benchmarks.tables import table
from engine.batch.files import BatchFiles
from engine.files.trees import read_lines
from engine.files.whole import file_sha256

MOST_STARTS = 6
ROUND_SECONDS = 900.0
SETTINGS = {
    "video.num_frames": 33,
    "video.height": 32,
    "video.width": 32,
    "sampler.num_steps": 8,
    "snapshot_every": 2,
}

# The processes to kill, of those that belong to a driver.
Victims = Callable[[int, random.Random], list[int]]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The batch of every round: `items` small videos on `replicas` replicas of `ranks` ranks."""

    suite: Path
    seeds: str
    replicas: int
    ranks: int
    ray: str | None

    @property
    def items(self) -> int:
        """Prompts x seeds x methods."""
        return 2 * 2 * len(self.seeds.split(","))

    def command(self, out: Path) -> list[str]:
        """Its command line."""
        given = SETTINGS | {
            "prompts": self.suite,
            "out": out,
            "methods": "freespec,direct",
            "seeds": self.seeds,
            "replicas": self.replicas,
            "nproc": self.ranks,
        }
        words = [f"--{name}={value}" for name, value in given.items()]
        return [sys.executable, "launch/batch.py", *words, *([f"--ray={self.ray}"] if self.ray else [])]


def main() -> int:
    """Run the rounds, print and write their figures; 1 if any round did not end well."""
    arguments = _arguments()
    rng = random.Random(arguments.seed)
    ended: list[dict[str, Any]] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        suite = Path(folder) / "prompts.txt"
        suite.write_text("a red circle bounces over a blue background\na green square\n")
        batch = Batch(
            suite=suite, seeds=arguments.seeds, replicas=arguments.replicas, ranks=arguments.ranks, ray=arguments.ray
        )
        run_round(batch, Path(folder) / "whole", None, rng, 0.0)
        working = working_seconds(Path(folder) / "whole")
        expected = latents_of(Path(folder) / "whole")
        assert len(expected) == batch.items, f"the undisturbed batch has {len(expected)} of {batch.items} items"
        kinds = [kind for kind in KILLS if arguments.ray or kind != "ray node"]
        for number in range(arguments.rounds):
            if time.monotonic() - started > 60 * arguments.minutes:
                break
            kind, out = kinds[number % len(kinds)], Path(folder) / f"round{number}"
            result = run_round(batch, out, kind, rng, working)
            judged = judge(out, expected)
            # A round without a kill tests nothing.
            judged["well"] = judged["well"] and result["killed"] is not None
            ended.append({"round": number, "kind": kind, **result, **judged})
            print(json.dumps(ended[-1]), flush=True)
    where = environment(CPU, arguments.note)
    settings = {"items": batch.items, "replicas": batch.replicas, "ranks": batch.ranks, "ray": batch.ray, **SETTINGS}
    settings |= {"seed": arguments.seed, "working_seconds": working}
    print(write(arguments.out, "faults", where, settings, ended))
    print(table(*summary(ended)))
    return 0 if ended and all(result["well"] for result in ended) else 1


def run_round(batch: Batch, out: Path, kind: str | None, rng: random.Random, working: float) -> dict[str, Any]:
    """One batch with one kill; the driver is started again until it ends well or has been started six times."""
    started, starts, killed, codes = time.monotonic(), 0, None, []
    while starts < MOST_STARTS and time.monotonic() - started < ROUND_SECONDS:
        starts += 1
        log = (out.parent / f"{out.name}.log").open("a")
        driver = subprocess.Popen(batch.command(out), cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        if kind is not None and killed is None:
            killed = kill_once_it_works(driver, out, KILLS[kind], rng, items=batch.items, working=working)
        try:
            codes.append(driver.wait(timeout=ROUND_SECONDS))
        except subprocess.TimeoutExpired:
            driver.kill()
            codes.append(driver.wait())
        log.close()
        if codes[-1] == 0:
            break
    return {"killed": killed, "starts": starts, "codes": codes, "seconds": time.monotonic() - started}


def kill_once_it_works(
    driver: subprocess.Popen[bytes], out: Path, choose: Victims, rng: random.Random, *, items: int, working: float
) -> dict[str, Any] | None:
    """Kill the processes that `choose` names after a random half or less of the items and a random part of another; None if the driver ended before.

    Progress is counted in items: by `working`, the seconds of the undisturbed batch, alone, a batch on a busy machine could be over
    before its kill.
    """
    log, wanted = out / "logs/shard-1-of-1.jsonl", rng.randint(0, items // 2)
    while driver.poll() is None:
        seen = [event["event"] for event in read_lines(log)]
        if "started" in seen and seen.count("done") >= wanted:
            break
        time.sleep(0.02)
    time.sleep(rng.uniform(0.0, working / items))
    while driver.poll() is None:
        victims = choose(driver.pid, rng)
        for victim in victims:
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if victims:
            done = sum(event["event"] == "done" for event in read_lines(log))
            return {"processes": len(victims), "after_items": done}
        time.sleep(0.02)
    return None


def one_rank(driver: int, rng: random.Random) -> list[int]:
    """A rank of any replica."""
    ranks = _workers(driver)
    return [rng.choice(ranks)] if ranks else []


def replica_actors(driver: int, rng: random.Random) -> list[int]:
    """The hosts of all ranks of one replica: its Ray actors, or without Ray its ranks."""
    groups: dict[str, list[int]] = {}
    for rank in _workers(driver):
        with contextlib.suppress(psutil.Error):
            started = psutil.Process(rank)
            port, host = started.environ().get("MASTER_PORT", str(rank)), started.ppid()
            groups.setdefault(port, []).append(rank if host == driver else host)
    return groups[rng.choice(sorted(groups))] if groups else []


def the_driver(driver: int, rng: random.Random) -> list[int]:
    """The driver itself."""
    return [driver]


def ray_node(driver: int, rng: random.Random) -> list[int]:
    """The raylet of the driver's Ray."""
    return [process for process in family(driver) if "/raylet/raylet" in next(iter(command_of(process)), "")]


KILLS: dict[str, Victims] = {
    "rank": one_rank,
    "replica": replica_actors,
    "driver": the_driver,
    "ray node": ray_node,
}


def judge(out: Path, expected: dict[str, str]) -> dict[str, Any]:
    """Whether every item exists once and is correct."""
    files = BatchFiles(root=out)
    records = [json.loads(path.read_text()) for path in files.sidecars()]
    found = [record["item_id"] for record in records]
    broken = [
        path
        for path in files.sidecars()
        if file_sha256(path.with_suffix(".mp4")) != json.loads(path.read_text())["output"]["sha256"]
    ]
    videos = list(out.glob("*/*/videos/*.mp4"))
    left = [path for path in out.rglob("*") if path.suffix == ".part" or "snapshot" in path.name]
    latents = latents_of(out)
    events = list(read_lines(out / "logs/shard-1-of-1.jsonl"))
    checks = {
        "once": sorted(found) == sorted(expected) and len(videos) == len(expected),
        "sha256": not broken,
        "latents": latents == expected,
        "nothing_left": not left,
        "none_quarantined": not list(files.quarantine.glob("*.json")),
    }
    return {
        **checks,
        "well": all(checks.values()),
        "resumed": sum(record["run"]["resumed_at"] > 0 for record in records),
        "repeated": sum(record["attempt"] > 1 for record in records),
        "failures": [f"{event['kind']}: {event['message']}" for event in events if event["event"] == "failed"],
    }


def working_seconds(out: Path) -> float:
    """Seconds from the first item's start to the last one's end."""
    events = list(read_lines(out / "logs/shard-1-of-1.jsonl"))
    times = {name: [log_seconds(e["time"]) for e in events if e["event"] == name] for name in ("started", "done")}
    return max(times["done"]) - min(times["started"])


def latents_of(out: Path) -> dict[str, str]:
    """SHA-256 of the latents of every item."""
    records = (json.loads(path.read_text()) for path in BatchFiles(root=out).sidecars())
    return {record["item_id"]: record["latents"]["sha256"] for record in records}


def summary(ended: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line per kind."""
    rows = []
    for kind in dict.fromkeys(result["kind"] for result in ended):
        mine = [result for result in ended if result["kind"] == kind]
        starts = sum(result["starts"] for result in mine)
        again = sum(result["repeated"] for result in mine)
        resumed = sum(result["resumed"] for result in mine)
        seconds = sum(result["seconds"] for result in mine) / len(mine)
        well = sum(result["well"] for result in mine)
        killed = sum(result["killed"] is not None for result in mine)
        rows.append(
            [kind, str(len(mine)), str(killed), str(well), str(starts), str(again), str(resumed), f"{seconds:.0f}"]
        )
    return ["victim", "rounds", "killed", "well", "driver starts", "items repeated", "items resumed", "mean s"], rows


def family(process: int) -> list[int]:
    """All descendants of a process."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return sorted(child.pid for child in psutil.Process(process).children(recursive=True))
    return []


def _workers(driver: int) -> list[int]:
    """The ranks of a driver's replicas; those of its own Ray are its descendants too."""
    return [process for process in family(driver) if "launch.batching" in " ".join(command_of(process))]


def command_of(process: int) -> list[str]:
    try:
        return psutil.Process(process).cmdline()
    except psutil.Error:
        return []


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=600.0, help="start no round after so long")
    parser.add_argument("--seeds", default="0,1,2", help="each makes four items: two prompts x two methods")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ray", default="local", help="empty for processes of this machine")
    parser.add_argument("--seed", type=int, default=0, help="of the times and victims")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--note", default="", help="note on the machine, such as its load")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
