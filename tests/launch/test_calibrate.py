"""calibrate.py: its draws, its score, which trials go on, what supports a change; and a whole search on a small model."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml

from engine.config import FreeSpec, RunConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from evaluation.calibration.score import judge, survivors
from evaluation.calibration.space import END_SHARES, SETTINGS, SPACE, START, draw_trials
from evaluation.comparison.quality import parts_of, score_of
from launch.arguments.replicas import Replicas
from launch.commands import calibrate
from launch.process.exit_codes import GivenUpError
from tests.launch.conftest import SMALL, Run
from tests.launch.forked import run_forked
from tests.launch.test_interruptions import interrupted_at_forward
from tiny.prompts import REPORT

DEFAULTS = {name: getattr(FreeSpec(), name) for name in SETTINGS}
PERFECT = {
    "shape_kept": 1.0,
    "colour_kept": 1.0,
    "shape_as_captioned": 1.0,
    "colour_as_captioned": 1.0,
    "background_as_captioned": 1.0,
    "motion_as_captioned": 1.0,
    "speed_error": 0.0,
}


def test_draws_are_seeded_different_and_all_of_the_space() -> None:
    trials = draw_trials(200, 0, DEFAULTS)
    assert list(trials)[:2] == [START, "trial-01"]
    assert trials[START] == DEFAULTS
    assert len({tuple(settings.items()) for settings in trials.values()}) == 200
    for name, values in SPACE.items():
        assert {settings[name] for settings in trials.values()} == set(values) | {DEFAULTS[name]}
    drawn = [settings for label, settings in trials.items() if label != START and settings["lam_start"]]
    assert {round(each["lam_end"] / each["lam_start"], 6) for each in drawn} == set(END_SHARES)
    assert draw_trials(200, 0, DEFAULTS) == trials
    kept = json.loads((Path(__file__).parents[2] / "docs" / "findings" / "calibration" / "report.json").read_text())
    assert draw_trials(len(kept["trials"]), kept["search_seed"], DEFAULTS) == kept["trials"]
    assert (
        list(draw_trials(50, 0, DEFAULTS).items()) == list(trials.items())[:50]
    )  # more trials go on where fewer stopped
    assert draw_trials(50, 1, DEFAULTS) != draw_trials(50, 0, DEFAULTS)
    for settings in trials.values():
        FreeSpec(**settings)


def test_no_more_trials_than_there_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check the draws would go on for ever; with it the last of all settings is still found."""
    one = {name: values[:1] for name, values in SPACE.items()} | {"alpha": (1.0, 2.0), "lam_start": (0.0, 0.2)}
    monkeypatch.setattr("evaluation.calibration.space.SPACE", one)
    # Two alphas; no residual, or one that ends at each of four shares. The start, with other settings, is one more.
    assert len(draw_trials(11, 0, DEFAULTS)) == 11
    with pytest.raises(UserError, match="--num_trials 12 exceeds the 11 different settings"):
        draw_trials(12, 0, DEFAULTS)
    among = dict.fromkeys(SETTINGS) | {name: values[0] for name, values in one.items()} | {"lam_end": 0.0}
    with pytest.raises(UserError, match="--num_trials 11 exceeds the 10 different settings"):
        draw_trials(11, 0, among)


def test_the_score_is_the_mean_of_four_shares() -> None:
    assert score_of(PERFECT) == 1.0
    some = {**PERFECT, "shape_kept": 0.5, "shape_as_captioned": 0.4, "motion_as_captioned": 0.0, "speed_error": 0.5}
    assert parts_of(some) == pytest.approx({"kept": 0.75, "captioned": 0.8, "motion": 0.0, "speed": 0.75})
    assert score_of(some) == pytest.approx(2.3 / 4)
    assert parts_of({**PERFECT, "speed_error": 5.0})["speed"] == 0.0


def test_losing_the_object_gains_nothing() -> None:
    """A measure that could not be made is the worst there is, or a blank video would have the best mean of what is left."""
    for name in PERFECT:
        assert score_of({**PERFECT, name: math.nan}) < 1.0
    assert score_of(dict.fromkeys(PERFECT, math.nan)) == 0.0


def test_the_best_go_on_and_the_start_always() -> None:
    by_label = {START: np.array([0.1]), "a": np.array([0.5]), "b": np.array([0.9]), "c": np.array([0.5])}
    assert survivors(by_label, keep=2, always=START) == ["b", "a", START]
    assert survivors(by_label, keep=1, always=START)[0] == "b"
    assert survivors({START: np.array([0.5]), "a": np.array([0.5])}, keep=1, always=START) == [
        START
    ]  # a tie changes nothing


def test_only_an_interval_above_zero_supports_a_change() -> None:
    start = np.linspace(0.2, 0.8, 20)
    noise = np.tile([0.1, -0.1], 10)
    for gain, supported in ((0.2, True), (0.01, False), (-0.2, False)):
        difference, verdict = judge(start + gain + noise, start)
        assert difference.mean == pytest.approx(gain)
        assert verdict == supported == (difference.low > 0)
    assert judge(start[:5] + 1.0, start[:5])[1] is False  # too few prompts for an interval


# Short ones, since the small model's tokenizer counts letters.
SEARCH = ("a red star moves up on a blue background", "a red star moves left on a gray background")
JUDGE = ("a blue star moves up on a gray background", "a red circle moves up on a gray background")


@pytest.fixture
def settings(wan_folder: Path, tmp_path: Path) -> dict[str, object]:
    """A search of three trials on one prompt and then two, on a small model with frames of the world's size."""
    for name, prompts in (("search", SEARCH), ("judge", JUDGE)):
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    small = SMALL | {"video.height": 64, "video.width": 64, "sampler.num_steps": 3, "sampler.max_text_tokens": 60}
    small |= {"search_num_steps": 2}
    small |= {"prompts": tmp_path / "search.txt", "judge_prompts": tmp_path / "judge.txt"}
    small |= {"num_trials": 3, "rounds": "1,2", "judge_seeds": 0, "method.freespec.rank": "false"}
    return small | {"model.path": wan_folder, "out": tmp_path / "out", "measures": tmp_path / "kept"}


@pytest.fixture
def calibrate_in(run: Callable[..., Run], settings: dict[str, object]) -> Callable[..., Run]:
    def call(**others: object) -> Run:
        chosen = settings | others
        return run("calibrate", *(f"--{key}={value}" for key, value in chosen.items() if value is not None))

    return call


def test_a_search_from_start_to_judgement(
    calibrate_in: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The score is replaced, since a random model's is chance: trial-02 is best on one list, and on the other as told."""
    gain = {"search": 0.3, "judged": 0.2}

    def score(measured: list, labels: list[str]) -> dict[str, np.ndarray]:
        found = {}
        for label in labels:
            mine = [each.video for each in measured if each.video.label == label]
            where = mine[0].files.video.parents[3].name
            # Copies of each prompt's number, since two prompts have no interval.
            numbers = [0.5 + 0.1 * video.prompt_index + gain[where] * (label == "trial-02") for video in mine]
            found[label] = np.array(numbers * 4)
        return found

    reports = []  # tested with compare.py, and its plots are what takes long
    monkeypatch.setattr(calibrate, "scores", score)
    monkeypatch.setattr(
        calibrate, "write_report", lambda *args, **settings: reports.append((*args, settings["baseline"]))
    )
    out = tmp_path / "out"
    with interrupted_at_forward(7):  # four forwards a video: in the second of three
        stopped = calibrate_in()
    assert stopped.code == 130
    assert "the same command continues" in stopped.err
    loads = []
    load = LongVideoEngine.__init__
    monkeypatch.setattr(LongVideoEngine, "__init__", lambda self, *args: (loads.append(1), load(self, *args))[1])
    shown = calibrate_in()
    assert (shown.code, shown.err) == (0, "")
    assert loads == [1]
    assert f"trial-02 scores +0.200 against {START} on 2 other prompts (95 % interval +0.200 to +0.200)" in shown.out
    check_search(out)
    (judged, baseline), *more = reports
    assert (judged.folder, [each.label for each in judged.variants], baseline) == (
        out / "judged",
        [START, "trial-02"],
        START,
    )
    assert (judged.prompts, more) == (list(JUDGE), [])
    lines = (out / "trials.csv").read_text().splitlines()
    assert lines[0].split(",") == ["trial", *SETTINGS, "score_1_prompts", "score_2_prompts"]
    assert lines[2].split(",")[0] == "trial-01"
    assert lines[2].split(",")[-1] == ""  # it did not go on

    monkeypatch.setattr("engine.engine.load_pipeline", lambda *_, **__: pytest.fail("the model was loaded"))
    check_kept(calibrate_in, out, tmp_path / "kept")

    # Better on the list it was found on, and not on the other: nothing changes, and the older preset goes.
    gain["judged"] = 0.0
    assert "not supported: the settings stay as they are" in calibrate_in().out
    assert not (out / "calibrated.yaml").exists()
    gain["search"] = 0.0
    assert "no trial was better than the settings that the search began with" in calibrate_in().out


def test_trials_have_the_steps_of_the_judgement_by_default(
    calibrate_in: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def plan(*, num_steps: dict[str, int], **others: object) -> None:
        seen.append(num_steps)
        raise UserError("seen")

    monkeypatch.setattr(calibrate, "CalibrationPlan", plan)
    assert calibrate_in(search_num_steps=None).error
    assert calibrate_in().error
    assert seen == [{"search": 3, "judged": 3}, {"search": 2, "judged": 3}]


def check_kept(calibrate_in: Callable[..., Run], out: Path, kept: Path) -> None:
    """Without its videos the search finds the same, and makes none again."""
    before = (out / "report.json").read_text()
    assert [len((kept / f"{part}.jsonl").read_text().splitlines()) for part in ("search", "judged")] == [6, 5]
    shutil.rmtree(out)
    assert calibrate_in().code == 0
    assert (out / "report.json").read_text() == before
    assert not list(out.rglob("*.mp4"))


def made_in(out: Path) -> list[str]:
    """The videos of a search: part, label and name."""
    paths = [path.relative_to(out).with_suffix("") for path in out.rglob("*.mp4")]
    return [f"{path.parts[0]}/{path.parts[1]}/{path.name}" for path in paths]


def check_search(out: Path) -> None:
    """Its files, when trial-02 was the best."""
    # Three trials on one prompt; of them the best, with the start, on the second; both on the two others.
    assert sorted(made_in(out)) == [
        *(f"judged/{label}/p{index:04d}-s0" for label in (START, "trial-02") for index in (0, 1)),
        *(f"search/{START}/p{index:04d}-s0" for index in (0, 1)),
        "search/trial-01/p0000-s0",
        *(f"search/trial-02/p{index:04d}-s0" for index in (0, 1)),
    ]
    report = json.loads((out / "report.json").read_text())
    assert [len(each["scores"]) for each in report["rounds"]] == [3, 2]
    assert report["trials"] == draw_trials(3, 0, DEFAULTS | {"domain": "step"})
    assert report["judged"]["supported"] is True
    assert report["num_steps"] == {"search": 2, "judged": 3}
    for part, steps in (("search", 2), ("judged", 3)):
        records = [json.loads(path.with_suffix(".json").read_text()) for path in (out / part).rglob("*.mp4")]
        assert {len(record["run"]["steps"]) for record in records} == {steps}
    told = report["comparison"]
    configs = json.loads((out / "judged/batch.json").read_text())["configs"].values()
    assert {told["settings"]["checkpoint"]} == {config["model"]["checkpoint"][:16] for config in configs}
    assert {told["settings"]["sampler.num_steps"]} == {config["sampler"]["num_steps"] for config in configs} == {3}
    assert list(told["variants"]) == [START, "trial-02"]
    # The preset is the method of the judged videos, not only what was searched: laid over another base it says the same.
    text = (out / "calibrated.yaml").read_text()
    assert text.startswith(f"# Judged with 3 steps, 17 frames, checkpoint {told['settings']['checkpoint']}. Laid over")
    (sidecar,) = out.glob("judged/trial-02/*/videos/p0000-s0.json")
    made = json.loads(sidecar.read_text())["run"]["config"]["method"]
    assert yaml.safe_load(text) == {"method": {key: made[key] for key in ("name", "window_frames", "freespec")}}
    assert made["freespec"] == asdict(FreeSpec(rank=False)) | report["trials"]["trial-02"]


def the_trial_wins(rank: int) -> None:
    """In a rank: rank 0 alone scores, and the others would fail if they did."""

    def score(measured: list, labels: list[str]) -> dict[str, np.ndarray]:
        assert rank == 0
        return {label: np.full(8, float(label != START)) for label in labels}

    calibrate.scores = score
    calibrate.write_report = lambda *_, **__: ""


def test_two_ranks_search_together_and_the_first_scores(settings: dict[str, object], tmp_path: Path) -> None:
    chosen = settings | {"num_trials": 2, "rounds": "1"}
    argv = [f"--{key}={value}" for key, value in chosen.items()]
    ended = run_forked([argv, argv], tmp_path, script="calibrate", fault=the_trial_wins)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert ended[1].out == ""
    assert "trial-01 scores +1.000 against start on 2 other prompts" in ended[0].out
    made = set(made_in(tmp_path / "out"))
    pairs = [("search", 0), ("judged", 0), ("judged", 1)]
    assert made == {f"{part}/{label}/p{i:04d}-s0" for part, i in pairs for label in (START, "trial-01")}


@pytest.mark.slow
def test_replicas_search_as_one_process_does(
    calibrate_in: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(calibrate, "write_report", lambda *_, **__: "")
    reports = []
    for name, replicas in (("one", None), ("two", 2)):
        given = {"out": tmp_path / name, "measures": None, "num_trials": 2, "rounds": "1", "replicas": replicas}
        assert calibrate_in(**given).code == 0
        reports.append((tmp_path / name / "report.json").read_text())
    assert reports[0] == reports[1]
    first, second = (sorted((tmp_path / name).rglob("*.mp4")) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert len(list((tmp_path / "two").glob("*/logs/shard-1-of-1/replica-1-rank0.log"))) >= 1


def test_a_video_that_replicas_give_up_ends_the_search(
    calibrate_in: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores would be over other prompts."""
    asked: list[tuple[int, Path]] = []

    def give_up(config: RunConfig, replicas: Replicas, *_: object) -> None:
        asked.append((replicas.replicas, replicas.out))
        raise GivenUpError("1 items failed for good")

    monkeypatch.setattr("launch.batching.comparison.make", give_up)
    shown = calibrate_in(replicas=2)
    assert (shown.code, shown.err) == (1, "error: 1 items failed for good\n")
    assert asked == [(2, tmp_path / "out" / "search")]
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method.name": "direct"}, "searches the settings of freespec, not of direct"),
        ({"measures": "/dev/null"}, "cannot write"),
        ({"replicas": 0}, "--replicas must be 1 or more, got 0"),
        ({"num_trials": 1}, "--num_trials must be 2 or more, got 1"),
        ({"search_num_steps": 0}, "--search_num_steps must be 1 or more, got 0"),
        ({"judge_seeds": "0,0"}, "--judge_seeds needs at least one entry and no duplicates"),
        ({"output.trace": "true"}, "output.trace is not used by calibrate.py"),
        ({"video.num_frames": 9}, "every trial makes the video of the base model; search on a longer one, such as"),
        ({"rounds": "2,1"}, "--rounds must be numbers of prompts that grow"),
        ({"rounds": "a"}, "--rounds must be whole numbers"),
        ({"rounds": "1,3"}, "--rounds asks for 3 prompts, and --prompts has 2"),
        ({"judge_prompts": None}, "--judge_prompts is needed"),
        (
            dict.fromkeys(("prompts", "judge_prompts"), f"configs/prompts/{REPORT}"),
            "a prompt is in both lists",
        ),
        ({"prompts": "configs/prompts/batch-demo.txt", "video.height": 32}, "frames of the world are 64 x 64"),
    ],
)
def test_mistakes_are_one_line(calibrate_in: Callable[..., Run], wrong: dict[str, object], message: str) -> None:
    assert message in calibrate_in(**wrong).error
