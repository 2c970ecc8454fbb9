"""The findings page from reports with known answers, and the verdict on an interval."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.files import claims
from evaluation.comparison.measure import units
from evaluation.study import overview
from evaluation.study.claims import CLAIMS, Claim, answers, changes, noise_effects, not_made, read
from evaluation.study.overview import can_tell
from evaluation.study.reports import KEPT, TABLES
from freespec.methods import METHODS
from launch.commands import findings
from launch.commands.findings import PartFailedError, make_parts
from metrics.bootstrap import Estimate
from tests.evaluation.study.test_parts import read as read_parts
from tests.evaluation.study.test_parts import study_of
from tests.launch.conftest import Run

CLAIM = Claim(
    title="t", text="x.", method="a", other="b", measures={"up": "more", "down": "less", "none": "more"}, why_not=""
)
SETTINGS = {
    "checkpoint": "abc",
    "video.num_frames": 129,
    "sampler.num_steps": 20,
    "method.name": "direct",
    "device": "cpu",
}
NOTHING = {"mean": None, "low": None, "high": None, "count": 0}


def report_of(values: dict[str, dict[str, float]], labels: tuple[str, str]) -> dict[str, Any]:
    """A report on eight prompts and two seeds; `values[metric][label]` is the mean, and every prompt adds its own number."""
    videos = [
        {
            "label": label,
            "prompt_index": prompt,
            "seed": seed,
            # Half of the seeds have no value of "up" for the last prompt: the other seed stands for it.
            "values": {
                name: None
                if (name, prompt, seed) == ("up", 7, 1)
                else of[label] + prompt + 0.5 * (seed - 0.5) * (prompt < 7)
                for name, of in values.items()
            },
        }
        for label in labels
        for prompt in range(8)
        for seed in range(2)
    ]
    summary = [
        {"label": label, "metric": name, "unit": "px", "differs": False, "mean": NOTHING, "difference": None}
        for name in values
        for label in labels
    ]
    times = {
        label: {"denoise": 1.0, "decode": 0.5, "steps": {"dual": {"median": 0.1, "per_run": 20}}} for label in labels
    }
    return {
        "comparison": {
            "settings": dict(SETTINGS),
            "prompts": [*"abcdefgh"],
            "variants": {label: {"method.name": label} for label in labels},
        },
        "pairs": {"made": 16, "asked": 16},
        "noise": dict.fromkeys(labels, "iid"),
        "summary": summary,
        "videos": videos,
        "notes": ["16 videos."],
        "times": times,
        "baseline": labels[0],
    }


def estimate(low: float, high: float) -> Estimate:
    return Estimate(mean=(low + high) / 2, low=low, high=high, count=8)


def test_how_an_interval_reads() -> None:
    assert [read(estimate(0.1, 0.2), sign) for sign in ("more", "less")] == ["as the paper says", "the opposite"]
    assert [read(estimate(-0.2, -0.1), sign) for sign in ("more", "less")] == ["the opposite", "as the paper says"]
    assert {read(estimate(-0.1, 0.1), sign) for sign in ("more", "less")} == {"not decided"}
    no_interval = Estimate(mean=5.0, low=np.nan, high=np.nan, count=3)
    assert {read(no_interval, sign) for sign in ("more", "less")} == {"not decided"}
    assert read(Estimate(mean=np.nan, low=np.nan, high=np.nan, count=0), "more") == "not made"


def test_differences_are_paired_by_prompt() -> None:
    """What a prompt adds to both methods, up to 7 here, cancels: the interval of a difference of 0.25 is a point."""
    values = {"up": {"a": 0.25, "b": 0.0}, "down": {"a": 0.25, "b": 0.0}}
    found = answers(CLAIM, report_of(values, ("a", "b")))
    assert [(each.metric, each.verdict) for each in found] == [("up", "as the paper says"), ("down", "the opposite")]
    for each in found:
        assert (each.difference.low, each.difference.high) == pytest.approx((0.25, 0.25))
        assert each.difference.count == 8
    swapped = report_of({"up": {"a": 0.0, "b": 0.25}, "down": {"a": 0.0, "b": 0.25}}, ("a", "b"))
    assert [each.verdict for each in answers(CLAIM, swapped)] == ["the opposite", "as the paper says"]


def test_claims_speak_of_measures_and_methods_that_exist() -> None:
    for claim in CLAIMS:
        assert {claim.method, claim.other} <= set(METHODS)
        assert set(claim.measures) <= set(units(world=True))


def analysis_of(difference: float, low_rank_change: float = -0.5) -> dict[str, Any]:
    def window(multiple: int) -> dict[str, Any]:
        mean = {"mean": 9.0 + difference * (multiple > 1), "low": 8.0, "high": 10.0, "count": 8}
        moved = difference * (multiple > 1)
        return {
            "multiple": multiple,
            "mean": mean,
            "difference": {"mean": moved, "low": moved - 0.1, "high": moved + 0.1},
        }

    stages = {"late": {"progress": 0.9, "windows": [window(1), window(4)]}}
    low_rank = [
        {"ratio": ratio, "metric": name, "unit": "px", "mean": ratio, "error": 0.1, "prompts": 8}
        | {"difference": change, "low": change - 0.1, "high": change + 0.1}
        for ratio, change in ((1.0, 0.0), (0.5, -low_rank_change), (0.25, low_rank_change))
        for name in ("flow_mean", "flow_strongest", "laplacian_variance", "interpolation_error")
    ]
    told = {"stages": stages, "heads_that_fall": 0.75}
    return {"comparison": {"settings": SETTINGS, "prompts": ["a", "b"]}, "spectra": told, "low_rank": low_rank}


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., None]:
    """Writes reports by name."""

    def call(**reports: Any) -> None:
        for name, report in reports.items():
            folder = tmp_path / f"runs/{name}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "report.json").write_text(json.dumps(report))

    return call


@pytest.fixture
def findings_of(run: Callable[..., Run], tmp_path: Path) -> Callable[..., Run]:
    """Runs the command on the reports that were put there."""
    page = tmp_path / "docs/findings.md"
    page.parent.mkdir()
    (tmp_path / "runs").mkdir(exist_ok=True)
    words = {
        "runs": tmp_path / "runs",
        "kept": tmp_path / "runs",
        "page": page,
    }
    return lambda *more: run("findings", *(f"--{key}={value}" for key, value in words.items()), *more)


@pytest.fixture
def write(put: Callable[..., None], findings_of: Callable[[], Run], tmp_path: Path) -> Callable[..., str]:
    """Writes reports by name, runs the command, and returns the page."""

    def call(**reports: dict[str, Any]) -> str:
        put(**reports)
        (tmp_path / "docs/findings.md").unlink(missing_ok=True)
        shown = findings_of()
        assert (shown.code, shown.err) == (0, "")
        return (tmp_path / "docs/findings.md").read_text()

    return call


def test_page_text_follows_the_numbers(write: Callable[..., str], tmp_path: Path) -> None:
    page = write(analysis=analysis_of(-1.0))
    assert "In 1 of 1 of the stages and windows the effective rank: falls." in page
    assert "in 75 % of the heads" in page
    assert "Possible reasons where it does not fall" not in page
    assert "| late | 0.90 | 4 x | 9 [8, 10] | 8 [8, 10] | −1 [−1.1, −0.9] | falls |" in page
    assert "| `flow_mean` (px) | less | 1 | +0.5 [+0.4, +0.6] | −0.5 [−0.6, −0.4] | as the paper says |" in page
    assert "8 of the prompts above" in page
    assert "In 3 of 3 of the measures: as the paper says." in page
    assert "Possible reasons where it is not weaker" not in page
    assert "Not measured yet: the defaults are start values." in page
    assert "![" not in page
    plot = tmp_path / "runs/analysis/rank-progress.png"
    plot.write_bytes(b"a plot")
    shown = write()
    assert "each window](figures/findings-rank-progress.png)" in shown
    assert "measures of every video are in [../runs](../runs)" in shown
    assert (tmp_path / "docs/figures/findings-rank-progress.png").read_bytes() == b"a plot"
    rises = write(analysis=analysis_of(0.5, low_rank_change=0.5))
    assert "In 0 of 1 of the stages and windows the effective rank: falls, 1 rises." in rises
    assert "Possible reasons where it does not fall" in rises
    assert "In 0 of 3 of the measures: as the paper says, 3 the opposite." in rises
    assert "Possible reasons where it is not weaker" in rises
    assert "| not decided |" in write(analysis=analysis_of(0.05))

    smooth = {
        "laplacian_variance": {"direct": 1.0, "sliding_window": 3.0},
        "speed": {"direct": 2.0, "sliding_window": 1.0},
    }
    report = report_of(smooth, ("direct", "sliding_window"))
    report["videos"] += [each | {"label": "freespec"} for each in copy.deepcopy(report["videos"][:16])]
    page = write(methods=report)
    assert "In 1 of 2 of the measures: as the paper says, 1 the opposite." in page
    assert "| `laplacian_variance` (px) | less | −2 [−2, −2] | 8 of 8 | as the paper says |" in page
    assert "Further reasons for rows that are not decided or the opposite" in page
    by_title = {claim.title: claim for claim in CLAIMS}
    assert by_title["Over-smoothing of `direct`"].why_not in page
    assert "--methods direct,sliding_window --baseline sliding_window" in page
    assert "| direct | 1 | 0.5 | dual 0.1 (20) |" in page


def test_another_number_of_steps_is_held_against_the_tables_on_the_videos_that_both_have(
    write: Callable[..., str],
) -> None:
    labels = ("direct", "sliding_window")
    names = {"laplacian_variance": "changes in size", "flow_mean": "turns round", "speed": "no change seen"}
    tables = report_of({name: {"direct": -1.0, "sliding_window": 1.0} for name in names}, labels)
    rerun = report_of(
        {
            "laplacian_variance": {"direct": -2.0, "sliding_window": 1.0},
            "flow_mean": {"direct": 2.0, "sliding_window": 1.0},
            "speed": {"direct": -1.0, "sliding_window": 1.0},
        },
        labels,
    )
    for report, steps in ((tables, 20), (rerun, 10)):
        report["comparison"]["settings"]["sampler.num_steps"] = steps
    for each in tables["videos"][-2:]:  # a prompt that the rerun has not: it would move the mean
        each["prompt_index"] = 9
        each["values"]["speed"] = 100.0
    assert {each.metric: each.verdict for each in changes(tables, rerun)} == names
    assert {each.change.count for each in changes(tables, rerun)} == {7}
    # A prompt that lost a value in one of the four counts in none of the three numbers, or they would not add up.
    lost = copy.deepcopy(rerun)
    for each in lost["videos"]:
        if each["label"] == "direct" and each["prompt_index"] == 0:
            each["values"]["speed"] = None
    first = copy.deepcopy(tables)
    for each in first["videos"]:
        if each["prompt_index"] == 0:
            each["values"]["speed"] *= 50.0
    (speed,) = (each for each in changes(first, lost) if each.metric == "speed")
    assert (speed.tables.count, speed.rerun.count, speed.change.count) == (6, 6, 6)
    assert speed.change.mean == pytest.approx(speed.rerun.mean - speed.tables.mean)
    assert speed.tables.mean == pytest.approx(-2.0)
    tables["videos"] += [each | {"label": "freespec"} for each in tables["videos"]]  # not in the rerun: not asked
    rerun["summary"].append(
        rerun["summary"][0] | {"metric": "flow_strongest"}
    )  # nor is a measure that one of both lacks
    for each in rerun["videos"]:
        each["values"]["flow_strongest"] = 1.0
    page = write(methods=tables, steps=rerun)
    assert "The tables above are of 20 denoising steps. 32 videos were also made with 10." in page
    assert "In 1 of 3 of the differences: no change seen, 1 changes in size, 1 turns round." in page
    assert "| `flow_mean` (px) | 7 | −2 [−2, −2] | +1 [+1, +1] | +3 [+3, +3] | turns round |" in page


def calibration_of(**judged: Any) -> dict[str, Any]:
    shares = {"kept": 0.5, "captioned": 0.5, "motion": 0.5, "speed": 0.5}
    found = {
        "prompts": 40,
        "seeds": [0, 1],
        "settings": {"alpha": 3.0},
        "score": {"start": 0.5, "trial-07": 0.52},
        "parts": {"start": shares, "trial-07": shares},
        "difference": {"mean": 0.02, "low": -0.01, "high": 0.05, "count": 40},
        "supported": False,
    } | judged
    return {
        "comparison": {"settings": SETTINGS},
        "num_steps": {"search": 10, "judged": 20},
        "space": {"alpha": [1.0, 3.0]},
        "search_seed": 0,
        "trials": {"start": {}, "trial-07": {}},
        "rounds": [{"prompts": 5, "scores": {"start": 0.4, "trial-07": 0.5}}],
        "best": "trial-07",
        "judged": found,
    }


def test_a_calibration_that_is_not_supported_leaves_the_defaults(write: Callable[..., str]) -> None:
    report = calibration_of()
    page = write(calibration=report)
    assert "Searched with videos of 10 steps, judged with 20; 129 frames, checkpoint `abc`." in page
    assert "the defaults are kept" in page
    assert "+0.02 [−0.01, +0.05]" in page
    assert "the report supports the change" in write(calibration=calibration_of(supported=True))
    assert "No setting was better" in write(calibration={**report, "best": "start", "judged": None})


def test_page_without_reports(write: Callable[..., str]) -> None:
    page = write()
    assert page.count("Not measured yet") == 10
    # tests/freespec/test_schedule.py has the timesteps of these shifts.
    assert "fused_share 0.5 fuses of 50 steps 84 % at shift 5, 90 % at shift 8, and " in page
    assert "128 of a head of Wan" in page
    assert page.endswith("its VBench scores\n([vbench.md](vbench.md)).\n")


def test_a_page_is_not_replaced_by_an_emptier_one(
    put: Callable[..., None], findings_of: Callable[..., Run], tmp_path: Path
) -> None:
    """Reports that are gone, or that stand on fewer pairs, leave the page and its figures as they are, unless asked."""
    page, figures = tmp_path / "docs/findings.md", tmp_path / "docs/figures"
    report = report_of({"speed": {"direct": 2.0, "freespec": 1.0}}, ("direct", "freespec"))
    report["notes"] = ["32 videos: 2 methods on 16 pairs of prompt and seed, 8 prompts"]
    put(methods=report, analysis=analysis_of(-1.0))
    (tmp_path / "runs/methods/plots").mkdir()
    (tmp_path / "runs/methods/plots/clips.png").write_bytes(b"a plot")
    assert findings_of().code == 0
    whole = page.read_text()
    assert findings_of().code == 0  # the same again
    fewer = report | {"notes": ["6 videos: 2 methods on 3 pairs of prompt and seed, 3 prompts"]}
    (tmp_path / "runs/methods/plots/clips.png").write_bytes(b"another plot")
    put(methods=fewer)
    assert f"{page} has tables of more than these reports hold ('All six methods'" in findings_of().error
    put(methods=report)
    (tmp_path / "runs/analysis/report.json").unlink()
    assert "('Spectral concentration: does the rank fall as the window grows?'" in findings_of().error
    assert page.read_text() == whole
    assert (figures / "findings-clips.png").read_bytes() == b"a plot"
    assert sorted(path.name for path in page.parent.iterdir()) == ["figures", "findings.md"]
    assert findings_of("--overwrite").code == 0
    assert page.read_text() != whole
    assert (figures / "findings-clips.png").read_bytes() == b"another plot"


def test_the_page_says_first_what_is_not_made_yet(write: Callable[..., str]) -> None:
    whole = report_of({"speed": {"direct": 2.0, "freespec": 1.0}}, ("direct", "freespec"))
    part = whole | {"pairs": {"made": 6, "asked": 16}}
    rest = "not measured: `noise`, `steps`, `analysis`, `calibration`, `timelines`, `extensions`, `extensions-ltx`."
    assert f"**Not everything is measured yet**: {rest}" in write(methods=whole, ablation=whole)
    assert f"**Not everything is measured yet**: `ablation` covers 6 of 16 pairs of prompt and seed; {rest}" in write(
        methods=whole, ablation=part
    )


def test_a_claim_on_what_was_not_made_is_not_undecided(write: Callable[..., str]) -> None:
    report = report_of({"speed": {"direct": 2.0, "freespec": 1.0}}, ("direct", "freespec"))
    report["noise"]["freespec"] = "freenoise"
    by_title = {claim.title: claim for claim in CLAIMS}
    assert not_made(by_title["Drift of `sliding_window`"], report) == ["sliding_window"]
    page = write(methods=report)
    assert page.count("Not made: the report has no videos of `sliding_window`.") == 4
    assert "Not made: the report has no measures that this asks for." in page  # freespec against direct: no speed there
    assert "not decided" not in page
    assert (
        "Initial noise: iid of `direct`; freenoise of `freespec`. Differences between methods with different noise"
        in page
    )
    same = report_of({"speed": {"direct": 2.0, "freespec": 1.0}}, ("direct", "freespec"))
    assert "Initial noise: iid for every method." in write(methods=same)
    alone = report_of({"speed": {"direct": 2.0}}, ("direct",))
    assert "Not made: the two reports have no prompt with two methods" in write(steps=alone)


def test_what_a_method_s_own_noise_changes(write: Callable[..., str]) -> None:
    """Paired by prompt, on the pairs of prompt and seed that both reports have, against the same method without it."""
    values = {"speed": {"direct": 1.0, "freelong": 2.5}, "flow_mean": {"direct": 1.0, "freelong": 2.0}}
    own = report_of(values, ("direct", "freelong"))
    own["noise"]["freelong"] = "freenoise"
    values = {name: {"direct": 9.0, "freelong-iid": 2.0} for name in ("flow_mean", "speed", "repetition")}
    same = report_of(values, ("direct", "freelong-iid"))
    same["comparison"]["variants"]["freelong-iid"]["method.name"] = "freelong"
    for each in same["videos"]:
        if (each["prompt_index"], each["seed"]) == (3, 1):  # not in the other report: it would move the mean
            each["seed"] = 5
            each["values"]["speed"] = 100.0
    found = {each.metric: each for each in noise_effects(own, same)}
    assert found.keys() == {"speed", "flow_mean"}  # of what both measured, and of no method whose noise is one
    assert found["speed"].method == "freelong"
    assert (found["speed"].difference.mean, found["speed"].difference.count) == (0.5, 8)
    assert (found["speed"].difference.leaves_out_zero, found["flow_mean"].difference.leaves_out_zero) == (True, False)
    page = write(methods=own, noise=same)
    assert "In 1 of 2 the interval leaves out 0" in page
    assert "| `speed` (px) | **+0.5 [+0.5, +0.5]** |\n| `flow_mean` (px) | 0 [0, 0] |" in page
    assert page.count("| direct | 1 | 0.5 |") == 1  # no second table of times


def other_settings(report: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return report | {"comparison": report["comparison"] | {"settings": SETTINGS | settings}}


def test_reports_of_different_runs_are_not_mixed(put: Callable[..., None], findings_of: Callable[[], Run]) -> None:
    tables = report_of({"speed": {"direct": 2.0, "freespec": 1.0}}, ("direct", "freespec"))
    put(methods=tables, analysis=other_settings(analysis_of(1.0), checkpoint="def"))
    error = findings_of().error
    assert "methods/report.json and " in error
    assert "analysis/report.json are of different runs: checkpoint is abc in the first and def in the second" in error
    # Spectra and the search are of other lengths and steps; tables are not, but for what `steps` is for.
    put(analysis=other_settings(analysis_of(1.0), **{"video.num_frames": 141}), calibration=calibration_of())
    put(steps=other_settings(tables, **{"sampler.num_steps": 10}))
    assert findings_of().code == 0
    put(ablation=other_settings(tables, **{"sampler.num_steps": 10}))
    assert "sampler.num_steps is 20 in the first and 10 in the second" in findings_of().error
    changed = copy.deepcopy(tables)
    changed["comparison"]["variants"]["freespec"]["method.freespec.alpha"] = 2.0
    tables["comparison"]["variants"]["freespec"]["method.freespec.alpha"] = 5.0
    put(methods=tables, ablation=changed)
    assert "freespec.method.freespec.alpha is 5.0 in the first and 2.0 in the second" in findings_of().error


def test_continued_videos_of_two_models_are_made_alike(
    put: Callable[..., None], findings_of: Callable[[], Run]
) -> None:
    """Each report is of its model, and of the two only the model and its weights differ."""

    def continued(model: dict[str, str], **settings: Any) -> dict[str, Any]:
        told = {"checkpoint": "abc", "video.num_frames": [129], "sampler.num_steps": 6, "sampler.guidance_scale": 2.5}
        return {"comparison": {"settings": model | told | settings}, "videos": []}

    ltx, wan = {"model": "tiny/ltx"}, {"model": "tiny/wan"}
    tables = report_of({"speed": {"direct": 2.0, "freespec": 1.0}}, ("direct", "freespec"))
    put(methods=tables, extensions=continued({}), **{"extensions-ltx": continued(ltx, checkpoint="def")})
    assert findings_of().code == 0
    put(**{"extensions-ltx": continued(ltx, checkpoint="def", **{"sampler.guidance_scale": 5.0})})
    error = findings_of().error
    assert (
        "extensions-ltx/report.json are of different runs: sampler.guidance_scale is 2.5 in the first and 5.0" in error
    )
    put(**{"extensions-ltx": continued(wan)})
    assert "extensions-ltx/report.json is of tiny/wan, and is not the report of that model" in findings_of().error
    put(extensions=continued(ltx), **{"extensions-ltx": continued(ltx)})
    assert "extensions/report.json is of tiny/ltx, and is not the report of that model" in findings_of().error
    put(extensions=continued(wan, checkpoint="def"), **{"extensions-ltx": continued(ltx)})
    assert "checkpoint is abc in the first and def in the second" in findings_of().error


def test_tables_of_other_prompts_are_not_paired(put: Callable[..., None], findings_of: Callable[[], Run]) -> None:
    tables = report_of({"speed": {"direct": 2.0, "freespec": 1.0}}, ("direct", "freespec"))
    fewer = tables | {"comparison": tables["comparison"] | {"prompts": [*"abc"]}}
    put(methods=tables, ablation=fewer)
    assert findings_of().code == 0
    put(ablation=tables | {"comparison": tables["comparison"] | {"prompts": [*"abX"]}})
    error = findings_of().error
    assert 'ablation/report.json are of different prompts: number 2 is "c" in the first and "X" in the second' in error


def test_agreeing_prompts_are_counted_beside_a_mean_that_few_decide() -> None:
    report = report_of({"up": {"a": 0.0, "b": 0.0}}, ("a", "b"))
    for each in report["videos"]:
        if each["label"] == "a" and each["values"]["up"] is not None:
            each["values"]["up"] += 100.0 if each["prompt_index"] == 0 else -1.0 if each["prompt_index"] < 3 else 0.0
    (answer,) = answers(CLAIM, report)
    assert answer.difference.mean > 0
    assert (answer.agreeing, answer.difference.count) == (1, 8)


def test_a_plot_that_lies_beside_the_page_is_not_copied(run: Callable[..., Run], tmp_path: Path) -> None:
    kept = tmp_path / "docs/findings/analysis"
    kept.mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    (kept / "report.json").write_text(json.dumps(analysis_of(-1.0)))
    (kept / "rank-progress.png").write_bytes(b"a plot")
    words = {"runs": tmp_path / "runs", "kept": kept.parent, "page": tmp_path / "docs/a.md"}
    assert run("findings", *(f"--{key}={value}" for key, value in words.items())).code == 0
    page = (tmp_path / "docs/a.md").read_text()
    assert "each window](findings/analysis/rank-progress.png)" in page
    assert "measures of every video are in [findings](findings)" in page
    assert not (tmp_path / "docs/figures").exists()


@pytest.mark.parametrize("name", [*TABLES, *KEPT])
def test_mistakes_are_one_line(
    put: Callable[..., None], findings_of: Callable[[], Run], tmp_path: Path, name: str
) -> None:
    for nothing in ({}, [], None, {"comparison": {"settings": 3}}):
        put(**{name: nothing})
        error = findings_of().error
        assert (
            f"{name}/report.json lacks comparison/settings/checkpoint: it is from another command or an older" in error
        )
    next(tmp_path.rglob("report.json")).write_text("{")
    assert "make it again" in findings_of().error


def test_a_folder_that_is_mistyped_does_not_empty_the_page(run: Callable[..., Run], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("hours of work")
    words = {"runs": tmp_path, "kept": tmp_path, "page": page}
    for flag in ("runs", "kept"):
        mistyped = words | {flag: tmp_path / "typo"}
        shown = run("findings", *(f"--{key}={value}" for key, value in mistyped.items()))
        assert shown.error == f"--{flag} {tmp_path / 'typo'} is not a folder; give the folder of `make findings`"
    assert page.read_text() == "hours of work"


def test_a_video_without_a_measure_of_the_table_is_one_line(
    put: Callable[..., None], findings_of: Callable[[], Run]
) -> None:
    report = report_of({"speed": {"direct": 2.0, "freespec": 1.0}}, ("direct", "freespec"))
    del report["videos"][-1]["values"]["speed"]
    put(methods=report)
    assert "methods/report.json lacks speed of freespec" in findings_of().error


def test_low_rank_of_an_older_report_is_one_line_and_of_one_ratio_is_not_measured(
    put: Callable[..., None], write: Callable[..., str], findings_of: Callable[[], Run]
) -> None:
    report = analysis_of(-1.0)
    report["low_rank"] = [row for row in report["low_rank"] if row["ratio"] == 1.0]
    assert "lose motion and detail?\n\nNot measured yet." in write(analysis=report)
    del report["low_rank"][0]["difference"]
    put(analysis=report)
    assert (
        "analysis/report.json lacks difference of low_rank: it is from another command or an older"
        in findings_of().error
    )


def test_a_page_is_written_by_one_run_at_a_time(run: Callable[..., Run], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    (tmp_path / "runs").mkdir()
    command = ("findings", "--runs", tmp_path / "runs", "--kept", tmp_path, "--page", page)
    with claims.claim([page], advice="-"):
        error = run(*command).error
    assert error.startswith(f"{page} is being made by process {os.getpid()} on ")
    assert error.endswith("; wait for it, or choose another --page")
    assert not page.exists()
    assert run(*command).code == 0
    assert page.exists()


def test_the_page_begins_with_what_the_rows_of_the_ablation_say(write: Callable[..., str], tmp_path: Path) -> None:
    """Means, marks and readings are those of the tables below; without one of its rows the section is left out."""
    labels = {"methods": ("direct", "sliding_window", "freespec"), "ablation": (*overview.ROWS, "freespec")}
    reports = {}
    for name, of in labels.items():
        made = report_of({metric: dict.fromkeys(of, 1.0) for metric in overview.METRICS}, of)
        for place, row in enumerate(made["summary"]):
            value = float(place)
            row["mean"] = {"mean": value, "low": value, "high": value, "count": 8}
            row |= {"difference": row["mean"] | {"mean": -value}, "differs": row["label"] == "RA+TA"}
        reports[name] = made
    page = write(**reports)
    assert page.startswith(
        "# Findings on the embedded model\n\n**In short**, on 16 videos of each method (129 frames, 20 steps;"
    )
    assert "| RA+TA: and weights by rank and time | **2 [2, 2]** | **7 [7, 7]** | **12 [12, 12]** |" in page
    assert "(GB to LB-fixed): `speed_error` 0 to 1, `repetition` 5 to 6," in page
    assert "without it less `speed_error` and `repetition` and `motion_as_captioned` and `rgb_drift`." in page
    assert "FreeSpec**, against `direct`: not decided: `speed_error`" in page
    assert (tmp_path / "docs/figures/findings-parts.png").is_file()
    assert not can_tell({**reports, "ablation": None})


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose commands write down their arguments and a plot; `compare.py` fails on its second shard if told to."""
    (tmp_path / "launch").mkdir()
    script = (
        "import json, pathlib, sys\n"
        f"log = pathlib.Path({str(tmp_path / 'log')!r})\n"
        "log.mkdir(exist_ok=True)\n"
        "(log / f'{len(sys.argv)}-{sys.argv[-1].replace(chr(47), chr(45))[-20:]}.json').write_text(json.dumps(sys.argv[1:]))\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "out.mkdir(parents=True, exist_ok=True)\n"
        "(out / 'plot.png').write_text('a plot')\n"
        f"sys.exit(3 if sys.argv[-1] == '2/3' and pathlib.Path({str(tmp_path / 'fail')!r}).exists() else 0)\n"
    )
    for name in ("compare", "analyze"):
        (tmp_path / f"launch/{name}.py").write_text(script)
    monkeypatch.setattr(findings, "REPOSITORY", tmp_path)
    return tmp_path / "log"


def test_a_comparison_is_made_in_shards_and_an_analysis_once(tmp_path: Path, commands: Path) -> None:
    study = read_parts(tmp_path, study_of(tmp_path))
    make_parts(study, ["spectra", "videos"])
    made = [json.loads(path.read_text()) for path in commands.iterdir()]
    assert sorted(words[-1] for words in made if "--shard" in words) == ["1/3", "2/3", "3/3"]
    assert len(made) == 4
    assert (tmp_path / "kept/spectra/plot.png").read_text() == "a plot"
    for path in commands.iterdir():
        path.unlink()
    make_parts(study, ["spectra"])
    assert list(commands.iterdir()) == []


def test_failed_shard_is_reported(tmp_path: Path, commands: Path) -> None:
    (tmp_path / "fail").touch()
    with pytest.raises(PartFailedError, match=r"videos: 1 of 3 processes of compare.py failed, see above"):
        make_parts(read_parts(tmp_path, study_of(tmp_path)), ["videos"])
    assert len(list(commands.iterdir())) == 3
