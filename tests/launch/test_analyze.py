"""analyze.py end to end on a small model: tables, plots, low-rank videos, going on after an interruption, mistakes."""

import csv
import json
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from engine.engine import LongVideoEngine
from engine.files.claims import claim
from engine.media.read_video import count_frames
from evaluation.analysis.spectra import by_layer_and_head, concentration, mean_and_error, over_prompts
from evaluation.analysis.tables import low_rank_summary
from freespec.methods import FreeLOC
from launch.process.exit_codes import GivenUpError
from metrics.video import VIDEO_UNITS
from tests.launch.conftest import LTX, SMALL, Run
from tests.launch.test_interruptions import interrupted_at_forward

# 5 latent frames, native 2: windows of 2, 4 and 5.
SETTINGS = SMALL | {"sampler.num_steps": 3, "method.window_frames": 2, "method.name": "direct", "num_points": 2}


@pytest.fixture
def analyze_with_plots(run: Callable[..., Run], wan_folder: Path, tmp_path: Path) -> Callable[..., Run]:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")

    def call(**settings: object) -> Run:
        chosen = {"model.path": wan_folder, "prompts": tmp_path / "prompts.txt", "out": tmp_path / "out"}
        chosen |= SETTINGS | {"ratios": "0.25,1", "num_reconstructed": 1} | settings
        return run("analyze", *(f"--{key}={value}" for key, value in chosen.items()))

    return call


@pytest.fixture
def analyze_in(analyze_with_plots: Callable[..., Run], no_plots: None) -> Callable[..., Run]:
    return analyze_with_plots


def test_an_interrupted_analysis_goes_on_and_writes_every_table_and_plot(
    analyze_with_plots: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with interrupted_at_forward(8):  # six forwards a prompt
        stopped = analyze_with_plots()
    assert stopped.code == 130
    assert "while prompt 1 was watched; 1 of 2 are kept" in stopped.err
    shown = analyze_with_plots()
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert lines[0].startswith("1 of 1, ")  # the first prompt was not watched again
    assert lines[-1].startswith(f"{out}: effective rank late in the run ")
    assert len(lines) == 4

    names = {path.name for path in out.iterdir()}
    plots = [
        "rank-progress",
        "rank-windows",
        "rank-heads",
        "low-rank-measures",
        "low-rank-frames-000",
        "low-rank-flows-000",
    ]
    assert {f"{plot}.{kind}" for plot in plots for kind in ("png", "svg")} <= names
    check_tables(out)
    videos = sorted((out / "low-rank").rglob("*.mp4"))
    assert [path.parents[2].name for path in videos] == ["ratio-0.25", "ratio-1"]
    assert {count_frames(path) for path in videos} == {17}
    assert videos[0].read_bytes() != videos[1].read_bytes()

    monkeypatch.setattr(LongVideoEngine, "__init__", lambda *_: pytest.fail("the model was loaded"))
    assert analyze_with_plots().code == 0
    assert "changed: sampler.num_steps 3 -> 4" in analyze_with_plots(**{"sampler.num_steps": 4}).error


def test_a_prompt_that_is_watched_keeps_its_steps_and_a_damaged_file_costs_its_prompt(
    analyze_in: Callable[..., Run], tmp_path: Path
) -> None:
    given = {"output.snapshot_every": 1}
    assert analyze_in(**given, out=tmp_path / "whole").code == 0
    with interrupted_at_forward(11):  # in the third step of the second prompt
        stopped = analyze_in(**given)
    assert stopped.code == 130
    shown = analyze_in(**given)
    assert (shown.code, shown.err) == (0, "")
    files = [
        path
        for n in range(2)
        for folder in ("whole", "out")
        for path in (tmp_path / folder).glob(f"direct/*/spectra/p000{n}-s0-2.json")
    ]
    for whole, resumed in (files[:2], files[2:]):
        assert whole.read_text() == resumed.read_text()
    assert not list(tmp_path.rglob("*.snapshot.safetensors"))

    files[1].write_text("[{}]")
    shown = analyze_in(**given)
    assert (shown.code, shown.err) == (0, f"{files[1]} holds no spectra; it is made again\n")
    assert files[0].read_text() == files[1].read_text()


def test_of_two_analyses_of_one_folder_the_second_is_refused(
    analyze_in: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LongVideoEngine, "__init__", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "out").mkdir()
    with claim([tmp_path / "out/report.json"], advice="-"):
        error = analyze_in().error
    assert error.startswith(f"{tmp_path / 'out/report.json'} is being made by process {os.getpid()} on ")
    assert error.endswith("; wait for it, or choose another --out")


def test_replicas_make_low_rank_videos_alone(
    analyze_in: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = analyze_in(replicas=2).error
    assert error.startswith(
        "the spectra of 2 of 2 prompts are missing, and replicas make the low-rank and layer videos alone; "
    )
    assert analyze_in(num_reconstructed=0).code == 0
    made: list[list[str]] = []

    def give_up(*given: Any) -> None:
        made.append([item.label for item in given[-1].todo])
        raise GivenUpError("1 items failed for good")

    monkeypatch.setattr("launch.batching.comparison.make", give_up)
    assert analyze_in(replicas=2).code == 1
    assert made == [["ratio-1/p0000-s0", "ratio-0.25/p0000-s0"]]


@pytest.mark.slow
def test_replicas_make_the_same_low_rank_videos(
    analyze_in: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, more in (("one", {}), ("two", {"replicas": 2})):
        assert analyze_in(out=tmp_path / name, num_reconstructed=0).code == 0
        assert analyze_in(out=tmp_path / name, **more).code == 0
    assert (tmp_path / "one/low-rank.csv").read_text() == (tmp_path / "two/low-rank.csv").read_text()
    assert (tmp_path / "one/report.json").read_text() == (tmp_path / "two/report.json").read_text()


def test_ltx_video_is_analysed_with_both_passes_in_a_batch(analyze_in: Callable[..., Run], tmp_path: Path) -> None:
    """One prompt; its heads are told once, those of the conditional pass."""
    (tmp_path / "one.txt").write_text("a red circle\n")
    shown = analyze_in(**LTX, prompts=tmp_path / "one.txt", ratios="1", num_reconstructed=0)
    assert (shown.code, shown.err) == (0, "")
    with (tmp_path / "out" / "spectra.csv").open() as file:
        rows = list(csv.DictReader(file))
    keys = {(row["prompt"], row["step"], row["layer"], row["head"], row["multiple"]) for row in rows}
    config = json.loads((LTX["model.path"] / "transformer" / "config.json").read_text())
    assert len(rows) == len(keys) == 2 * config["num_layers"] * config["num_attention_heads"] * 3
    assert all(1 <= float(row["effective_rank"]) <= config["attention_head_dim"] for row in rows)


def check_tables(out: Path) -> None:
    with (out / "spectra.csv").open() as file:
        rows = list(csv.DictReader(file))
    keys = [(row["prompt"], row["step"], row["layer"], row["head"], row["multiple"]) for row in rows]
    assert len(keys) == len(set(keys)) == 2 * 2 * 2 * 4 * 3
    assert {row["progress"] for row in rows} == {"0.0", "1.0"}
    assert {(row["multiple"], row["window_frames"]) for row in rows} == {
        ("1", "2"),
        ("2", "4"),
        ("2.5", "5"),
    }  # the third is cut
    with (out / "spectra-progress.csv").open() as file:
        means = list(csv.DictReader(file))
    line = next(row for row in means if (row["multiple"], row["progress"]) == ("2", "1.0"))
    by_prompt = [
        statistics.fmean(
            float(row["effective_rank"])
            for row in rows
            if (row["multiple"], row["progress"], row["prompt"]) == ("2", "1.0", str(prompt))
        )
        for prompt in range(2)
    ]
    assert float(line["effective_rank_mean"]) == pytest.approx(statistics.fmean(by_prompt))
    assert float(line["effective_rank_error"]) == pytest.approx(abs(by_prompt[0] - by_prompt[1]) / 2)
    with (out / "spectra-heads-progress.csv").open() as file:
        of_heads = list(csv.DictReader(file))
    assert len(of_heads) == len(rows) / 2  # mean and error of two prompts each
    keys = ("layer", "head", "multiple", "progress")
    first = [float(row["effective_rank"]) for row in rows if all(row[key] == of_heads[0][key] for key in keys)]
    assert float(of_heads[0]["effective_rank_mean"]) == pytest.approx(statistics.fmean(first))
    assert float(of_heads[0]["effective_rank_error"]) == pytest.approx(abs(first[0] - first[1]) / 2)
    with (out / "low-rank.csv").open() as file:
        assert {row["ratio"] for row in csv.DictReader(file)} == {"1.0", "0.25"}
    report = json.loads((out / "report.json").read_text())
    assert report["comparison"]["prompts"] == list(json.loads((out / "batch.json").read_text())["prompts"].values())
    assert report["comparison"]["settings"]["num_points"] == 2
    assert report["comparison"]["settings"]["method.name"] == "direct"
    assert [each["multiple"] for each in report["spectra"]["stages"]["late"]["windows"]] == [1, 2, 2.5]
    assert "2.5 x native (5 latent frames)" in (out / "rank-progress.svg").read_text()
    assert set(report["spectra"]["stages"]) == {"early", "middle", "late"}
    assert {row["metric"] for row in report["low_rank"]} >= {"flow_mean", "laplacian_variance"}


def test_low_rank_is_held_against_the_largest_ratio_prompt_by_prompt() -> None:
    """What a prompt adds at both ratios, up to 7 here, cancels; a prompt without a value is left out of both."""

    def row(prompt: int, ratio: float) -> dict[str, float]:
        missing = prompt == 7 and ratio < 1.0
        return dict.fromkeys(VIDEO_UNITS, math.nan if missing else prompt + ratio) | {"prompt": prompt, "ratio": ratio}

    table = [row(prompt, ratio) for prompt in range(8) for ratio in (0.25, 1.0)]
    found = {each["ratio"]: each for each in low_rank_summary(table) if each["metric"] == "flow_mean"}
    assert (found[0.25]["difference"], found[0.25]["low"], found[0.25]["high"]) == pytest.approx((-0.75,) * 3)
    assert (found[1.0]["difference"], found[1.0]["prompts"], found[0.25]["prompts"]) == (0.0, 8, 7)
    assert found[0.25]["mean"] - found[1.0]["mean"] == pytest.approx(-1.25)  # the control: means of unequal prompts
    few = low_rank_summary(table[:10])
    assert all(math.isnan(each["low"]) for each in few)


def test_errors_are_over_prompts_and_not_over_heads() -> None:
    """Eight heads of one prompt are one number."""
    rows = [
        {
            "prompt": p,
            "layer": 0,
            "head": h,
            "multiple": m,
            "progress": 0.0,
            "effective_rank": 4.0 + p + h - m,
            "first_share": 0.5,
        }
        for p in range(2)
        for h in range(8)
        for m in (1, 4)
    ]
    first, second = over_prompts(rows, ("multiple",))
    assert (first["effective_rank_mean"], first["prompts"]) == (7.0, 2)
    assert first["effective_rank_error"] == pytest.approx(0.5)
    assert second["effective_rank_mean"] == 4.0
    told = concentration(rows)
    assert [each["difference"]["mean"] for each in told["stages"]["late"]["windows"]] == [0.0, -3.0]
    assert told["heads_that_fall"] == 1.0
    np.testing.assert_allclose(by_layer_and_head(rows)[0], [(0.5 + h) / (3.5 + h) - 1 for h in range(8)])
    mean, error = mean_and_error([2.0])
    assert (mean, math.isnan(error)) == (2.0, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratios": "1,half"}, "--ratios must be numbers"),
        ({"ratios": ","}, "--ratios is empty"),
        ({"ratios": "1,2"}, "ratio must lie in (0, 1], got 2.0"),
        # 12 directions a head; of one label, and of one number of directions.
        ({"ratios": "1,0.62345678,0.62345679"}, "--ratios 0.62345679 and 0.62345678 keep 8 and 8 of 12 directions"),
        ({"ratios": "1,0.6,0.61"}, "are called ratio-0.61 and ratio-0.6; leave one out"),
        ({"output.path": "a.mp4"}, "output.path is not used by analyze.py"),
        ({"num_points": 1}, "--num_points must be 2 or more, got 1"),
        ({"num_reconstructed": -1}, "--num_reconstructed must be 0 or more"),
        ({"method.window_frames": 5}, "windows can only grow in a longer video, such as --video.num_frames 77"),
        ({"video.num_frames": 18}, "must be 4k + 1"),
        (
            {"num_probed": 1, "method.freeloc.near_frames": 30},
            "--num_probed makes videos with FreeLOC: freeloc: near_frames",
        ),
        ({"sampler.cache": "first_block"}, "sampler.cache first_block skips layers"),
        ({"model.compile": "true"}, "with model.compile, blocks do not expose branches"),
        (
            {"parallel.provider": "xfuser", "method.name": "direct"},
            "parallel.provider xfuser does not expose branches to trace; use parallel.provider torch, or do not trace",
        ),
    ],
)
def test_mistakes_are_one_line(analyze_in: Callable[..., Run], settings: dict[str, object], message: str) -> None:
    assert message in analyze_in(**settings).error


def test_layers_are_probed_one_by_one_and_give_a_preset(analyze_in: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a red circle\n")
    shown = analyze_in(prompts=tmp_path / "one.txt", num_reconstructed=0, num_probed=1)
    assert (shown.code, shown.err) == (0, "")
    with (tmp_path / "out" / "layers.csv").open() as file:
        rows = {(row["treatment"], row["layer"]): float(row["change"]) for row in csv.DictReader(file)}
    assert set(rows) == {("positions", "0"), ("positions", "1"), ("sparse", "0"), ("sparse", "1")}
    assert min(rows.values()) > 0
    chosen = json.loads((tmp_path / "out" / "report.json").read_text())["layers"]["chosen"]
    preset = yaml.safe_load((tmp_path / "out" / "freeloc-layers.yaml").read_text())
    assert preset["method"]["freeloc"] == chosen
    assert FreeLOC(**{name: tuple(layers) for name, layers in chosen.items()}).check_layers(2) is None
    assert analyze_in(num_probed=-1).error.endswith("--num_probed must be 0 or more, got -1")
