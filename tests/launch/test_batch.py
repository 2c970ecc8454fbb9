"""batch.py on a small model: a batch that a replica dies in, one that is started again, and everything that is refused."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from engine.batch.driver import ReplicaState
from engine.batch.files import BatchFiles
from engine.batch.items import Batch, claim_folder
from engine.batch.journal import table
from engine.batch.locks import Shard, own_shard
from engine.batch.queue import Failure, Queue
from engine.batch.variants import Variant
from engine.config import ModelConfig
from engine.denoise.snapshot import kept_steps
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.files.latents import load_latents
from engine.files.trees import read_lines
from engine.files.whole import file_sha256
from engine.paths import REPOSITORY
from launch.arguments.batch import Options, add_arguments
from launch.batching.messages import halted
from launch.batching.replicas import check_cluster
from launch.batching.terminal import Terminal
from launch.batching.work import Work
from launch.cli.parser import parse_run
from launch.commands import batch
from launch.process.environment import LAUNCHER
from launch.ranks.launcher import too_few_gpus
from launch.ranks.ray_pool import NoRayError, RayPool
from tests.engine.batch import cases
from tests.engine.batch.cases import Clock, FakeReplica
from tests.launch.conftest import SMALL, Run
from tests.launch.forked import PATIENCE_SECONDS
from tests.launch.warm import running

SETTINGS = SMALL | {"sampler.num_steps": 6, "sampler.max_text_tokens": 20, "sampler.negative_prompt": "bad"}
PROMPTS = ("a red circle", "a blue star")
LONG = "x" * 10_000


pytestmark = pytest.mark.usefixtures("warm_ranks")


@pytest.fixture(autouse=True)
def one_thread_per_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in this process: models this small are slower on more."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture
def make_batch(run: Callable[..., Run], wan_folder: Path, suite: Path, tmp_path: Path) -> Callable[..., Run]:
    """`make_batch({setting: value}, *argv)`: batch.py on the small checkpoint, into tmp_path/out."""

    def call(settings: dict[str, object] | None = None, *argv: object) -> Run:
        return run("batch", *words(wan_folder, suite, tmp_path / "out", settings), *argv)

    return call


def words(folder: Path, suite: Path, out: Path, settings: dict[str, object] | None = None) -> list[str]:
    own = {"prompts": suite, "out": out, "methods": "freespec,direct", "seeds": 3, "snapshot_every": 2}
    chosen = {"model.path": folder} | SETTINGS | own | (settings or {})
    return [f"--{name}={value}" for name, value in chosen.items() if value is not None]


def rows_of(out: Path) -> dict[str, dict]:
    rows = list(read_lines(out / "manifest.jsonl"))
    found = {f"{row['method']}/{row['prompt_id']}-s{row['seed']}": row for row in rows}
    assert len(found) == len(rows)
    return found


def events_of(out: Path, name: str) -> list[dict]:
    return [event for event in read_lines(out / "logs/shard-1-of-1.jsonl") if event["event"] == name]


def ranks_of(driver: int) -> dict[int, dict[str, str]]:
    """The ranks that a driver has started: their environments by process id."""
    found = running() if driver == os.getpid() else {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if f"{LAUNCHER}={driver}" in variables:
            found[int(path.parent.name)] = dict(line.split("=", 1) for line in variables if "=" in line)
    return found


class Killer(threading.Thread):
    """Kills the rank that makes an item with SIGKILL, once that item has finished two of its six steps."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.out = out
        self.killed: list[int] = []

    def run(self) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while not (found := list(self.out.glob("*/*/unfinished/*.snapshot.safetensors"))):
            assert time.monotonic() < until
            time.sleep(0.005)
        method, item = found[0].parts[-4], found[0].name.removesuffix(".snapshot.safetensors")
        replica = next(e["replica"] for e in events_of(self.out, "started") if e["item"] == f"{method}/{item}")
        # A rank prints into a log of its own. Another rank may still be loading: killing that one would lose no item.
        log = self.out / "logs/shard-1-of-1" / f"{replica}-rank0.log"
        self.killed = [process for process in ranks_of(os.getpid()) if Path(f"/proc/{process}/fd/2").samefile(log)]
        for process in self.killed:
            os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(wan_folder: Path) -> dict[str, torch.Tensor]:
    """The latents of every item."""
    return made_in_a_loop(wan_folder)


def made_in_a_loop(wan_folder: Path, **settings: object) -> dict[str, torch.Tensor]:
    """The latents of every item, from the engine called in a loop."""
    given = [f"--{name}={value}" for name, value in ({"model.path": wan_folder} | SETTINGS | settings).items()]
    _, config = parse_run(given, name="test", description="", add_arguments=lambda parser: None)
    engine, found = LongVideoEngine(config), {}
    for method in ("freespec", "direct"):
        engine.use_method(Variant.of(config, method).config.method)
        for index, prompt in enumerate(PROMPTS):
            found[f"{method}/p000{index}-s3"] = engine.denoise(prompt, seed=3).latents
    engine.close()
    return found


def assert_whole(out: Path, expected: dict[str, torch.Tensor]) -> None:
    """Every item exactly once, every hash right, every latent equal to the bit."""
    rows = {label: row for label, row in rows_of(out).items() if row["status"] == "done"}
    assert set(rows) == set(expected)
    for label, row in rows.items():
        path = out / row["path"]
        assert file_sha256(path) == row["sha256"]
        latents = load_latents(path.parent.parent / "latents" / f"{path.stem}.safetensors")[0]
        assert torch.equal(latents, expected[label]), label
    files = [path for path in out.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".mp4" for path in files) == len(expected)
    assert [path for path in files if path.suffix == ".part" or "snapshot" in path.name] == []


def make_with_a_kill(make_batch: Callable[..., Run], out: Path) -> Run:
    """A batch on two replicas, one of which is killed in the middle of an item."""
    killer = Killer(out)
    killer.start()
    shown = make_batch({"replicas": 2, "keep_latents": True})
    assert ranks_of(os.getpid()) == {}  # at once: the next command finds their memory free
    killer.join()
    assert len(killer.killed) == 1, shown
    return shown


def test_a_replica_is_killed_and_everything_is_made(
    make_batch: Callable[..., Run],
    suite: Path,
    undisturbed: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a prompt among them that no attempt can make, and that the driver overlooks; then three more starts."""
    monkeypatch.setattr(batch, "look_at_prompts", lambda *_, **__: None)
    suite.write_text("\n".join([*PROMPTS, LONG]) + "\n")
    out, files = tmp_path / "out", BatchFiles(root=tmp_path / "out")
    shown = make_with_a_kill(make_batch, out)
    assert shown.code == 1, shown
    assert shown.err.startswith("error: 2 items failed for good, first freespec/p0002-s3: the prompt has "), shown.err
    assert shown.err.count("\n") == 1
    assert "4 of 6 items done (4 now), 2 in quarantine" in shown.out
    assert_whole(out, undisturbed)
    assert_one_was_lost(out)
    assert next(files.quarantine.glob("*.txt")).read_text().count("Traceback") == 1

    # Started again: nothing is made, and what was given up stays so.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    shown = make_batch({"replicas": 2, "keep_latents": True})
    assert (shown.code, "4 of 6 items done (0 now), 2 in quarantine" in shown.out) == (1, True), shown
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")} == before

    # A bit flips; the two that were given up are left out now; a replica of two ranks makes what is missing.
    suite.write_text("\n".join(PROMPTS) + "\n")
    path = out / rows_of(out)["direct/p0001-s3"]["path"]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    shown = make_batch({"nproc": 2, "keep_latents": True, "verify": "full"})
    assert (shown.code, "4 of 4 items done (1 now), 0 in quarantine" in shown.out) == (0, True), shown
    made = load_latents(path.parent.parent / "latents/p0001-s3.safetensors")[0]
    expected = undisturbed["direct/p0001-s3"]
    assert float((made - expected).norm() / expected.norm()) <= 1e-5

    # Another configuration in the same folder is refused by the names of what changed.
    line = make_batch({"sampler.num_steps": 7, "video.fps": 8}).error
    assert (
        "holds freespec videos of another configuration; changed: sampler.num_steps 6 -> 7, video.fps 16 -> 8;" in line
    )

    # And another terminal sees how it went.
    shown = make_batch({"status": out})
    assert shown.code == 0
    assert shown.out.startswith("shard-1-of-1: done; 4 items: 4 done, 0 running, 0 waiting, 0 quarantined; ")


def assert_one_was_lost(out: Path) -> None:
    """One attempt, and the next one of that item succeeded."""
    lost = [event for event in events_of(out, "failed") if event["kind"] == "lost"]
    assert [event["verdict"] for event in lost] == ["again"]
    assert "was ended by SIGKILL" in lost[0]["message"]
    sidecars = [json.loads(path.read_text()) for path in BatchFiles(root=out).sidecars()]
    assert {tree["item_id"]: tree["attempt"] for tree in sidecars if tree["attempt"] > 1} == {lost[0]["id"]: 2}


def test_a_driver_that_is_killed_leaves_nothing_running_and_the_next_goes_on(
    wan_folder: Path, suite: Path, undisturbed: dict[str, torch.Tensor], make_batch: Callable[..., Run], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = {"keep_latents": True}
    command = [sys.executable, "-m", "launch.batch", *words(wan_folder, suite, out, settings)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + PATIENCE_SECONDS
    while not list(out.glob("*/*/unfinished/*.snapshot.safetensors")):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.005)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 1
    process.kill()
    process.wait()
    while ranks_of(process.pid):
        assert time.monotonic() < until
        time.sleep(0.02)
    kept = list(out.glob("*/*/unfinished/*.snapshot.safetensors"))
    shown = make_batch({"status": out})
    assert shown.out.startswith("shard-1-of-1: lost; 4 items: "), shown

    shown = make_batch(settings)
    assert shown.code == 0, shown
    assert_whole(out, undisturbed)
    resumed = [json.loads(path.read_text())["run"]["resumed_at"] for path in BatchFiles(root=out).sidecars()]
    assert [step >= 2 for step in sorted(resumed)] == [False] * (4 - len(kept)) + [True] * len(kept)


def test_a_dry_run_counts_and_makes_nothing(make_batch: Callable[..., Run], tmp_path: Path) -> None:
    shown = make_batch({"shard": "2/3", "replicas": 3, "nproc": 2, "gpu": "h200"}, "--dry_run")
    assert (shown.code, shown.err) == (0, "")
    table = {line.split("  ")[1]: line.split("  ", 2)[2].strip() for line in shown.out.splitlines()}
    assert table["items"] == "4 = prompts x 1 seeds x 2 methods"
    pattern = r"(\d) items in shard-2-of-3, 0 done, \1 to make; the 3 shards have \d to \d items"
    assert re.fullmatch(pattern, table["this shard"])
    assert table["replicas"] == "3 of 2 ranks on this machine, cpu, float32"
    assert table["plan of each"].startswith("cfg x ring x ulysses (2, 1, 1): ")
    assert "predicted for H200" in table["GPU-hours"]
    assert "assumed 0.15 bits per pixel" in table["bytes"]
    assert "not known: give the GPU's name" in make_batch({}, "--dry_run").out
    assert not (tmp_path / "out").exists()


def test_every_item_is_given_the_same_frames_and_another_file_is_another_batch(
    make_batch: Callable[..., Run], tmp_path: Path
) -> None:
    for name, colour in (("a", 0), ("b", 255)):
        Image.new("RGB", (32, 32), (colour, 0, 0)).save(tmp_path / f"{name}.png")
    settings = {"methods": "direct", "given": f"last={tmp_path / 'a.png'}", "keep_latents": True}
    shown = make_batch(settings)
    assert shown.code == 0, shown
    assert "note: a.png is given at frames 13 to 16, as a still of 4 frames" in shown.out
    items = [json.loads(path.read_text()) for path in BatchFiles(root=tmp_path / "out").sidecars()]
    assert [item["run"]["given"]["images"][0]["file"] for item in items] == ["a.png"] * 2
    kept = [load_latents(path)[0][:, :, -1] for path in (tmp_path / "out").glob("*/*/latents/*.safetensors")]
    assert torch.equal(*kept)
    assert "2 done, 0 to make" in make_batch(settings, "--dry_run").out
    for other in (f"last={tmp_path / 'b.png'}", None):
        error = make_batch(settings | {"given": other}, "--dry_run").error
        assert "holds direct videos of another configuration; changed: given" in error


def test_variants_of_one_method_are_planned_as_such(make_batch: Callable[..., Run]) -> None:
    shown = make_batch({"methods": "freespec,GB=freespec:configs/ablation/gb.yaml"}, "--dry_run")
    assert "4 = prompts x 1 seeds x 2 methods" in shown.out, shown
    found = dict(re.findall(r"configuration +(\S+) (\w+)", shown.out))
    assert list(found) == ["freespec", "GB"]
    assert found["freespec"] != found["GB"]


def test_a_dry_run_counts_latents_that_are_kept_and_looks_at_the_folder(
    make_batch: Callable[..., Run], tmp_path: Path
) -> None:
    def line(out: str) -> str:
        return next(line for line in out.splitlines() if line.startswith("  bytes"))

    assert line(make_batch({}, "--dry_run").out) != line(make_batch({}, "--dry_run", "--keep_latents").out)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/batch.json").write_text('{"schema": -1}')
    assert "was written by another version of this program" in make_batch({}, "--dry_run").error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["batch.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("gpu", [None, "h200"])
def test_a_dry_run_on_a_driver_without_the_replicas_gpus(make_batch: Callable[..., Run], gpu: str | None) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    shown = make_batch({"ray": "auto", "gpus_per_replica": 1, "gpu": gpu}, "--dry_run")
    assert (shown.code, shown.err) == (0, "")
    assert "1 of 1 ranks on Ray at auto, cuda, bfloat16" in shown.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_driver_without_gpus_reports_a_full_disk(wan_folder: Path, tmp_path: Path) -> None:
    model = ModelConfig(path=str(wan_folder), device="cuda", dtype="bfloat16")
    driver = SimpleNamespace(
        halted=Failure("disk", "No space left on device"), queue=Queue.of(cases.batch().items), entries=[1]
    )
    config = replace(cases.config(), model=model)
    line = str(halted(driver, BatchFiles(root=tmp_path), config, keep_latents=False))
    assert line.startswith("No space left on device; 8 items are left; they need about ")


def test_a_dry_run_checks_what_a_run_would(make_batch: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs that are not there, and finished videos by their SHA-256 if that is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("engine.planner.arrange._find_gpu", lambda device: None)
    shown = make_batch({"gpus_per_replica": 2, "replicas": 2}, "--dry_run")
    assert "2 replicas of 2 ranks need 4 GPUs, and this machine has 1; use fewer" in shown.error


def test_a_dry_run_looks_at_finished_videos_as_the_run_would(make_batch: Callable[..., Run], tmp_path: Path) -> None:
    """Their sizes, or their SHA-256; and latents that were not kept cannot be kept later."""
    out = make_pretended(make_batch, tmp_path)
    assert "2 done, 2 to make" in make_batch({}, "--dry_run").out
    path = next(out.glob("*/*/videos/*.mp4"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "2 done, 2 to make" in make_batch({"verify": "size"}, "--dry_run").out
    assert "1 done, 3 to make" in make_batch({}, "--dry_run").out
    shown = make_batch({"verify": "size"}, "--dry_run", "--keep_latents")
    assert "2 of 2 finished items were made without --keep_latents and stay without latents" in shown.out


def make_pretended(make_batch: Callable[..., Run], tmp_path: Path) -> Path:
    """Two of the four items of the batch, with arbitrary bytes."""
    found: list[Batch] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "say_plan", lambda config, options, given, mine, arrangement: found.append(given))
        make_batch({}, "--dry_run")
    files = BatchFiles(root=tmp_path / "out")
    files.root.mkdir()
    claim_folder(files.root, found[0])
    for item in found[0].items[:2]:
        cases.write_item(files, item)
    return files.root


def test_a_replica_that_was_given_up_has_its_line_in_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = BatchFiles(root=tmp_path)
    replica = FakeReplica("replica-1", Clock())
    seat = ReplicaState(
        replica=replica, state="gone", starts=3, failure=Failure("mistake", "out of memory while loading")
    )
    driver = SimpleNamespace(halted=None, queue=Queue.of(()), entries=[seat])
    work = Work(done=(), given_up=(), todo=())
    batch.finish(SimpleNamespace(keep_latents=False), files, cases.config(), work, driver)
    assert "replica-1 was given up after 3 starts: out of memory while loading\n" in capsys.readouterr().out


def stop_a_rank(out: Path, stopped: list[int]) -> None:
    """SIGSTOP to rank 1 in the middle of the first item, like a rank whose GPU hangs."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not list(out.glob("*/*/unfinished/*.snapshot.safetensors")):
        assert time.monotonic() < until
        time.sleep(0.005)
    for process, environment in ranks_of(os.getpid()).items():
        if environment["RANK"] == "1":
            os.kill(process, signal.SIGSTOP)
            stopped.append(process)


def test_a_rank_that_hangs_costs_one_attempt(
    make_batch: Callable[..., Run], suite: Path, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    suite.write_text(f"{PROMPTS[0]}\n")
    out, stopped = tmp_path / "out", []
    stopper = threading.Thread(target=stop_a_rank, args=(out, stopped), daemon=True)
    stopper.start()
    shown = make_batch({"nproc": 2, "item_timeout": 20, "keep_latents": True, "sampler.num_steps": 6})
    stopper.join()
    assert (shown.code, len(stopped)) == (0, 1), shown
    (failed,) = events_of(out, "failed")
    assert (failed["kind"], failed["verdict"]) == ("time", "again")
    assert failed["message"].startswith("took longer than 20 s and was ended at step ")
    assert len(rows_of(out)) == 2
    assert not Path(f"/proc/{stopped[0]}").exists()
    made = load_latents(next(out.glob(f"{failed['item'].partition('/')[0]}/*/latents/p0000-s3.safetensors")))[0]
    expected = undisturbed[failed["item"]]
    assert float((made - expected).norm() / expected.norm()) <= 1e-5


def test_a_cluster_with_gpus_is_not_used_without_them_in_silence(wan_folder: Path) -> None:
    def options(*words: str) -> Options:
        given = ["--prompts=x", "--out=y", "--ray=auto", f"--model.path={wan_folder}", *words]
        return Options.of(*parse_run(given, name="t", description="", add_arguments=add_arguments))

    with pytest.raises(
        UserError, match=r"auto has 8 GPUs, and this batch would run on CPUs; give --gpus_per_replica N"
    ):
        check_cluster(options(), 8.0)
    check_cluster(options(), 0.0)
    check_cluster(options("--model.device=cpu"), 8.0)
    check_cluster(options("--gpus_per_replica=2"), 8.0)
    assert (
        too_few_gpus(8.0, 8, on_cpu=False)
        is too_few_gpus(2.0, 8, on_cpu=True)
        is too_few_gpus(0.0, 8, on_cpu=False)
        is None
    )
    line = too_few_gpus(2.0, 8, on_cpu=False)
    assert line == "8 ranks need 8 GPUs, and the cluster has 2; give --nproc 2, or --model.device cpu to run on CPUs"


def status_of(num_replicas: int) -> dict:
    seat = {"state": "busy", "seconds": 5.0, "item": "direct/p0000-s0", "step": 2, "total": 6, "done": 1}
    return {
        "state": "running",
        "seconds": 90.0,
        "eta": 4000.0,
        "counts": {"done": 3, "running": 1, "waiting": 2, "quarantined": 0},
        "replicas": [{"name": f"replica-{i}", **seat} for i in range(num_replicas)],
        "failures": [],
    }


def test_a_table_says_what_is_done_and_how_long_the_rest_takes() -> None:
    lines = table("batch", status_of(2), note="replica-0: waits").splitlines()
    assert lines[0] == (
        "batch: running; 6 items: 3 done, 1 running, 2 waiting, 0 quarantined; 1 min 30 s so far, 1 h 6 min left"
    )
    assert lines[2].split() == ["replica-0", "busy", "direct/p0000-s0", "2/6", "5.0", "s", "1"]
    assert lines[-1] == "  replica-0: waits"


def test_a_table_fits_its_terminal_and_the_last_note_stays_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", screen := io.StringIO())
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((40, 10)))
    terminal = Terminal(total=6)
    terminal.event(
        {"event": "note", "time": "2026-11-28T04:19:17", "replica": "replica-0", "message": "waits for GPUs"}
    )
    terminal.status(status_of(256))
    first = screen.getvalue().splitlines()
    assert len(first) == 9
    assert max(map(len, first)) < 40
    assert first[-1] == "  04:19:17 replica-0: waits for GPUs"
    assert first[-2] == "  and 251 more: 251 busy"
    terminal.status(status_of(2))
    assert screen.getvalue()[len("\n".join(first)) + 1 :].startswith("\x1b[9F\x1b[J")  # over the last one


def test_driver_ignores_rank_of_the_environment(wan_folder: Path, suite: Path, tmp_path: Path) -> None:
    """As in a pod of a training operator: this process alone makes and reports the batch."""
    suite.write_text(f"{PROMPTS[0]}\n")
    as_rank = os.environ | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}
    ignored = (
        "RANK 1 and WORLD_SIZE 2 of the environment are ignored: batch starts its own ranks (--nproc, --replicas)\n"
    )
    command = [sys.executable, "-m", "launch.batch", *words(wan_folder, suite, tmp_path / "out", {"methods": "direct"})]
    ended = subprocess.run(command, cwd=REPOSITORY, env=as_rank, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, ignored), ended
    assert "1 of 1 items done (1 now), 0 in quarantine" in ended.stdout
    for name, own in (("batch", ignored), ("plan", "ignored: plan is one process\n")):
        words_of = [sys.executable, "-m", f"launch.{name}", "--nonsense"]
        ended = subprocess.run(words_of, cwd=REPOSITORY, env=as_rank, capture_output=True, text=True, check=False)
        assert ended.returncode == 2
        assert f"{own}error: unknown setting nonsense; " in ended.stderr, ended
    alone = os.environ | {"RANK": "0", "WORLD_SIZE": "1"}
    ended = subprocess.run(words_of, cwd=REPOSITORY, env=alone, capture_output=True, text=True, check=False)
    assert ended.stderr.startswith("error: "), ended


def test_two_drivers_on_one_shard(make_batch: Callable[..., Run], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with own_shard(out, Shard(index=1, count=2)):
        line = make_batch({"shard": "1/2"}).error
        assert line.startswith(f"another driver works on shard-1-of-2 of {out}: process {os.getpid()} on ")
        assert "all drivers of a folder need the same n" in make_batch().error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": None}, "--prompts is missing; see --help"),
        ({"out": None}, "--out is missing; see --help"),
        ({"prompts": "nowhere.txt"}, "cannot read --prompts nowhere.txt: No such file or directory"),
        ({"methods": "freespec,freespec"}, "two variants have the label freespec; name one"),
        ({"methods": "freespek"}, "freespek"),
        ({"extend": "nowhere.mp4"}, "cannot read --extend nowhere.mp4: No such file or directory"),
        ({"given": "last"}, "--given 'last' is not WHERE=FILE"),
        ({"seeds": "0,x"}, "--seeds must be whole numbers with commas between them, got '0,x'"),
        ({"seeds": "-1"}, "--seeds: a seed must lie in [0, 2**63), got -1"),
        ({"nproc": 0}, "--nproc must be 1 or more, got 0"),
        ({"nproc": 2, "gpus_per_replica": 4}, "contradict each other: every rank has one GPU; give one of them"),
        ({"gpus_per_replica": 1, "model.device": "cpu"}, "asks for GPUs, but the model would run on the CPU"),
        ({"shard": "3/2"}, "--shard must be i/n with 1 <= i <= n, such as 1/4 to 4/4, got '3/2'"),
        ({"item_timeout": 0}, "--item_timeout must be more than 0 seconds, got 0.0"),
        (
            {"snapshot_every": -1},
            "--snapshot_every must be 0 (only when stopped, and before decoding) or more, got -1",
        ),
        ({"video.num_frames": 18}, "video.num_frames must be 4k + 1, got 18; the nearest are 17 and 21"),
        ({"status": "nowhere"}, "nowhere holds no batch; give the --out folder of a batch"),
        ({"status": "x" * 300}, "cannot look into --status xxx"),
        ({"status": ""}, "--status is empty; give the --out folder of a batch"),
        ({"methods": ""}, "--methods is empty; give a value, or leave it out"),
        ({"seeds": ""}, "--seeds is empty; give a value, or leave it out"),
        ({"out": ""}, "--out is empty; give a value, or leave it out"),
        ({"ray": "ray://host:10001"}, "is a Ray client's address"),
    ],
)
def test_mistakes_are_one_line(make_batch: Callable[..., Run], settings: dict[str, object], message: str) -> None:
    assert message in make_batch(settings).error


def test_an_output_folder_that_cannot_be_written(make_batch: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = make_batch({"out": tmp_path / "file/out"}).error
    assert line == f"cannot write to the folder {tmp_path / 'file/out'}: {tmp_path / 'file'} is not a folder"
    assert make_batch({"out": tmp_path / "file"}, "--dry_run").error.endswith("file is not a folder")
    assert make_batch({"out": tmp_path / ("x" * 300)}, "--dry_run").error.endswith(": File name too long")
    # A folder that takes no files, whoever asks.
    assert make_batch({"out": "/proc/sys"}).error.startswith("cannot write to the folder /proc/sys: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_log_and_a_status_that_cannot_be_written_end_nothing(
    make_batch: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do the logs of ranks; each is reported once."""
    out = tmp_path / "out"
    log = out / "logs/shard-1-of-1.jsonl"
    log.parent.mkdir(parents=True)
    log.symlink_to("/dev/full")
    (out / "logs/shard-1-of-1").write_text("where a rank's folder should be")

    def stale(path: Path, tree: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("engine.batch.journal.write_json", stale)
    shown = make_batch({"methods": "direct"})
    assert shown.code == 0, shown
    assert "2 of 2 items done (2 now), 0 in quarantine" in shown.out
    warnings = sorted(shown.err.splitlines())
    assert [line.split(";")[0] for line in warnings] == [
        f"warning: cannot write {log}: No space left on device",
        f"warning: cannot write {out / 'status/shard-1-of-1.json'}: Stale file handle",
    ], shown
    assert (
        f"cannot write {out / 'logs/shard-1-of-1/replica-0-rank0.log'}: Not a directory; the output of this rank is lost"
        in shown.out
    )


def test_a_disk_that_is_full_when_the_driver_writes_is_one_line(
    make_batch: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only a video can be what no longer fits; nothing is started then."""

    def full(path: Path, tree: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("engine.batch.items.write_json", full)
    shown = make_batch()
    assert shown.code == 2, shown
    assert shown.err.startswith(f"error: cannot write to {tmp_path / 'out'}: No space left on device ("), shown
    assert shown.err.endswith("; free some space, or choose another folder; the same command continues\n"), shown
    assert shown.err.count("\n") == 1
    assert ranks_of(os.getpid()) == {}


# Whatever Python does first: from two finished items on, nothing is flushed to the disk any more, until the file `mended` is there.
FAULTY = """
import errno, glob, os
flush, number, root = os.fsync, int(os.environ["FAULT"]), os.environ["FAULT_ROOT"]
def fsync(descriptor):
    if len(glob.glob(root + "/*/*/videos/*.json")) >= 2 and not os.path.exists(root + "/mended"):
        raise OSError(number, os.strerror(number))
    return flush(descriptor)
os.fsync = fsync
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ESTALE", "EPERM", "EACCES", "EIO", "ETIMEDOUT"])
def test_storage_that_fails_for_a_while_halts_a_batch_and_the_same_command_goes_on(
    wan_folder: Path, suite: Path, undisturbed: dict[str, torch.Tensor], tmp_path: Path, name: str
) -> None:
    """Driver and ranks are real processes; no item is given up, no attempt is counted, and nothing is lost."""
    out, number = tmp_path / "out", getattr(errno, name)
    (tmp_path / "sitecustomize.py").write_text(FAULTY)
    command = [sys.executable, "-m", "launch.batch", *words(wan_folder, suite, out, {"keep_latents": True})]
    faulty = os.environ | {"FAULT": str(number), "FAULT_ROOT": str(out), "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, cwd=REPOSITORY, env=faulty, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended
    *warnings, line = ended.stderr.splitlines()
    assert line.startswith("error: "), ended
    assert os.strerror(number) in line
    assert line.endswith(
        "; 2 items are left; see that the folder can be read and written again; the same command continues"
    )
    assert [warning.split(":")[0] for warning in warnings] == ["warning"] * len(warnings)
    assert len(warnings) <= 2  # the log and the status, once each
    assert list((out / "quarantine").glob("*")) == []
    assert len(events_of(out, "ready")) == 1  # no replica was rebuilt for it
    (out / "mended").touch()
    ended = subprocess.run(command, cwd=REPOSITORY, env=faulty, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    (out / "mended").unlink()
    assert_whole(out, undisturbed)
    assert {json.loads(path.read_text())["attempt"] for path in BatchFiles(root=out).sidecars()} == {1}


@pytest.mark.slow
def test_folders_that_may_not_be_changed_for_a_while(
    make_batch: Callable[..., Run], undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """As an administrator's `chattr +i` has it, after one of four items."""
    out = tmp_path / "out"
    out.mkdir()
    if subprocess.run(["chattr", "+i", out], capture_output=True, check=False).returncode:
        pytest.skip("needs a superuser and a file system with attributes")
    subprocess.run(["chattr", "-i", out], check=True)
    kept: list[Path] = []

    def forbid() -> None:
        while not (found := list(out.glob("*/*/videos/*.json"))):
            time.sleep(0.01)
        kept.extend(out.glob("*/*/videos"))
        assert found
        subprocess.run(["chattr", "+i", *kept], check=True)

    thread = threading.Thread(target=forbid, daemon=True)
    thread.start()
    try:
        shown = make_batch({"keep_latents": True, "methods": "direct,freespec"})
        thread.join()
    finally:
        subprocess.run(["chattr", "-i", *out.glob("*/*/videos")], check=True)
    assert shown.code == 2, shown
    assert shown.err.count("\n") == 1
    assert "Operation not permitted" in shown.err
    assert shown.err.endswith("; the same command continues\n")
    assert list((out / "quarantine").glob("*")) == []
    assert make_batch({"keep_latents": True, "methods": "direct,freespec"}).code == 0
    assert_whole(out, undisturbed)


@pytest.mark.slow
def test_a_rank_that_is_taken_away_again_and_again_costs_its_item_nothing(
    make_batch: Callable[..., Run], suite: Path, wan_folder: Path, tmp_path: Path
) -> None:
    """SIGKILL after 1, 4 and 7 of the 20 steps of one item, as on a node that may be taken away."""
    suite.write_text(f"{PROMPTS[0]}\n")
    out, killed = tmp_path / "out", []
    given = {"methods": "direct", "keep_latents": True, "snapshot_every": 1, "sampler.num_steps": 20}

    def kill() -> None:
        for steps in (1, 4, 7):
            while not any(kept_steps(path) >= steps for path in out.glob("*/*/unfinished/*.snapshot.safetensors")):
                time.sleep(0.005)
            for process in ranks_of(os.getpid()):
                os.kill(process, signal.SIGKILL)
                killed.append(process)
            while set(killed) & set(ranks_of(os.getpid())):
                time.sleep(0.005)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    shown = make_batch(given)
    killer.join()
    assert (shown.code, len(killed)) == (0, 3), shown
    assert [event["verdict"] for event in events_of(out, "failed")] == ["again"] * 3
    _, config = parse_run(
        [
            f"--{name}={value}"
            for name, value in ({"model.path": wan_folder} | SETTINGS | {"sampler.num_steps": 20}).items()
        ],
        name="test",
        description="",
        add_arguments=lambda parser: None,
    )
    engine = LongVideoEngine(Variant.of(config, "direct").config)
    expected = engine.denoise(PROMPTS[0], seed=3).latents
    engine.close()
    assert_whole(out, {"direct/p0000-s3": expected})


FULL = """
set -e
mount -t tmpfs -o size=$1 none "$2"
shift
out="$1"
shift
"$@" && exit 10
test "$(ls "$out"/*/*/videos/*.json | wc -l)" -gt 0 || exit 11
mount -o remount,size=64m "$out"
"$@" || exit 12
mount -o remount,ro "$out"
"$@" && exit 13
exit 0
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_grows_and_is_read_only_then(wan_folder: Path, suite: Path, tmp_path: Path) -> None:
    """A real file system of a few pages, in a mount namespace of its own."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody make mount namespaces")
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "launch.batch", *words(wan_folder, suite, out, {"seeds": "0,1,2"})]
    shell = [*unshare, "bash", "-c", FULL, "full", "200k", out, *command]
    ended = subprocess.run(list(map(str, shell)), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended
    full, read_only = ended.stderr.splitlines()
    assert full.startswith("error: "), ended
    assert "No space left on device" in full
    assert full.endswith("the same command continues")
    assert read_only == f"error: cannot write to the folder {out}: Read-only file system"
    assert "12 of 12 items done (" in ended.stdout


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NoRayError, match=r"not installed; install it with: pip install '.\[ray\]'"):
        with RayPool("auto", cpus=1, log=None):
            pass


def test_a_disk_without_room_is_found_before_anything_is_loaded(
    make_batch: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("launch.commands.batch.make", lambda *_: 0)
    free = [1000]
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free[0]))
    error = make_batch({}).error
    assert error.startswith(f"{tmp_path / 'out'} has 1000 bytes free, and at least ")
    assert error.endswith(
        " are needed for the items in progress; free some space, or choose another folder; the same command continues"
    )
    # Enough for one item, and not for all four.
    free[0] = round(1024 * float(error.split("at least ")[1].split(" KiB")[0])) + 100
    shown = make_batch({})
    assert (shown.code, shown.err) == (0, "")
    assert re.match(rf"{tmp_path / 'out'} has [\d.]+ KiB free, and 4 items take about ", shown.out)


def test_damaged_sidecars_and_a_flipped_byte_cost_their_items_alone(
    make_batch: Callable[..., Run], undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Whatever a failing disk does to a folder, the same command makes those items again, and says so."""
    out, kept = tmp_path / "out", {"keep_latents": True}
    assert make_batch(kept).code == 0
    sidecars = sorted(out.glob("*/*/videos/*.json"))
    expected = {path: path.with_suffix(".mp4").read_bytes() for path in sidecars}
    data = sidecars[0].read_bytes()
    sidecars[0].write_bytes(data[: len(data) // 2])
    sidecars[1].write_bytes(b"\0" * len(data))
    flipped = bytearray(expected[sidecars[2]])
    flipped[len(flipped) // 2] ^= 1
    sidecars[2].with_suffix(".mp4").write_bytes(flipped)
    before = sidecars[3].stat().st_mtime_ns
    shown = make_batch(
        kept | {"verify": "size"}
    )  # the flipped byte costs the reading of every video, and is found by default
    assert "4 items: 2 done, 2 to make" in shown.out, shown
    again = make_batch(kept)
    assert "4 items: 3 done, 1 to make" in again.out, again
    lines = [line.partition("; it is made again")[0] for line in (shown.err + again.err).splitlines()]
    assert [line.partition(" is not ")[0] for line in lines] == [
        *map(str, sidecars[:2]),
        str(sidecars[2].with_suffix(".mp4")),
    ]
    assert {path: path.with_suffix(".mp4").read_bytes() for path in sidecars} == expected
    assert sidecars[3].stat().st_mtime_ns == before
    assert_whole(out, undisturbed)


def test_a_driver_that_died_ahead_of_this_clock_blocks_nothing(make_batch: Callable[..., Run], tmp_path: Path) -> None:
    """All that it has left is a status of another host, which says that it runs."""
    out = tmp_path / "out"
    (out / "status").mkdir(parents=True)
    status = {"time": time.time() + 3600.4, "host": "other", "pid": 12, "state": "running", "seconds": 1.0, "eta": 9.0}
    (out / "status/shard-1-of-1.json").write_text(
        json.dumps(status | {"counts": {"done": 1}, "replicas": [], "failures": []})
    )
    assert make_batch({"status": out}).out.startswith("shard-1-of-1: lost; ")
    shown = make_batch({"methods": "direct", "dry_run": "false"})
    assert shown.code == 0, shown
    assert shown.err.startswith(
        "taking over shard-1-of-1 from process 12 on other, which ended without cleaning up, with a clock 3"
    )
    assert list((out / "locks").iterdir()) == []


def test_without_locks_a_batch_says_so_once_and_a_second_is_refused(
    make_batch: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr("fcntl.flock", fail)
    out = tmp_path / "out"
    shown = make_batch({"methods": "direct"})
    assert shown.code == 0, shown
    assert shown.err == (
        f"{out / 'locks'} is on a file system without locks; holders are identified by a heartbeat instead\n"
    )
    with own_shard(out, Shard(), say=lambda _: None):
        assert f"another driver works on shard-1-of-1 of {out}: process {os.getpid()} on " in make_batch().error
