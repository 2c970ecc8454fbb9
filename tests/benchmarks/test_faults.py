"""Short fault rounds on local and Ray replicas, and checks that the judge of the rounds detects faults."""

import contextlib
import hashlib
import ipaddress
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.faults import command_of, family, judge, one_rank, ray_node, replica_actors, the_driver
from engine.batch.files import BatchFiles
from engine.batch.identity import item_id
from engine.batch.locks import Shard
from engine.batch.variants import Variant
from engine.config import RunConfig
from engine.engine import LongVideoEngine
from engine.files.trees import read_lines
from launch.cli.parser import parse_run
from launch.cli.start import run_script
from tests.engine.batch import cases
from tests.launch.conftest import SMALL, wan_folder
from tests.launch.forked import PATIENCE_SECONDS
from tests.ranks import PRELOAD

__all__ = ["wan_folder"]

PROMPTS = ("a red circle", "a blue star")
METHODS = ("freespec", "direct")
SEEDS = (0, 1)
SETTINGS = SMALL | {"sampler.num_steps": 8, "sampler.max_text_tokens": 20, "output.progress": "off"}
# One after another in one batch; an item may lose two attempts to them, and a third would put it into quarantine.
VICTIMS = {"here": (one_rank, the_driver, one_rank), "ray": (replica_actors, the_driver, ray_node)}
"""The driver is started again, as a user would; a Ray that has ended is started again by the driver itself."""
SOON_SECONDS = 0.4


def listeners(processes: Iterable[int]) -> dict[str, str]:
    """Addresses at which processes listen, and their command lines."""
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for socket in psutil.Process(process).net_connections("tcp"):
                if socket.status == psutil.CONN_LISTEN:
                    found[f"{socket.laddr.ip} {socket.laddr.port}"] = " ".join(command_of(process))[:200]
    return found


def on_loopback(address: str) -> bool:
    """Whether one of these addresses is this machine's own: 127.0.0.0/8, ::1, or an IPv4 one mapped to IPv6."""
    host = ipaddress.ip_address(address.partition(" ")[0])
    return (getattr(host, "ipv4_mapped", None) or host).is_loopback


def config_of(folder: Path) -> RunConfig:
    """The batch's settings, as its command line says them."""
    given = [f"--{name}={value}" for name, value in ({"model.path": folder} | SETTINGS).items()]
    return parse_run(given, name="test", description="", add_arguments=lambda parser: None)[1]


@pytest.fixture
def latents(wan_folder: Path) -> dict[tuple[str, str, int], str]:
    """SHA-256 of the latents of every method, prompt and seed, from the engine called in a loop."""
    config, found = config_of(wan_folder), {}
    with contextlib.closing(LongVideoEngine(config)) as engine:
        for method in METHODS:
            engine.use_method(Variant.of(config, method).config.method)
            for prompt in PROMPTS:
                for seed in SEEDS:
                    made = engine.denoise(prompt, seed=seed).latents
                    found[method, prompt, seed] = hashlib.sha256(made.contiguous().numpy().tobytes()).hexdigest()
    assert len(set(found.values())) == 8
    return found


@pytest.fixture
def start(wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., BaseProcess]]:
    """`start(*words)`: batch.py in a process of its own, forked from one that has imported everything; ended after the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: beside other tests its workers would get no time
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    own = {
        "prompts": tmp_path / "prompts.txt",
        "out": tmp_path / "out",
        "methods": ",".join(METHODS),
        "seeds": ",".join(map(str, SEEDS)),
        "replicas": 2,
        "snapshot_every": 2,
    }
    words = [f"--{name}={value}" for name, value in ({"model.path": wan_folder} | SETTINGS | own).items()]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    started: list[BaseProcess] = []

    def call(*more: str) -> BaseProcess:
        log = tmp_path / f"driver{len(started)}.log"
        started.append(context.Process(target=drive, args=([*words, *more], log, dict(os.environ)), daemon=False))
        started[-1].start()
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.join()


def drive(words: list[str], log: Path, environment: dict[str, str]) -> None:
    """The driver's process."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with log.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.argv = ["batch.py", *words]
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    os._exit(run_script("batch"))


def count(out: Path, name: str) -> int:
    log = BatchFiles(root=out).log(Shard())
    return sum(event["event"] == name for event in read_lines(log))


def wait_for(condition: Callable[[], Any], process: BaseProcess) -> Any:
    """What the condition gives, once that is something."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert process.is_alive(), "the driver has ended"
        assert time.monotonic() < until
        time.sleep(0.01)
    return found


def kill_soon(
    victim: Callable[[int, random.Random], list[int]],
    out: Path,
    driver: BaseProcess,
    rng: random.Random,
    *,
    look: Callable[[int], None],
) -> None:
    """SIGKILL at a random time after the next item is begun; `look` sees the driver before."""
    begun = count(out, "started")
    wait_for(lambda: count(out, "started") > begun, driver)
    look(driver.pid or 0)
    time.sleep(rng.uniform(0.0, SOON_SECONDS))
    for process in wait_for(lambda: victim(driver.pid or 0, rng), driver):
        with contextlib.suppress(ProcessLookupError):  # an actor that has ended by itself meanwhile
            os.kill(process, signal.SIGKILL)


def assert_loopback_alone(driver: int, *, ray: bool) -> None:
    """No process of the batch, of its Ray either, listens where other machines could reach it."""
    found = listeners([driver, *family(driver)])
    assert any("/raylet/raylet" in whose for whose in found.values()) == ray
    assert {address: whose for address, whose in found.items() if not on_loopback(address)} == {}


def test_negative_control_reachable_listener() -> None:
    for family_of, host, alone in (
        (socket.AF_INET, "127.0.0.1", True),
        (socket.AF_INET, "0.0.0.0", False),
        (socket.AF_INET6, "::1", True),
        (socket.AF_INET6, "::", False),
    ):
        if family_of == socket.AF_INET6 and not Path("/proc/net/if_inet6").exists():
            continue
        before = listeners([os.getpid()])
        with socket.create_server((host, 0), family=family_of):
            (address,) = listeners([os.getpid()]).keys() - before.keys()
            assert on_loopback(address) is alone, (host, address)


@pytest.mark.slow
@pytest.mark.parametrize("where", VICTIMS)
def test_kills_at_random_times_lose_and_change_nothing(
    start: Callable[..., BaseProcess], latents: dict[tuple[str, str, int], str], tmp_path: Path, where: str
) -> None:
    """Each victim at a random time after an item was begun; the batch is as undisturbed."""
    more = ["--ray=local", "--replicas=1", "--nproc=2"] if where == "ray" else []
    if more:
        pytest.importorskip("ray", reason="the extra `ray` is not installed")
    rng, out, driver = random.Random(0), tmp_path / "out", start(*more)
    for victim in VICTIMS[where]:
        before = len(ended(out))
        kill_soon(victim, out, driver, rng, look=lambda pid: assert_loopback_alone(pid, ray=bool(more)))
        if victim is the_driver:
            driver.join()
            driver = start(*more)
        else:  # a driver that is killed before it notices cannot tell of it
            wait_for(lambda before=before: len(ended(out)) > before, driver)
    driver.join(PATIENCE_SECONDS)
    assert driver.exitcode == 0, [log.read_text() for log in tmp_path.glob("driver*.log")]
    judged = judge(out, expected_of(out, latents))
    assert judged["well"], judged
    told = {"here": ["SIGKILL", "SIGKILL"], "ray": ["The actor died", "lost Ray"]}[where]
    assert all(sum(words in message for message in ended(out)) >= told.count(words) for words in told), ended(out)


def expected_of(out: Path, latents: dict[tuple[str, str, int], str]) -> dict[str, str]:
    """The latents by item: ids are made of what the folder says that each method is."""
    configs = json.loads((out / "batch.json").read_text())["configs"]
    ids = {tree["method"]["name"]: name for name, tree in configs.items()}
    return {
        item_id(ids[method], prompt=prompt, seed=seed): digest for (method, prompt, seed), digest in latents.items()
    }


def records(out: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in BatchFiles(root=out).sidecars()]


def ended(out: Path) -> list[str]:
    """How items and replicas ended that did not end well."""
    events = read_lines(BatchFiles(root=out).log(Shard()))
    return [event["message"] for event in events if event["event"] in ("failed", "ended")]


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A finished batch with fake videos, and its expected latents."""
    files, every = BatchFiles(root=tmp_path / "out"), cases.batch().items
    for item in every:
        cases.write_item(files, item)
    for path in files.sidecars():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"run": {"resumed_at": 0}, "attempt": 1}))
    return files.root, {record["item_id"]: record["latents"]["sha256"] for record in records(files.root)}


def test_complete_batch_passes(finished: tuple[Path, dict[str, str]]) -> None:
    assert judge(*finished)["well"]


def lose_a_video(out: Path) -> None:
    path = next(out.glob("*/*/videos/*.mp4"))
    path.unlink()
    path.with_suffix(".json").unlink()


def make_a_video_twice(out: Path) -> None:
    path = next(out.glob("*/*/videos/*.mp4"))
    for kind in (".mp4", ".json"):
        path.with_name(f"again{kind}").write_bytes(path.with_suffix(kind).read_bytes())


def flip_a_bit(out: Path) -> None:
    path = next(out.glob("*/*/videos/*.mp4"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def change_latents(out: Path) -> None:
    path = next(out.glob("*/*/videos/*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latents": {"sha256": "0"}}))


def leave_a_part(out: Path) -> None:
    next(out.glob("*/*/videos/*.mp4")).with_suffix(".mp4.t.part").touch()


def leave_steps(out: Path) -> None:
    (next(out.glob("*/*/unfinished")) / "p0000-s0.snapshot.safetensors").touch()


def give_up(out: Path) -> None:
    item = replace(cases.batch().items[0], item_id="another")
    BatchFiles(root=out).put_into_quarantine(item, error="e", attempts=[])


@pytest.mark.parametrize(
    ("harm", "check"),
    [
        (lose_a_video, "once"),
        (make_a_video_twice, "once"),
        (flip_a_bit, "sha256"),
        (change_latents, "latents"),
        (leave_a_part, "nothing_left"),
        (leave_steps, "nothing_left"),
        (give_up, "none_quarantined"),
    ],
)
def test_negative_control_the_judge_sees_it(
    finished: tuple[Path, dict[str, str]], harm: Callable[[Path], None], check: str
) -> None:
    out, expected = finished
    harm(out)
    judged = judge(out, expected)
    assert (judged[check], judged["well"]) == (False, False)
