"""Replicas and ranks on a real Ray of this machine: a rank is killed, everything is made, nothing listens beyond loopback."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.batch.files import BatchFiles
from launch.process.argv import without
from launch.process.environment import NODE
from tests.launch.conftest import Run
from tests.launch.forked import PATIENCE_SECONDS
from tests.launch.test_batch import events_of, undisturbed, words
from tests.launch.test_ranks import SCRIPT, assert_same, latents_of, prompted
from tests.launch.test_serve import words as served

pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = pytest.mark.slow

__all__ = ["undisturbed"]

# A cluster as a person has it: started by somebody else, and there before and after the run.
CLUSTER = """
import sys
import ray
gpus = int(sys.argv[1])
context = ray.init("local", num_cpus=4, num_gpus=gpus, include_dashboard=False, object_store_memory=100 * 2**20, logging_level="error")
print("at", context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def one_thread_per_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in this process: models this small are slower on more."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What Ray finds in the environment: loopback, and a token of this test's own."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    return loopback | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


@pytest.fixture
def as_a_member(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who connect to the cluster know what it was started with."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


@contextlib.contextmanager
def open_cluster(settings: dict[str, str], *, gpus: int) -> Iterator[str]:
    """The address of a cluster for the block, with a fake number of GPUs."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-c", CLUSTER, str(gpus)]
    process = subprocess.Popen(command, **pipes, text=True, env=os.environ | settings)
    found = next((line.split()[1] for line in process.stdout if line.startswith("at ")), None)
    assert found is not None, process.wait()
    yield found
    process.communicate("")


@pytest.fixture(scope="module")
def cluster(settings: dict[str, str]) -> Iterator[str]:
    """Its address."""
    with open_cluster(settings, gpus=0) as address:
        yield address


def ranks_on_ray() -> dict[int, int]:
    """Rank and process id of every rank that an actor on this machine has started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            lines = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        variables = dict(line.split("=", 1) for line in lines if "=" in line)
        if NODE in variables and "RANK" in variables:
            found[int(variables["RANK"])] = int(path.parent.name)
    return found


def kill_a_rank(out: Path) -> None:
    """SIGKILL to rank 1 in the middle of an item."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not list(out.glob("*/*/unfinished/*.snapshot.safetensors")):
        assert time.monotonic() < until
        time.sleep(0.005)
    os.kill(ranks_on_ray()[1], signal.SIGKILL)


@pytest.mark.usefixtures("as_a_member")
def test_a_rank_of_a_replica_on_ray_is_killed_and_everything_is_made(
    run: Callable[..., Run],
    cluster: str,
    wan_folder: Path,
    undisturbed: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    suite, out = tmp_path / "prompts.txt", tmp_path / "out"
    suite.write_text("a red circle\n")
    killer = threading.Thread(target=kill_a_rank, args=(out,), daemon=True)
    killer.start()
    shown = run("batch", *words(wan_folder, suite, out, {"ray": cluster, "nproc": 2, "keep_latents": True}))
    killer.join()
    assert (shown.code, shown.err) == (0, ""), shown
    (lost,) = events_of(out, "failed")
    assert "rank 1 of 2 (process " in lost["message"]
    assert "was ended by SIGKILL" in lost["message"]
    assert len(events_of(out, "ready")) == 2
    expected = {label: latents for label, latents in undisturbed.items() if "p0000" in label}
    for path in BatchFiles(root=out).sidecars():
        record = json.loads(path.read_text())
        assert record["run"]["parallel"]["ranks"] == 2
        made = BatchFiles(root=out).root / record["method"] / record["config_id"] / "latents/p0000-s3.safetensors"
        assert_same(made, expected[f"{record['method']}/p0000-s3"])
    assert ranks_on_ray() == {}
    # Bit for bit the same as two ranks that nothing has happened to, which need no cluster.
    assert whole_on_two_ranks(run, wan_folder, suite, tmp_path) == hashes(out)


def whole_on_two_ranks(run: Callable[..., Run], folder: Path, suite: Path, tmp_path: Path) -> dict[str, str]:
    out = tmp_path / "whole"
    shown = run("batch", *words(folder, suite, out, {"nproc": 2, "keep_latents": True}))
    assert shown.code == 0, shown
    return hashes(out)


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of the latents of every item."""
    records = [json.loads(path.read_text()) for path in BatchFiles(root=out).sidecars()]
    return {record["item_id"]: record["latents"]["sha256"] for record in records}


@pytest.mark.usefixtures("as_a_member")
def test_generate_on_ray_is_generate(cluster: str, wan_folder: Path, tmp_path: Path) -> None:
    """The same line, the same files, the same video; and a mistake is the same line."""
    commands = {
        "ray": [*prompted(wan_folder, tmp_path / "ray.mp4"), "--nproc=2", f"--ray={cluster}"],
        "here": [*prompted(wan_folder, tmp_path / "here.mp4"), "--nproc=2"],
        "wrong": [
            *prompted(wan_folder, tmp_path / "wrong.mp4"),
            "--nproc=2",
            "--ray",
            cluster,
            "--parallel.cfg=1",
            "--parallel.ring=3",
        ],
    }
    ended = {}
    for name, command in commands.items():
        words = [sys.executable, str(SCRIPT), *command]
        ended[name] = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ranks_on_ray() == {}, name
    assert (ended["ray"].returncode, ended["ray"].stderr) == (0, ""), ended["ray"]
    assert ended["ray"].stdout.startswith(f"{tmp_path / 'ray.mp4'}: 17 frames; denoised in ")
    assert ended["ray"].stdout.count("\n") == ended["here"].stdout.count("\n") == 1
    assert torch.equal(latents_of(tmp_path / "ray.mp4"), latents_of(tmp_path / "here.mp4"))
    assert ended["wrong"].returncode == 2
    assert ended["wrong"].stderr.startswith("error: 2 ranks cannot be arranged with ")
    assert ended["wrong"].stderr.count("\n") == 1


def wait_for_ranks(process: subprocess.Popen[str], folder: Path | None) -> None:
    """Until a command has started two ranks and, with a folder, they have saved steps there."""
    until = time.monotonic() + PATIENCE_SECONDS
    while len(ranks_on_ray()) < 2 or not (folder is None or list(folder.rglob("*.snapshot.safetensors"))):
        assert time.monotonic() < until
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)


@pytest.mark.usefixtures("as_a_member")
@pytest.mark.parametrize("early", [True, False])
def test_an_interrupted_command_ends_after_its_ranks(
    cluster: str, wan_folder: Path, tmp_path: Path, early: bool
) -> None:
    """Ctrl-C while the ranks import torch, and while they make steps, which rank 0 saves."""
    command = [*prompted(wan_folder, tmp_path / "a.mp4"), "--nproc=2", f"--ray={cluster}", "--sampler.num_steps=400"]
    with subprocess.Popen([sys.executable, str(SCRIPT), *command], stderr=subprocess.PIPE, text=True) as process:
        wait_for_ranks(process, None if early else tmp_path)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait() == 130, said
    assert ranks_on_ray() == {}
    assert said.startswith("stopped"), said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("as_a_member")
def test_an_interrupted_service_continues_its_job(cluster: str, wan_folder: Path, tmp_path: Path) -> None:
    """Ctrl-C with two ranks on the cluster: none is left, and the next start continues from the step that rank 0 saved."""
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    settings = {"ray": cluster, "nproc": 2, "prompts": prompts, "sampler.num_steps": 100}
    command = [sys.executable, str(SCRIPT.with_name("serve.py")), *served(wan_folder, out, **settings)]
    for left in (1, 0):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            wait_for_ranks(process, out)
            if left == 0:
                assert any(": done in " in line for line in process.stdout), process.stderr.read()
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
        assert (process.returncode, said) == (130, f"stopped: {left} jobs are left; the same command continues\n")
        assert ranks_on_ray() == {}
    (sidecar,) = BatchFiles(root=out).sidecars()
    assert json.loads(sidecar.read_text())["run"]["resumed_at"] > 0


def status_of(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status; empty for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def descendants(pid: int) -> list[int]:
    parents = {int(path.name): status_of(int(path.name)).get("PPid") for path in Path("/proc").glob("[0-9]*")}
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == str(each)]
    return found


def test_sigterm_to_all_processes_of_a_job_leaves_what_rank_0_saves(wan_folder: Path, tmp_path: Path) -> None:
    """As scancel does, on a Ray of this command: bridge and Ray hold the signal back, since ranks die with their actors."""
    command = [*prompted(wan_folder, tmp_path / "a.mp4"), "--nproc=2", "--ray=local", "--sampler.num_steps=400"]
    with subprocess.Popen([sys.executable, str(SCRIPT), *command], stderr=subprocess.PIPE, text=True) as process:
        wait_for_ranks(process, tmp_path)
        every = descendants(process.pid)
        ranks = {*ranks_on_ray().values()} & {*every}
        blocked = {pid: int(status_of(pid)["SigBlk"], 16) >> signal.SIGTERM - 1 & 1 for pid in every}
        assert {pid for pid in every if not blocked[pid]} == ranks | {process.pid}
        for pid in every:
            os.kill(pid, signal.SIGTERM)
        said = process.stderr.read()
        assert process.wait() == 143, said
    assert said.startswith("stopped: after step "), said
    assert said.count("\n") == 1
    # Ray's own too: those of a Ray whose bridge is killed stay for a minute and a half.
    assert [status_of(pid)["Name"] for pid in every if status_of(pid).get("State", "Z")[0] != "Z"] == []


@pytest.mark.usefixtures("as_a_member")
def test_a_lost_actor_ends_with_its_rank_before_the_command_does(
    cluster: str, wan_folder: Path, tmp_path: Path
) -> None:
    """One line, and no wait for what a task on the actor's node sees to have ended."""
    command = [*prompted(wan_folder, tmp_path / "a.mp4"), "--nproc=2", f"--ray={cluster}", "--sampler.num_steps=400"]
    with subprocess.Popen([sys.executable, str(SCRIPT), *command], stderr=subprocess.PIPE, text=True) as process:
        wait_for_ranks(process, tmp_path)
        os.kill(int(status_of(ranks_on_ray()[1])["PPid"]), signal.SIGKILL)
        said = process.stderr.read()
        assert process.wait() == 1, said
    assert ranks_on_ray() == {}
    assert said.startswith("error: the Ray actor of rank 1 of 2: "), said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("as_a_member")
def test_another_token_is_refused_in_one_line(
    run: Callable[..., Run], cluster: str, wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster's authentication is on: whoever has not its token gets nothing made."""
    other = tmp_path / "other"
    other.write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(other))
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    shown = run("batch", *words(wan_folder, tmp_path / "prompts.txt", tmp_path / "out", {"ray": cluster}))
    assert shown.code == 2
    assert f"the Ray cluster at {cluster} requires its token" in shown.err
    assert list((tmp_path / "out").glob("*/*/videos/*")) == []


@pytest.mark.usefixtures("as_a_member")
def test_gpus_of_a_cluster_are_not_left_aside_in_silence(
    run: Callable[..., Run], settings: dict[str, str], wan_folder: Path, tmp_path: Path
) -> None:
    """One line each, and nothing is noted in the folder, where the configuration for GPUs may still go."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    out = tmp_path / "out"
    with open_cluster(settings, gpus=2) as address:
        shown = run("batch", *words(wan_folder, tmp_path / "prompts.txt", out, {"ray": address}))
        assert (shown.code, shown.err.count("\n")) == (2, 1), shown
        assert f"the Ray cluster at {address} has 2 GPUs, and this batch would run on CPUs; give " in shown.err
        assert not (out / "batch.json").exists()
        command = [*prompted(wan_folder, tmp_path / "a.mp4"), "--nproc=3", f"--ray={address}"]
        command = [word for word in command if not word.startswith("--model.device")]
        ended = subprocess.run(
            [sys.executable, str(SCRIPT), *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (ended.returncode, ended.stderr) == (
            2,
            "error: 3 ranks need 3 GPUs, and the cluster has 2; give --nproc 2, or --model.device cpu to run on CPUs\n",
        )


def test_no_cluster_is_one_line(run: Callable[..., Run], wan_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = words(wan_folder, tmp_path / "prompts.txt", tmp_path / "out", {"ray": "127.0.0.1:1"})
    shown = run("batch", *given)
    assert (shown.code, shown.err.count("\n")) == (2, 1), shown
    assert shown.err.startswith("error: no Ray cluster answers at 127.0.0.1:1 ([Errno 111] Connection refused); "), (
        shown
    )
    assert "start one with: ray start --head" in shown.err


def test_an_option_is_taken_out_with_its_value() -> None:
    assert without(["a", "--ray", "auto", "--b=1", "--ray=x", "--ray", "--c"], "--ray") == ["a", "--b=1", "--c"]
