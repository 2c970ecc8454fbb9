"""The page of the bench from reports whose numbers are known: means, paired differences, cost, the plot; and its study."""

import copy
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from evaluation.comparison.quality import score_of
from evaluation.comparison.summary import as_json
from evaluation.study import bench
from evaluation.study.parts import read_study
from freespec.methods import METHODS
from launch.arguments.compare import add_arguments
from launch.arguments.variants import read_variants
from metrics.bootstrap import mean_interval, paired_interval

GOOD = {
    **dict.fromkeys(("shape_kept", "colour_kept", "motion_as_captioned"), 1.0),
    **dict.fromkeys(("shape_as_captioned", "colour_as_captioned", "background_as_captioned"), 1.0),
    **{"speed_error": 0.0, "rgb_drift": 2.0, "loops": 0.0},
}
UNITS = dict.fromkeys(GOOD, "x")


def values_of(label: str, prompt: int) -> dict[str, float | None]:
    """`b` is 0.4 px/frame off and has no drift for the last prompt, `c` loops on every second prompt."""
    own = {"b": {"speed_error": 0.4, "rgb_drift": None if prompt == 7 else 3.0}, "c": {"loops": float(prompt % 2)}}
    return GOOD | own.get(label, {})


def report_of(labels: str, *, frames: int = 129) -> dict[str, Any]:
    videos = [
        {"label": label, "prompt_index": prompt, "seed": 0, "values": values_of(label, prompt)}
        for label in labels
        for prompt in range(8)
    ]
    values = {
        (label, name): [float("nan") if value is None else value for value in found]
        for label in labels
        for name in UNITS
        for found in [[values_of(label, prompt)[name] for prompt in range(8)]]
    }
    summary = [
        {
            "label": label,
            "metric": name,
            "unit": unit,
            "mean": as_json(mean_interval(values[label, name])),
            "difference": None
            if label == labels[0]
            else as_json(paired_interval(values[label, name], values[labels[0], name])),
        }
        for name, unit in UNITS.items()
        for label in labels
    ]
    costs = {"a": 1.0, "b": 0.5, "c": 1.5}
    return {
        "comparison": {
            "settings": {"video.num_frames": frames, "sampler.num_steps": 6, "sampler.guidance_scale": 2.5},
        },
        "noise": dict.fromkeys(labels, "iid"),
        "baseline": labels[0],
        "notes": [f"{len(videos)} videos: {len(labels)} methods on 8 pairs of prompt and seed of 16 asked for."],
        "summary": summary,
        "videos": videos,
        "times": {label: {"cpu_ratio": as_json(mean_interval([costs[label]] * 8))} for label in labels},
    }


def write(tmp_path: Path, reports: dict[str, Any], *, overwrite: bool = False) -> str:
    bench.write_bench(tmp_path / "bench.md", reports, kept=tmp_path / "kept", overwrite=overwrite)
    return (tmp_path / "bench.md").read_text()


def test_tables_have_cost_quality_and_paired_differences(tmp_path: Path) -> None:
    text = write(tmp_path, {"x4": report_of("abc"), "two": report_of("ab"), "later": None})
    assert "Not measured yet: `later`." in text
    assert "## 129 frames: 3 methods" in text
    assert "on 8 pairs of prompt and seed of 16 asked for" in text
    assert "| `b` | 0.5 [0.5, 0.5] | 0.95 [0.95, 0.95] | 1 [1, 1] | 0.4 [0.4, 0.4] | 3 [3, 3] | 0 [0, 0] |" in text
    assert "| `b` | **−0.05 [−0.05, −0.05]** | 0 [0, 0] | **+0.4 [+0.4, +0.4]** | **+1 [+1, +1]** | 0 [0, 0] |" in text
    assert "| `c` | 0 [0, 0] |" in text  # no difference in quality: not bold
    assert "## 129 frames: `b` against `a`" in text
    assert "The interval leaves out 0 for `quality`, `speed_error`, `rgb_drift`." in text
    assert (tmp_path / "figures/bench.png").stat().st_size > 10_000


def test_a_lost_object_has_no_quality() -> None:
    """The negative control: a video whose measures are missing scores 0 for them, not the mean of the others."""
    assert score_of(GOOD) == 1.0
    lost = report_of("abc")
    for video in lost["videos"]:
        if video["label"] == "a":
            video["values"] = dict.fromkeys(GOOD)
    assert bench.mean(lost, "a", "quality").mean == 0.0
    assert bench.difference(lost, "b", "quality").mean == pytest.approx(0.95)


def test_records_without_cpu_time_have_no_cost(tmp_path: Path) -> None:
    old = copy.deepcopy(report_of("abc"))
    for found in old["times"].values():
        found["cpu_ratio"] = None
    text = write(tmp_path, {"x4": old})
    assert "| `b` | – | 0.95" in text
    assert "bench.png" not in text


def test_a_page_is_not_replaced_by_one_with_fewer_pairs(tmp_path: Path) -> None:
    write(tmp_path, {"x4": report_of("abc")})
    fewer = report_of("abc")
    fewer["notes"] = [fewer["notes"][0].replace("on 8 pairs", "on 7 pairs")]
    with pytest.raises(UserError, match="has tables of more than these reports hold"):
        write(tmp_path, {"x4": fewer})
    assert "on 7 pairs" in write(tmp_path, {"x4": fewer}, overwrite=True)


def test_the_shipped_study_has_every_method_from_the_same_noise() -> None:
    study = read_study("configs/study/bench.yaml", {})
    assert (study.writes, study.report_names) == ("bench", ["x4", "x4-far", "x8"])
    variants = read_variants(study.parts["x4"].settings["methods"], [], name="compare.py", add_arguments=add_arguments)
    assert {variant.method for variant in variants} == set(METHODS)
    assert {variant.config.noise[0] for variant in variants} == {"iid"}
    for part, frames in (("x4", "129"), ("x8", "257")):
        settings = study.parts[part].settings
        assert (settings["video.num_frames"], settings["sampler.num_steps"], settings["long_measures"]) == (
            frames,
            "6",
            "True",
        )
