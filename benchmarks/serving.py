"""Figures of serve.py: its overhead per video, polls of many clients, rounds of SIGKILL, and its memory over many jobs.

    python -m benchmarks.serving                       all parts, JSON to benchmarks/results
    python -m benchmarks.serving --part polls --clients 200 --seconds 60
    python -m benchmarks.serving --part kills --rounds 20

overhead: jobs of the embedded model on one replica. The overhead of a job among others that wait is the time from its start to the start
of the next, without the seconds of text, denoising and decoding in its sidecar, as in `benchmarks.batch`, which makes the same items; the
service's own is the difference. That of a job alone is the time from its POST until the service knows that it is done, likewise. Items have a
tenth of the preset's steps, since the overhead does not depend on them; the share is stated for an item of ten seconds.

polls: clients ask for the state of a job once a second each, as OpenAI's client does, while two replicas make videos.

kills: a round is a few videos on two replicas. At a random time SIGKILL goes to the server, to a replica, or to both; a server that has
ended is started again. In the end every accepted job must be completed, exist once, and have the bytes that generate.py makes.

memory: the server alone, with replicas that only pretend. Each job is posted, polled, followed and fetched. The CPU seconds of the server for
a job do not depend on other work on the machine, unlike the overhead above.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.batch import between_items, log_seconds, run_batch
from benchmarks.faults import KILLS, kill_once_it_works, one_rank, working_seconds
from benchmarks.measure import CPU, RESULTS, ROOT, environment, spread, write
from engine.batch.driver import Done
from engine.batch.files import BatchFiles
from engine.files.trees import read_lines
from engine.files.whole import file_sha256
from launch.commands import serve
from tests.engine.batch.cases import FakeReplica, write_item

TARGET_SECONDS = 10.0
PATIENCE_SECONDS = 900.0
PROMPT = "a red circle bounces over a blue background"
WHOLE = {"sampler.num_steps": 2, "output.progress": "off"}
SMALL = {
    "video.num_frames": 33,
    "video.height": 32,
    "video.width": 32,
    "sampler.num_steps": 8,
    "output.progress": "off",
}
# One address asks for all clients.
FREE = {"requests_per_second": 0, "posts_per_minute": 0}
VICTIMS = {
    "server": KILLS["driver"],
    "replica": one_rank,
    "both": lambda server, rng: [*one_rank(server, rng), server],
}


def main() -> int:
    """Run the requested parts, print and write their figures; 1 if a round of kills or a poll failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["all", *PARTS], default="all")
    parser.add_argument("--videos", type=int, default=12, help="of the first part")
    parser.add_argument("--clients", type=int, default=200, help="of the second part")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the second part")
    parser.add_argument("--rounds", type=int, default=20, help="of the third part")
    parser.add_argument("--seed", type=int, default=0, help="of its times and victims")
    parser.add_argument("--jobs", type=int, default=500, help="of the fourth part")
    parser.add_argument("--simulate", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--note", default="", help="note on the machine, such as its load")
    given = parser.parse_args()
    if given.simulate:
        run_simulated(given.simulate)
        return 0
    where, found = environment(CPU, given.note), []
    for name, part in PARTS.items():
        if given.part in ("all", name):
            with tempfile.TemporaryDirectory() as folder:
                found.append({"part": name, **part(Path(folder), given)})
            print(json.dumps(found[-1], indent=1), flush=True)
    where["load_average_end"] = os.getloadavg()[0]
    settings = {"affinity": len(os.sched_getaffinity(0)), "overhead": WHOLE, "kills": SMALL}
    name = "serving" if given.part == "all" else f"serving-{given.part}"
    print(write(given.out, name, where, settings, found))
    return 0 if all(part["well"] for part in found) else 1


@dataclass(frozen=True)
class Service:
    """A running serve.py: its process, port and folder."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """The body of an answer; RuntimeError for any but 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        with contextlib.closing(connection):
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            data = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{method} {path}: {answer.status} {data[:300]!r}")
        return data

    def post(self, **fields: Any) -> str:
        """Ask for a video; returns its id."""
        return json.loads(self.ask("POST", "/v1/videos", {"prompt": PROMPT, **fields}))["id"]

    def follow(self, name: str) -> str:
        """Wait for the end of a job; returns its status."""
        events = self.ask("GET", f"/v1/videos/{name}/events").decode()
        return json.loads(re.findall(r"^data: (.*)$", events, re.M)[-1])["status"]

    def statuses(self) -> dict[str, str]:
        """The status of every job."""
        return {job["id"]: job["status"] for job in json.loads(self.ask("GET", "/v1/videos?limit=100"))["data"]}


@contextlib.contextmanager
def serving(folder: Path, *, simulated: bool = False, **settings: Any) -> Iterator[Service]:
    """Start the service, or one with replicas that pretend, and wait until it answers and a replica has loaded."""
    words = [f"--{name}={value}" for name, value in ({"folder": folder, "port": 0} | FREE | settings).items()]
    command = ["-m", "benchmarks.serving", "--simulate", *words] if simulated else ["launch/serve.py", *words]
    # argparse would take the words for its own options.
    command = [word.replace("--", "++", 1) if simulated and word in words else word for word in command]
    printed = folder.with_suffix(f".{time.monotonic_ns()}.out")
    with printed.open("wb") as file:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file)
    try:
        found = _until(process, printed, lambda: re.search(r"http://127\.0\.0\.1:(\d+) ", printed.read_text()))
        service = Service(process, int(found[1]), folder)
        _until(process, printed, lambda: json.loads(service.ask("GET", "/health"))["status"] == "ok")
        yield service
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _until(process: subprocess.Popen[bytes], printed: Path, what: Any) -> Any:
    until = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError):
            if found := what():
                return found
        time.sleep(0.05)
    raise RuntimeError(f"the service did not start: {printed.read_text()[-2000:]}")


def measure_overhead(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a job beside those of the engine: of jobs that wait for one another, and of one that finds an idle replica.

    The service's own are those that the same items do not need in `batch.py`, which also writes files, snapshots and its log.
    """
    between, alone, accepted = [], [], []
    batch = [added for _, added in run_batch(folder / "batch", given.videos + 2)]
    with serving(folder / "served", methods="direct", snapshot_every=5, **WHOLE) as service:
        log = service.folder / "logs/shard-1-of-1.jsonl"
        names = [service.post(seed=seed) for seed in range(given.videos + 2)]
        assert service.follow(names[-1]) == "completed"
        between = [added for _, added in between_items(service.folder)]
        for seed in range(1000, 1000 + given.videos):
            sent, started = time.time(), time.perf_counter()
            name = service.post(seed=seed)
            accepted.append(time.perf_counter() - started)
            assert service.follow(name) == "completed"
            [done] = [each for each in read_lines(log) if each["event"] == "done" and f"video_{each['id']}" == name]
            [sidecar] = service.folder.glob(f"direct/*/videos/*-s{seed}.json")
            seconds = json.loads(sidecar.read_text())["run"]["seconds"]
            alone.append(
                log_seconds(done["time"]) - sent - sum(seconds[part] for part in ("text", "denoise", "decode"))
            )
    share = (statistics.median(between) - statistics.median(batch)) / TARGET_SECONDS
    return {
        "videos": given.videos,
        "between_two_jobs_s": spread(between),
        "between_two_items_of_a_batch_s": spread(batch),
        f"own_share_of_an_item_of_{TARGET_SECONDS:.0f}_s": share,
        "post_to_done_beside_the_engine_s": spread(alone),
        "post_s": spread(accepted),
        "well": share <= 0.01,
    }


def measure_polls(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of polls while two replicas work, and the answers that were not 200."""
    with serving(folder / "served", replicas=2, most_jobs=1000, requests_per_second=500) as service:
        names = [service.post(seed=seed) for seed in range(40)]
        time.sleep(5.0)
        before = list(service.statuses().values()).count("completed")
        taken, wrong = asyncio.run(_poll_all(service.port, names, given.clients, given.seconds))
        after = list(service.statuses().values())
    taken.sort()
    return {
        "clients": given.clients,
        "seconds": given.seconds,
        "polls": len(taken),
        "errors": len(wrong),
        "first_errors": wrong[:3],
        "videos_made_meanwhile": after.count("completed") - before,
        "jobs_left": after.count("queued") + after.count("in_progress"),
        "milliseconds": {
            "median": 1e3 * statistics.median(taken),
            "p99": 1e3 * taken[int(0.99 * len(taken))],
            "most": 1e3 * taken[-1],
        },
        "well": not wrong and taken[int(0.99 * len(taken))] <= 0.2,
    }


async def _poll_all(port: int, names: Sequence[str], clients: int, seconds: float) -> tuple[list[float], list[str]]:
    """Polls of so many clients, each on a connection of its own, spread over the second."""
    taken: list[float] = []
    wrong: list[str] = []
    until = time.monotonic() + seconds

    async def poll(index: int) -> None:
        await asyncio.sleep(index / clients)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        request = f"GET /v1/videos/{names[index % len(names)]} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
        while time.monotonic() < until:
            started = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(int(re.findall(rb"(?i)content-length: (\d+)", head)[0]))
            taken.append(time.perf_counter() - started)
            if not head.startswith(b"HTTP/1.1 200"):
                wrong.append(f"{head.splitlines()[0].decode()} {body[:200].decode()}")
            await asyncio.sleep(max(0.0, 1.0 - taken[-1]))
        writer.close()

    for error in await asyncio.gather(*(poll(index) for index in range(clients)), return_exceptions=True):
        if error is not None:
            wrong.append(repr(error))
    return taken, wrong


REQUESTS = [{"seed": seed, "method": method} for seed in (0, 1, 2) for method in ("freespec", "direct")]


def measure_kills(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Rounds of kills, and whether each ended well."""
    expected = [generated(folder / f"{request['method']}-{request['seed']}.mp4", request) for request in REQUESTS]
    rng, rounds = random.Random(given.seed), []
    run_round(folder / "whole", expected, None, rng, 0.0)
    working = working_seconds(folder / "whole")
    for number in range(given.rounds):
        kind = list(VICTIMS)[number % len(VICTIMS)]
        rounds.append(run_round(folder / f"round{number}", expected, kind, rng, working))
        print(json.dumps(rounds[-1]), flush=True)
    return {
        "jobs": len(REQUESTS),
        "working_seconds": working,
        "rounds": rounds,
        "passed": {
            kind: sum(each["well"] for each in rounds if each["kind"] == kind)
            for kind in dict.fromkeys(each["kind"] for each in rounds)
        },
        "well": all(each["well"] for each in rounds),
    }


def generated(path: Path, request: Mapping[str, Any]) -> str:
    """SHA-256 of the video that generate.py makes."""
    own = {"prompt": PROMPT, "sampler.seed": request["seed"], "method.name": request["method"], "output.path": path}
    words = [f"--{name}={value}" for name, value in (SMALL | own).items()]
    subprocess.run([sys.executable, "launch/generate.py", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return file_sha256(path)


def run_round(
    out: Path, expected: Sequence[str], kind: str | None, rng: random.Random, working: float
) -> dict[str, Any]:
    """One folder with one kill, and its service until every job has ended."""
    started, names, killed = time.monotonic(), [], None
    with serving(out, replicas=2, snapshot_every=2, **SMALL) as service:
        names = [service.post(**request) for request in REQUESTS]
        if kind is not None:
            killed = kill_once_it_works(service.process, out, VICTIMS[kind], rng, items=len(REQUESTS), working=working)
        if kind in (None, "replica"):
            return judge(service, names, expected) | {
                "kind": kind,
                "killed": killed,
                "seconds": time.monotonic() - started,
            }
        service.process.wait()
        assert service.process.returncode == -signal.SIGKILL
    with serving(out, replicas=2, snapshot_every=2, **SMALL) as service:
        return judge(service, names, expected) | {"kind": kind, "killed": killed, "seconds": time.monotonic() - started}


def judge(service: Service, names: Sequence[str], expected: Sequence[str]) -> dict[str, Any]:
    """Wait until every job has ended, then check that each is there once, with the bytes that are expected."""
    until = time.monotonic() + PATIENCE_SECONDS
    while set(service.statuses().values()) & {"queued", "in_progress"} and time.monotonic() < until:
        time.sleep(0.2)
    out, statuses = service.folder, service.statuses()
    videos = dict.fromkeys(names, out / "a.mp4")
    for name, path in videos.items():
        path.write_bytes(service.ask("GET", f"/v1/videos/{name}/content"))
        videos[name] = file_sha256(path)
        path.unlink()
    records = [json.loads(path.read_text()) for path in BatchFiles(root=out).sidecars()]
    done = [event["id"] for event in read_lines(out / "logs/shard-1-of-1.jsonl") if event["event"] == "done"]
    checks = {
        "completed": statuses == dict.fromkeys(names, "completed"),
        "once": sorted(f"video_{each['item_id']}" for each in records) == sorted(names)
        and len(list(out.glob("*/*/videos/*.mp4"))) == len(names)
        and len(set(done)) == len(done),
        "bytes": list(videos.values()) == list(expected),
        "nothing_left": not [path for path in out.rglob("*") if path.suffix == ".part" or "snapshot" in path.name],
        "none_quarantined": not list(out.glob("quarantine/*.json")),
    }
    resumed = sum(record["run"]["resumed_at"] > 0 for record in records)
    return {**checks, "well": all(checks.values()), "resumed": resumed}


def measure_memory(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Resident memory of the server after every 50 jobs, and its CPU seconds for one, in which a replica's files are too."""
    resident: dict[int, float] = {}
    with serving(folder / "served", simulated=True, replicas=4) as service:
        process = psutil.Process(service.process.pid)
        before = sum(process.cpu_times()[:2])
        for number in range(1, given.jobs + 1):
            name = service.post(seed=number)
            service.ask("GET", f"/v1/videos/{name}")
            assert service.follow(name) == "completed"
            service.ask("GET", f"/v1/videos/{name}/content")
            service.ask("GET", "/v1/videos?limit=100")
            if number % 50 == 0:
                service.ask("GET", "/metrics")
                resident[number] = process.memory_info().rss / 2**20
        cpu = (sum(process.cpu_times()[:2]) - before) / given.jobs
    first, last = resident[min(resident)], resident[max(resident)]
    return {
        "jobs": given.jobs,
        "cpu_s_per_job": cpu,
        "resident_mib": resident,
        "kib_per_job": 1024 * (last - first) / max(1, max(resident) - min(resident)),
        "growth": last / first - 1,
        "well": last / first < 1.02,
    }


def run_simulated(words: Sequence[str]) -> None:
    """serve.py with replicas that write the files of an item at once."""
    given = serve.read([word.replace("++", "--", 1) for word in words])
    batch, jobs = serve.plan(given)

    def script(item_id: str, _attempt: int) -> tuple[float, Done]:
        job = jobs.job_of(item_id)
        assert job is not None
        write_item(jobs.files, job.planned.item)
        return 0.02, Done(record={})

    @contextlib.contextmanager
    def open_simulated(*_: Any, count: int, **__: Any) -> Iterator[list[FakeReplica]]:
        yield [
            FakeReplica(name=f"replica-{i}", clock=time.monotonic, script=script, loads_in=0.1) for i in range(count)
        ]

    serve.plan, serve.open_replicas = lambda _: (batch, jobs), open_simulated
    serve.run(given)


PARTS = {
    "overhead": measure_overhead,
    "polls": measure_polls,
    "kills": measure_kills,
    "memory": measure_memory,
}

if __name__ == "__main__":
    sys.exit(main())
