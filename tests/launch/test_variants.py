"""Variants of a comparison: labels, presets, import paths, and which settings each has."""

import dataclasses
import itertools
import json
import math
import re
import subprocess
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from engine.batch.variants import Variant
from engine.config import FreeSpec
from engine.errors import UserError
from engine.paths import REPOSITORY
from engine.planner.arrange import choose_degrees
from engine.planner.model import read_model
from engine.ranks.layouts import check_layout
from evaluation.calibration.space import START, draw_trials
from evaluation.calibration.videos import CalibrationPlan, Part
from evaluation.comparison.kept_measures import read_kept
from evaluation.comparison.store import Comparison
from evaluation.study.claims import CLAIMS
from evaluation.study.parts import read_study
from evaluation.study.sections import report_command
from launch.arguments.compare import METHODS
from launch.arguments.findings import read as read_arguments
from launch.arguments.prompts import read_prompts
from launch.arguments.variants import read_variants
from launch.batching.comparison import model_facts
from metrics.video import VIDEO_UNITS
from tests.launch.test_presets import ROWS as TABLE_3


def read(text: str, *argv: str) -> list[Variant]:
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--methods", type=str)

    return read_variants(text, argv, name="test", add_arguments=add_arguments)


def test_methods_presets_and_names(tmp_path: Path) -> None:
    preset = tmp_path / "ra.yaml"
    preset.write_text("method:\n  name: freespec\n  freespec:\n    time: false\n")
    found = read(
        f"direct,freespec:{preset},mine=freespec,freespec.methods.low_rank:LowRank", "--sampler.num_steps", "7"
    )
    assert [variant.label for variant in found] == [
        "direct",
        "freespec-ra",
        "mine",
        "freespec.methods.low_rank:LowRank",
    ]
    assert [variant.config.method.name for variant in found] == [
        "direct", "freespec", "freespec", "freespec.methods.low_rank:LowRank"
    ]  # fmt: skip
    assert [variant.config.method.freespec.time for variant in found] == [True, False, True, True]
    assert {variant.config.sampler.num_steps for variant in found} == {7}
    assert found[1].settings["method.freespec.time"] is False
    assert not any(key.startswith("video.") for key in found[1].settings)


def test_the_command_overrides_a_preset_of_a_variant(tmp_path: Path) -> None:
    preset = tmp_path / "a.yaml"
    preset.write_text("method:\n  freespec:\n    alpha: 1.0\n    beta: 2.0\n")
    (variant,) = read(f"freespec:{preset}", "--method.freespec.alpha=4.0")
    assert (variant.config.method.freespec.alpha, variant.config.method.freespec.beta) == (4.0, 2.0)


def test_a_preset_may_not_change_what_all_share(tmp_path: Path) -> None:
    preset = tmp_path / "a.yaml"
    preset.write_text("video:\n  num_frames: 65\nsampler:\n  noise: freenoise\n  num_steps: 3\n")
    with pytest.raises(UserError, match=r"freespec-a changes sampler.num_steps, video.num_frames, which all"):
        read(f"freespec:{preset}")
    preset.write_text("sampler:\n  noise: freenoise\n")
    (variant,) = read(f"freespec:{preset}")
    assert variant.config.noise[0] == "freenoise"


def test_variants_that_differ_in_unused_settings_are_equal(tmp_path: Path) -> None:
    preset = tmp_path / "a.yaml"
    preset.write_text("method:\n  freepca:\n    stride: 2\n")
    assert [each.label for each in read(f"freepca,freepca:{preset}")] == ["freepca", "freepca-a"]
    with pytest.raises(UserError, match="freespec and freespec-a have the same settings, as far as their method reads"):
        read(f"freespec,freespec:{preset}")
    for text in ("attention:\n  riflex:\n    enabled: true\n", "sampler:\n  noise: freenoise\n"):
        preset.write_text(text)
        assert len(read(f"direct,direct:{preset}")) == 2
    with pytest.raises(UserError, match="direct and again have the same settings"):
        read("direct,again=freespec.methods.direct:Direct")


def test_an_index_without_riflex_is_refused(tmp_path: Path) -> None:
    preset = tmp_path / "a.yaml"
    preset.write_text("attention:\n  riflex:\n    index: 2\n")
    with pytest.raises(
        UserError, match="index 2 has no effect while enabled is false; set enabled true, or index null"
    ):
        read(f"direct,direct:{preset}")


def test_the_stride_of_the_method_s_own_noise_is_among_the_settings() -> None:
    """Or a folder would take videos of another noise for its own."""
    (plain,), (own,) = read("freenoise"), read("freenoise", "--method.freenoise.stride", "1")
    assert (plain.settings["sampler.noise_stride"], own.settings["sampler.noise_stride"]) == (None, 1)
    (by_name,) = read("freenoise", "--method.freenoise.stride", "1", "--sampler.noise", "freenoise")
    assert by_name.settings["sampler.noise_stride"] is None


def test_the_run_s_own_presets_come_first(tmp_path: Path) -> None:
    run, preset = tmp_path / "run.yaml", tmp_path / "a.yaml"
    run.write_text(
        "model: {path: tiny/wan}\nvideo: {num_frames: 33, height: 64, width: 64}\n"
        "method: {window_frames: 5, freespec: {alpha: 1.5}}\n"
    )
    preset.write_text("method: {freespec: {alpha: 2.5}}\n")
    plain, changed = read(f"freespec,freespec:{preset}", "--config", str(run))
    assert (plain.config.method.freespec.alpha, changed.config.method.freespec.alpha) == (1.5, 2.5)
    assert plain.config.method.window_frames == changed.config.method.window_frames == 5


ROWS = {  # labels in the tables, and presets; freespec is T-GR itself
    "GB": "gb",
    "LB-fixed": "lb_fixed",
    "RA": "ra",
    "TA": "ta",
    "RA+TA": "ra_ta",
    "F-GR": "f_gr",
    "freespec": "t_gr",
}


STUDY = read_study("configs/study/findings.yaml", {})


def methods_of(part: str, report: str | None = None) -> str:
    """The list of methods that a part of the study makes, or that one of its reports is on."""
    settings = STUDY.parts[part].settings
    return (settings if report is None else settings | STUDY.parts[part].reports[report])["methods"]


@pytest.mark.parametrize(("name", "steps"), [("videos", "20"), ("steps", "10")])
def test_what_the_repository_keeps_is_of_today_s_settings(tmp_path: Path, name: str, steps: str) -> None:
    """Or `make findings` of a fresh clone would refuse hours of work: settings, weights and measures must be those."""
    variants = read(methods_of("videos"), f"--sampler.num_steps={steps}", "--model.device=cpu")
    prompts = read_prompts(None, "configs/prompts/world-heldout-40.txt").texts
    path = REPOSITORY / f"docs/findings/{name}.jsonl"
    model = model_facts(variants[0].config)
    kept = read_kept(
        Comparison(folder=tmp_path, model=model, variants=variants, prompts=prompts, seeds=[0, 1], kept_file=path)
    )
    assert len(kept) == len(path.read_text().splitlines()) - 1
    # All that the page needs of either, so that `make findings` has nothing to make.
    needed = {"videos": ([each.label for each in variants], 2), "steps": (["direct", "sliding_window", "freespec"], 1)}
    labels, num_seeds = needed[name]
    assert {*itertools.product(labels, range(len(prompts)), range(num_seeds))} <= set(kept)
    for each in kept.values():
        assert len(each.record["steps"]) == int(steps)  # also of a video that was continued
        assert all(math.isfinite(each.values[metric]) for metric in VIDEO_UNITS)


def test_ranks_are_arranged_for_the_method_that_the_fewest_layouts_serve(tmp_path: Path) -> None:
    """Three ranks do not divide four heads, and the rule for `direct` is a ring, which three of the methods cannot have."""
    variants = read("direct,freenoise,freespec", "--model.device=cpu")
    facts = model_facts(variants[0].config)
    compared = Comparison(folder=tmp_path, model=facts, variants=variants, prompts=["a"], seeds=[0])
    spec = read_model(compared.config.model)
    degrees = [choose_degrees(config, spec, 3, None)[0] for config in (compared.arranged_for, compared.config)]
    assert degrees == [(1, 1, 3), (1, 3, 1)]
    for variant in variants:
        check_layout(variant.label, variant.config.method.method, degrees[0])
    with pytest.raises(UserError, match="freenoise cannot run as cfg 1 x ring 3"):
        check_layout("freenoise", variants[1].config.method.method, degrees[1])
    same = Comparison(folder=tmp_path, model=facts, variants=read("direct,freespec"), prompts=["a"], seeds=[0])
    assert same.arranged_for is same.config


@pytest.mark.parametrize("part", ["search", "judged"])
def test_what_the_repository_keeps_of_the_search_is_of_today_s_settings(tmp_path: Path, part: Part) -> None:
    """Or `make calibrate` would refuse it: settings, lists of values, their draw, weights and measures must be those."""
    (variant,) = read("freespec", "--model.device=cpu")
    folder = REPOSITORY / "docs/findings/calibration"
    report = json.loads((folder / "report.json").read_text())
    trials = draw_trials(12, 0, dataclasses.asdict(variant.config.method.freespec))
    assert trials == report["trials"]
    plan = CalibrationPlan(
        folder=tmp_path,
        model=model_facts(variant.config),
        config=variant.config,
        trials=trials,
        num_steps={"search": 20, "judged": 20},
        seeds={"search": (0,), "judged": (0,)},
        kept_folder=folder,
    )
    lists = {"search": "world-calibration-20", "judged": "world-heldout-40"}
    assert report["judged"] is not None, (
        "no trial was better: nothing is judged, and this test has nothing to hold against it"
    )
    labels = list(trials) if part == "search" else [START, report["best"]]
    prompts = read_prompts(None, f"configs/prompts/{lists[part]}.txt").texts
    kept = read_kept(plan.compared(part, labels, prompts))
    videos = {
        (label, prompt) for each in report["rounds"] for label in each["scores"] for prompt in range(each["prompts"])
    }
    count = len(videos) if part == "search" else 2 * report["judged"]["prompts"]
    assert len(kept) == len((folder / f"{part}.jsonl").read_text().splitlines()) - 1 == count


def test_the_study_makes_six_methods_and_the_seven_rows_of_the_table() -> None:
    """The committed study itself; the last row is freespec and is not made twice."""
    made, few = (read(methods_of(part)) for part in ("videos", "steps"))
    methods, same, rows = (read(methods_of("videos", report)) for report in ("methods", "noise", "ablation"))
    studied = METHODS.split(",")
    assert [variant.label for variant in methods] == studied
    assert [variant.label for variant in rows] == list(ROWS)
    of_iid = [variant.label for variant in same if variant.label not in studied]
    assert [variant.label for variant in made] == [*studied, *(label for label in ROWS if label != "freespec"), *of_iid]
    # The same six methods, all from the draw itself.
    assert [variant.config.method.name for variant in same] == studied
    assert of_iid == ["freenoise-iid", "freelong-iid", "freepca-iid"]
    assert {variant.config.noise[0] for variant in same} == {"iid"}
    by_label = {variant.label: variant for variant in made}
    for variant in [*methods, *same, *rows, *few]:
        assert variant.settings == by_label[variant.label].settings
    switches = ("basis", "rank", "time", "residual")
    for row in rows:
        found = row.config.method.freespec
        assert tuple(getattr(found, name) for name in switches) == TABLE_3[ROWS[row.label]]
        # All else is as published, so that a difference of two rows is that of their switches.
        assert dataclasses.replace(found, **{name: getattr(FreeSpec(), name) for name in switches}) == FreeSpec()
    (published,) = read("freespec:configs/ablation/t_gr.yaml")
    assert published.settings == by_label["freespec"].settings
    assert {claim.method for claim in CLAIMS} | {claim.other for claim in CLAIMS} == {variant.label for variant in few}
    # The command of a claim on the page is a report on the same videos, if it says what the tables' own says.
    report = {"comparison": {"settings": {"device": "cpu"}}, "videos": [{"seed": 0}, {"seed": 1}, {"seed": 0}]}
    command = report_command(report, runs=REPOSITORY / "runs/findings", kept=REPOSITORY / "docs/findings")
    first = next(STUDY.reports())
    assert set(command.removesuffix("--report runs/claim").split()[2:]) <= {*first}
    of_your_own = report_command(report, runs=Path("/elsewhere/runs"), kept=Path("/elsewhere/kept"))
    assert "--measures /elsewhere/kept/videos.jsonl --out /elsewhere/runs " in of_your_own
    settings = STUDY.parts["steps"].settings
    assert (settings["sampler.num_steps"], settings["measures"]) == ("10", "docs/findings/steps.jsonl")
    assert STUDY.parts["videos"].settings["prompts"] == "configs/prompts/world-heldout-40.txt"
    assert rows[0].config.sampler.num_steps == 20


def test_tables_and_search_of_your_own_take_nothing_from_the_repository() -> None:
    places = {"kept": "runs/again/kept", "runs": "runs/again", "search": "runs/again/search", "page": "runs/again.md"}
    own = [
        "make",
        "-n",
        "findings",
        "calibrate",
        f"ARGS={' '.join(f'--{name} {place}' for name, place in places.items())}",
    ]
    shown = subprocess.run(own, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
    commands = [line.split()[2:] for line in shown.splitlines() if "launch/findings.py" in line]
    assert [command[:2] for command in commands] == [["--make", "analysis,videos,steps"], ["--make", "calibration"]]
    study = read_arguments(commands[0]).study
    settings = {name: part.settings for name, part in study.parts.items()}
    assert not re.findall(r"docs/findings|runs/findings|runs/calibration", str(settings) + str(study.places))
    assert [str(place) for place in study.places.values()] == [
        places[name] for name in ("runs", "search", "kept", "page")
    ]
    # Nor is anything reported that was not made.
    assert list(study.reports()) == []
    # A search is made and judged with the steps that the tables have, and so are the spectra.
    assert not {"sampler.num_steps", "search_num_steps"} & {*settings["analysis"], *settings["calibration"]}
    trials = {name: settings["calibration"][name] for name in ("num_trials", "rounds", "judge_seeds")}
    assert trials == {"num_trials": "12", "rounds": "4,8", "judge_seeds": "0"}
