"""evaluate.py as a person uses it: from a batch's folder to the report, VBench played by a fake, and its mistakes."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from engine.files.locks import hold
from engine.media.write_video import open_video
from evaluation.scoring import score
from evaluation.vbench.dimensions import DIMENSIONS
from launch.cli.start import run_here
from launch.process.exit_codes import run_command
from metrics.proxies import PROXIES
from tests.evaluation.batches import PROMPTS, make_batch, write_sidecar
from tests.evaluation.scoring.test_measures import write_clip
from tests.evaluation.vbench.fake_vbench import calls, ends, forget_hashes, make_checkout, make_weights, set_plan
from tests.launch.conftest import Run
from tests.metrics.test_events import show


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A batch's folder."""
    return make_batch(tmp_path / "runs")


@pytest.fixture
def vbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words that make evaluate.py run the fake; its home is tmp_path/home."""
    forget_hashes(monkeypatch)
    checkout, home = make_checkout(tmp_path / "VBench"), make_weights(tmp_path / "home")
    return ["--vbench", str(checkout), "--python", sys.executable, "--weights", str(home), "--device", "cpu"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies that cost nothing; their own tests measure."""
    monkeypatch.setattr("metrics.proxies.proxies", lambda frames, fps: dict.fromkeys(PROXIES, float(len(frames))))


def tree(runs: Path) -> dict:
    """The report as JSON."""
    return json.loads((runs / "evaluation" / "report.json").read_text())


def test_without_vbench_there_are_proxies_and_the_rest_is_not_available(run: Callable[..., Run], runs: Path) -> None:
    ended = run("evaluate", "--runs", runs)
    assert ended.code == 0
    assert ended.out.startswith("8 videos of 2 methods: ")
    report = tree(runs)
    assert report["kind"] == "Weight-free proxies, without VBench (2 prompts x 2 seeds)"
    assert report["vbench"] is None
    assert report["total"] is None
    assert all(report["means"][label][dimension] is None for label in report["means"] for dimension in DIMENSIONS)
    flow = [video["values"]["proxy.flow_top5_px"] for video in report["videos"]]
    assert all(value > 0 for value in flow)
    assert report["means"]["direct"]["proxy.flow_top5_px"]["mean"] == pytest.approx(sum(flow[:4]) / 4)
    text = (runs / "evaluation" / "report.md").read_text()
    for dimension in DIMENSIONS:
        assert f"| {dimension} | not available |" in text
    assert "no correlation with VBench has been measured" in text
    assert "(here)" not in text


def test_an_unfinished_batch_says_so_first(run: Callable[..., Run], runs: Path, quick: None) -> None:
    labels = [f"{m}/p000{i}-s{seed}" for m in ("direct", "sliding_window") for i in (0, 1) for seed in (0, 7, 8)]
    (runs / "batch.json").write_text(json.dumps({"schema": 1, "items": dict.fromkeys(labels, "0")}))
    ended = run("evaluate", "--runs", runs)
    said = (
        f"{runs}: 8 of 12 items are made (direct 4 of 6, sliding_window 4 of 6), 0 failed for good, 4 are not made yet"
    )
    assert ended.code == 0
    assert ended.err.splitlines()[0] == f"some videos are missing: {said}"
    assert tree(runs)["missing"] == [said]
    lines = (runs / "evaluation" / "report.md").read_text().splitlines()
    assert lines[2].startswith("**Some requested videos are missing")
    assert lines[4] == f"- {said}"


def test_a_damaged_sidecar_costs_its_video_alone(run: Callable[..., Run], runs: Path, quick: None) -> None:
    sidecar = sorted(runs.glob("*/*/videos/*.json"))[0]
    sidecar.write_text("")
    ended = run("evaluate", "--runs", runs)
    assert (ended.code, ended.out.startswith("7 videos of 2 methods: ")) == (0, True)
    [said] = tree(runs)["missing"]
    assert ended.err.splitlines()[0] == f"some videos are missing: {said}"
    assert said.startswith(f"{sidecar} is not JSON (")


def test_with_vbench_every_video_has_every_dimension(
    run: Callable[..., Run], runs: Path, vbench: list[str], tmp_path: Path, quick: None
) -> None:
    assert run("evaluate", "--runs", runs, *vbench).code == 0
    report = tree(runs)
    assert report["kind"] == "VBench-Long metrics, custom input (2 prompts x 2 seeds)"
    assert len(report["videos"]) == 8
    assert all(0 <= video["values"][d] <= 1 for video in report["videos"] for d in DIMENSIONS)
    by_hand = [v["values"]["imaging_quality"] for v in report["videos"] if v["label"] == "direct"]
    assert report["means"]["direct"]["imaging_quality"]["mean"] == pytest.approx(sum(by_hand) / 4)
    others = [v["values"]["imaging_quality"] for v in report["videos"] if v["label"] == "sliding_window"]
    difference = report["differences"]["sliding_window"]["imaging_quality"]["mean"]
    assert difference == pytest.approx((sum(others) - sum(by_hand)) / 4)
    assert report["headlines"]["direct"].keys() == set(DIMENSIONS)
    with (runs / "evaluation" / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * len(report["measures"])
    assert {row["prompt"] for row in rows} == set(PROMPTS)
    text = (runs / "evaluation" / "report.md").read_text()
    assert "There is no total" in text
    assert "| Direct (paper) | 0.9865 |" in text
    assert "Figures of another model" in text
    # Started again it asks VBench for nothing.
    assert run("evaluate", "--runs", runs, *vbench).code == 0
    assert len(calls(tmp_path / "home")) == 12
    assert tree(runs) == report


def test_of_the_papers_model_our_figures_stand_beside_the_papers(
    run: Callable[..., Run], tmp_path: Path, vbench: list[str], quick: None
) -> None:
    runs = make_batch(tmp_path / "runs", methods=("direct",), seeds=(0,))
    for path in runs.rglob("*.json"):
        model = {"run": {"config": {"model": {"path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}}}}
        path.write_text(json.dumps(json.loads(path.read_text()) | model))
    assert run("evaluate", "--runs", runs, *vbench, "--dimensions", "dynamic_degree").code == 0
    text = (runs / "evaluation" / "report.md").read_text()
    here = [line for line in text.splitlines() if line.startswith("| direct (here)")]
    mean = tree(runs)["means"]["direct"]["dynamic_degree"]["mean"]
    assert here == [
        f"| direct (here) | not available | not available | not available | {mean:.4f} |" + " not available |" * 2
    ]
    assert "The same model at 321 frames; here videos have 21." in text
    assert text.count("Figures of another model") == 1  # Table 2


def test_what_failed_is_named_and_the_rest_is_reported(
    run: Callable[..., Run], runs: Path, vbench: list[str], tmp_path: Path, quick: None
) -> None:
    set_plan(tmp_path / "home", aesthetic_quality="fail")
    ended = run("evaluate", "--runs", runs, *vbench, "--dimensions", "aesthetic_quality,dynamic_degree")
    assert ended.code == 1
    assert ended.out.count("failed: ") == 2
    report = tree(runs)
    assert [line.split(":")[0] for line in report["failures"]] == [
        "direct, aesthetic_quality",
        "sliding_window, aesthetic_quality",
    ]
    assert report["means"]["direct"]["aesthetic_quality"] is None
    assert report["means"]["direct"]["dynamic_degree"]["prompts"] == 2
    assert "CUDA out of memory" in (runs / "evaluation" / "report.md").read_text()


def test_everything_missing_is_listed_before_anything_is_started(
    run: Callable[..., Run], runs: Path, vbench: list[str], tmp_path: Path
) -> None:
    gone = [tmp_path / "home/.cache/vbench" / name for name in ("amt_model/amt-s.pth", "clip_model/ViT-L-14.pt")]
    for path in gone:
        path.unlink()
    ended = run("evaluate", "--runs", runs, *vbench)
    assert ended.code == 2
    assert [line.split(" (for")[0] for line in ended.out.splitlines()] == [f"missing file: {path}" for path in gone]
    assert ended.err == "error: VBench cannot run: 2 things are missing or broken, listed above; see docs/vbench.md\n"
    assert calls(tmp_path / "home") == []
    assert not (runs / "evaluation" / "views").exists()


def test_check_looks_and_does_nothing_else(
    run: Callable[..., Run], runs: Path, vbench: list[str], tmp_path: Path
) -> None:
    ended = run("evaluate", "--runs", runs, *vbench, "--check")
    assert (ended.code, ended.out) == (0, "8 videos of 2 methods; all required files exist\n")
    assert calls(tmp_path / "home") == []
    assert not (runs / "evaluation" / "report.md").exists()


def test_an_interruption_says_what_is_kept(
    run: Callable[..., Run], runs: Path, vbench: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(score, "measure_videos", interrupt)
    ended = run("evaluate", "--runs", runs)
    assert ended.code == 130
    assert ended.stopped == f"what was finished is kept in {runs / 'evaluation'}; the same command continues from there"


def test_of_the_embedded_world_there_are_exact_measures(run: Callable[..., Run], tmp_path: Path, quick: None) -> None:
    """Beside the proxies, where every prompt is a caption; the sidecars say the native length, a list does not."""
    root, rows = tmp_path / "runs", ["method,prompt,seed,path"]
    for seed in (0, 1):
        path = root / "direct" / ("0" * 12) / "videos" / f"p000{seed}-s0.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        prompt = write_clip(path, seed)
        write_sidecar(path, prompt=prompt)
        rows.append(f'direct,"{prompt}",0,{path}')
    (tmp_path / "list.csv").write_text("\n".join(rows))
    assert run("evaluate", "--runs", root).code == 0
    report = tree(root)
    assert report["not_world"] is None
    assert report["means"]["direct"]["world.object_seen"]["mean"] > 0.9
    assert report["not_long"] is None
    text = (root / "evaluation/report.md").read_text()
    assert "| `world.object_seen`, share of frames |" in text
    assert "| `long.alike_far`, 0..1, at the largest distances |" in text
    words = ["--videos", tmp_path / "list.csv", "--out", tmp_path / "listed"]
    assert run("evaluate", *words).code == 0
    assert "Not available: the model's native length is not known" in (tmp_path / "listed/report.md").read_text()
    assert run("evaluate", *words, "--native_frames", 9).code == 0
    listed = json.loads((tmp_path / "listed/report.json").read_text())
    assert [v["values"] for v in listed["videos"]] == [v["values"] for v in report["videos"]]


def test_of_timelines_there_are_measures_of_events(run: Callable[..., Run], tmp_path: Path, quick: None) -> None:
    """The second event begins at frame 9; one sidecar says so, the other says 14."""
    texts = [f"a {colour} moves right over a blue background" for colour in ("red circle", "green star")]
    folder = tmp_path / "direct" / ("0" * 12) / "videos"
    folder.mkdir(parents=True)
    for number, begin in enumerate((9, 14)):
        with open_video(folder / f"p000{number}-s0.mp4", fps=8, height=64, width=64, crf=10) as video:
            video.write(show(texts, [9, 12]).astype(np.uint8))
        events = [{"text": texts[0], "start": 0, "stop": begin}, {"text": texts[1], "start": begin, "stop": 21}]
        prompt = f"{texts[0]} [0-{begin}] | {texts[1]} [{begin}-]"
        write_sidecar(folder / f"p000{number}-s0.mp4", prompt=prompt, run={"timeline": events})
    plain = folder / "p0001-s1.mp4"
    write_sidecar(plain, prompt=write_clip(plain, 0))
    assert run("evaluate", "--runs", tmp_path).code == 0
    values = [video["values"] for video in tree(tmp_path)["videos"]]
    assert [each["events.switch"] for each in values] == [0.0, 5.0, None]
    assert [each["events.shown"] for each in values] == [1.0, pytest.approx(16 / 21), None]
    assert [each["world.object_seen"] is None for each in values] == [True, True, False]
    text = (tmp_path / "evaluation/report.md").read_text()
    assert "| `events.switch`, frames | 2.5000 (2 prompts) |" in text


def test_several_folders_are_one_report(run: Callable[..., Run], tmp_path: Path, quick: None) -> None:
    roots = [make_batch(tmp_path / name, methods=(name,), seeds=(0,)) for name in ("direct", "freenoise")]
    words = ["--runs", ",".join(map(str, roots))]
    assert "give --out, the folder of the report" in run("evaluate", *words).error
    assert run("evaluate", *words, "--out", tmp_path / "report").code == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert sorted(report["means"]) == ["direct", "freenoise"]
    assert report["not_world"].startswith("frames of the world are 64 x 64 pixels, these are 32 x 32")


def test_a_full_disk_is_one_line(
    run: Callable[..., Run], runs: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(score, "write_report", full)
    ended = run("evaluate", "--runs", runs)
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith(
        f"error: cannot write to {runs / 'evaluation'}: No space left on device ("
    )


def test_two_evaluations_of_one_folder(run: Callable[..., Run], runs: Path) -> None:
    (runs / "evaluation").mkdir()
    with hold(runs / "evaluation" / "lock"):
        line = run("evaluate", "--runs", runs).error
    assert line.startswith(f"another evaluation works in {runs / 'evaluation'}: process {os.getpid()} on ")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_however_it_ends_no_process_of_vbench_outlives_it(
    runs: Path, vbench: list[str], tmp_path: Path, how: signal.Signals
) -> None:
    set_plan(tmp_path / "home", dynamic_degree="hang")
    words = ["--runs", str(runs), *vbench, "--dimensions", "dynamic_degree", "--proxies", "false"]
    script = Path(__file__).parents[2] / "launch" / "evaluate.py"
    started = subprocess.Popen([sys.executable, str(script), *words], stderr=subprocess.PIPE, text=True)
    pids = tmp_path / "home" / "pids"
    try:
        deadline = time.monotonic() + 200
        while not pids.exists() and started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        scoring, its_child = map(int, pids.read_text().split())
        started.send_signal(how)
        err = started.communicate(timeout=200)[1]
    finally:
        started.kill()
    assert ends(scoring)
    if how == signal.SIGKILL:
        os.kill(its_child, signal.SIGKILL)  # the kernel ends what we started, not what that started
        return
    assert ends(its_child)
    assert started.returncode == 128 + how
    assert err.splitlines()[-1].startswith("stopped: what was finished is kept in ")


def test_a_batch_is_made_of_a_suite_of_the_checkout(run: Callable[..., Run], tmp_path: Path) -> None:
    prompts = tmp_path / "VBench" / "prompts" / "prompts_per_category"
    prompts.mkdir(parents=True)
    (prompts / "animal.txt").write_text("a red circle\na blue square\na red circle")
    words = ["--out", tmp_path / "out", "--dry_run", "--prompts"]
    shown = run("batch", *words, "vbench:animal", "--vbench", tmp_path / "VBench")
    assert shown.code == 0
    assert "vbench:animal, 2 prompts, sha256 " in shown.out
    assert "animal, line 3 repeats p0000 and is made once" in shown.out
    assert "needs --vbench" in run("batch", *words, "vbench:animal").error
    assert "did you mean vbench:animal" in run("batch", *words, "vbench:anmal", "--vbench", tmp_path / "VBench").error
    assert "--vbench is for --prompts vbench:NAME" in run("batch", *words, "a.txt", "--vbench", tmp_path).error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give either --runs FOLDER, the --out of launch/batch.py, or --videos LIST.csv"),
        (["--runs", "{runs}", "--videos", "a.csv"], "give either --runs FOLDER"),
        (["--runs", "{runs}", "--vbench", "."], "--vbench needs --python"),
        (["--runs", "{runs}", "--python", "python"], "--python needs --vbench"),
        (["--runs", "{runs}", "--vbench", "nowhere", "--python", "python"], "--vbench "),
        (
            ["--runs", "{runs}", "--vbench", ".", "--python", "python", "--gpus", "0,0"],
            "--gpus must be different numbers",
        ),
        (
            ["--runs", "{runs}", "--vbench", ".", "--python", "python", "--gpus", "1", "--device", "cpu"],
            "--gpus selects",
        ),
        (
            ["--runs", "{runs}", "--vbench", ".", "--python", "python", "--device", "tpu"],
            "--device must be cuda or cpu",
        ),
        (["--runs", "{runs}", "--vbench", ".", "--python", "nothing"], ""),
        (["--runs", "{runs}", "--total"], "unknown setting total; VBench's total is of sixteen dimensions"),
        (["--runs", "{runs}", "--dimensions", "scene"], "--dimensions must be of subject_consistency,"),
        (
            ["--runs", "{runs}", "--baseline", "freespec"],
            "--baseline freespec is not one of the methods: direct, sliding_window",
        ),
        (["--runs", "{runs}", "--native_frames", "0"], "--native_frames must be 1 or more, got 0"),
        (["--runs", "{runs}", "--workers", "0"], "--workers must be 1 or more, got 0"),
        (["--runs", "{runs}", "--time_limit", "0"], "--time_limit must be above 0, got 0"),
        (["--runs", "{runs}", "--proxies", "false"], "nothing to do"),
        (["--runs", "{runs}", "--out", "{runs}/direct/000000000000/videos/p0000-s0.mp4"], "cannot write to the folder"),
        (["--runs", "{runs}", "--wieghts", "x"], "unknown setting wieghts; did you mean weights?"),
        (["--runs", "nowhere"], "--runs nowhere is not a folder"),
        (["--videos", "nothing.csv"], "cannot read --videos nothing.csv"),
    ],
)
def test_a_mistake_is_one_line(runs: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert run_command(partial(run_here, "evaluate"), [word.format(runs=runs) for word in words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1
