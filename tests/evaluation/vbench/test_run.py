"""The launcher against a checkout that plays VBench: what a process is given, and every way in which it can end."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import UserError
from evaluation.vbench import bench, run
from evaluation.vbench.bench import Bench, Evaluator, environment, sources
from evaluation.vbench.dimensions import DIMENSIONS
from evaluation.vbench.run import Outcome, evaluate, failures
from evaluation.vbench.stage import View, plan_view
from evaluation.videos import groups, read_batch
from tests.evaluation.vbench.fake_vbench import calls, ends, set_plan

FEW = ("subject_consistency", "dynamic_degree")


@pytest.fixture
def scores(batch: Path, tmp_path: Path, evaluator: Callable[..., Evaluator]) -> Callable[..., list[Outcome]]:
    """`scores(*dimensions)`: evaluate the batch's first method into tmp_path/out, as the command does."""

    def call(*dimensions: str, **changes: object) -> list[Outcome]:
        chosen = dimensions or FEW
        tool, out = evaluator_of(evaluator, changes), tmp_path / "out"
        # `preflight` without its process, which has tests of its own.
        found = Bench(commit=None, sources=sources(tool.checkout), probe={"versions": {}})
        view = first_view(batch, out)
        keep = bool(changes.get("keep_views"))
        return evaluate([view], chosen, evaluator=tool, bench=found, folder=out, say=lambda line: None, keep_views=keep)

    return call


def evaluator_of(make: Callable[..., Evaluator], changes: dict[str, object]) -> Evaluator:
    """An evaluator; made once per test, changed afterwards."""
    return make(**{key: value for key, value in changes.items() if key != "keep_views"})


def first_view(batch: Path, out: Path) -> View:
    """The view of the method `direct`."""
    return plan_view("direct", groups(read_batch(batch))["direct"], out / "views")


def test_all_six_dimensions_are_scored_each_in_a_process_of_its_own(
    scores: Callable[..., list[Outcome]], tmp_path: Path
) -> None:
    outcomes = scores(*DIMENSIONS)
    assert [(o.dimension, o.error) for o in outcomes] == [(d, None) for d in DIMENSIONS]
    asked = calls(tmp_path / "home")
    assert [call["dimension"] for call in asked] == list(DIMENSIONS)
    assert len({call["argv"][call["argv"].index("--out") + 1] for call in asked}) == 6
    for outcome in outcomes:
        assert set(outcome.scores.videos) == {"p0000-0", "p0000-1", "p0001-0", "p0001-1"}
        assert abs(outcome.scores.headline - outcome.scores.video_mean) < 1e-9
    assert not (tmp_path / "out" / "views" / outcomes[0].view.folder.name).exists()


def test_a_process_is_offline_at_home_in_the_weights_and_sees_nothing_of_ours(
    scores: Callable[..., list[Outcome]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("PYTHONPATH", "/x"),
        ("RANK", "3"),
        ("TORCH_HOME", "/y"),
        ("HF_HUB_OFFLINE", "0"),
        ("KEPT", "1"),
    ):
        monkeypatch.setenv(name, value)
    scores("dynamic_degree", environment=dict(os.environ))
    (call,) = calls(tmp_path / "home")
    found, home = call["environment"], tmp_path / "home"
    assert found["HOME"] == str(home)
    assert found["TORCH_HOME"] == str(home / ".cache/torch")
    assert found["VBENCH_CACHE_DIR"] == str(home / ".cache/vbench")
    assert (found["HF_HUB_OFFLINE"], found["TRANSFORMERS_OFFLINE"], found["KEPT"]) == ("1", "1", "1")
    assert not {"PYTHONPATH", "RANK"} & set(found)
    assert call["path"][0] == str(tmp_path / "VBench")
    assert str(Path(run.__file__).parent) not in call["path"]
    assert (call["local"], call["read_frame"], call["dev_flag"], call["name"]) == (True, False, True, "dynamic_degree")
    assert call["parent"] == os.getpid()


def test_a_download_fails_at_once(scores: Callable[..., list[Outcome]], tmp_path: Path) -> None:
    set_plan(tmp_path / "home", dynamic_degree="download")
    (outcome,) = scores("dynamic_degree")
    assert "Connection refused" in outcome.error  # and not "timed out"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("fail", "ended with code 3: CUDA out of memory"),
        ("kill", "was ended by SIGKILL"),
        ("silent", "VBench wrote no dynamic_degree_eval_results.json"),
        ("cut", "is not JSON"),
        ("nan", "nan, not a number"),
        ("foreign", "has other-0, which is not one of the 4 videos"),
        ("drop_clip", "has 2 clips, 3 were expected"),
    ],
)
def test_a_dimension_that_fails_costs_itself_alone_and_is_made_again(
    scores: Callable[..., list[Outcome]], tmp_path: Path, how: str, said: str
) -> None:
    set_plan(tmp_path / "home", dynamic_degree=how)
    good, bad = scores()
    assert good.error is None
    assert said in bad.error
    assert failures([good, bad]) == [f"direct, dynamic_degree: {bad.error}"]
    assert "\n" not in bad.error
    set_plan(tmp_path / "home")
    again = scores()
    assert [o.error for o in again] == [None, None]
    assert again[0].scores == good.scores
    assert [call["dimension"] for call in calls(tmp_path / "home")] == [*FEW, "dynamic_degree"]


def test_a_process_that_hangs_is_ended_with_its_children(scores: Callable[..., list[Outcome]], tmp_path: Path) -> None:
    set_plan(tmp_path / "home", dynamic_degree="hang")
    (outcome,) = scores("dynamic_degree", time_limit=15.0)  # time to start it and its child on a busy machine
    assert outcome.error == "took longer than 15 s"
    pids = [int(pid) for pid in (tmp_path / "home" / "pids").read_text().split()]
    assert len(pids) == 2
    assert all(ends(pid) for pid in pids)


def test_an_interruption_ends_the_process_and_passes_on(
    scores: Callable[..., list[Outcome]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_plan(tmp_path / "home", dynamic_degree="hang")
    waiting = run.ThreadPoolExecutor.map
    pids = tmp_path / "home" / "pids"

    def interrupted(self: object, *args: object) -> object:
        waiting(self, *args)
        while not pids.exists():
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(run.ThreadPoolExecutor, "map", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scores("dynamic_degree")
    assert all(ends(int(pid)) for pid in pids.read_text().split())


def test_a_second_run_reads_what_the_first_made(scores: Callable[..., list[Outcome]], tmp_path: Path) -> None:
    first = scores()
    assert [o.scores for o in scores()] == [o.scores for o in first]
    assert len(calls(tmp_path / "home")) == 2


def test_other_videos_or_another_vbench_are_scored_again(scores: Callable[..., list[Outcome]], tmp_path: Path) -> None:
    scores("dynamic_degree")
    code = tmp_path / "VBench" / "vbench2_beta_long" / "__init__.py"
    code.write_text(code.read_text() + "\n# another version\n")
    scores("dynamic_degree")
    assert len(calls(tmp_path / "home")) == 2
    (done,) = (tmp_path / "out" / "results").glob("*/dynamic_degree/done.json")
    tree = json.loads(done.read_text())
    done.write_text(json.dumps(tree | {"identity": tree["identity"] | {"view": "other videos"}}))
    scores("dynamic_degree")
    assert len(calls(tmp_path / "home")) == 3


def test_scores_belong_to_how_vbench_was_asked(
    scores: Callable[..., list[Outcome]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other settings in the driver give other scores: those of before are not taken for them."""
    scores("dynamic_degree")
    changed = tmp_path / "driver.py"
    changed.write_text(bench.DRIVER.read_text() + "\n# other settings\n")
    monkeypatch.setattr(bench, "DRIVER", changed)
    scores("dynamic_degree")
    assert len(calls(tmp_path / "home")) == 2


def test_a_result_that_was_changed_by_hand_is_refused(scores: Callable[..., list[Outcome]], tmp_path: Path) -> None:
    scores("dynamic_degree")
    (result,) = (tmp_path / "out" / "results").glob("*/dynamic_degree/*_eval_results.json")
    result.write_text(result.read_text().replace("0.0", "1.0"))
    with pytest.raises(ValueError, match="was changed after it was written"):
        scores("dynamic_degree")


@pytest.mark.parametrize("how", ["fail", "kill", "hang"])
def test_clips_that_were_cut_halfway_are_not_trusted(
    scores: Callable[..., list[Outcome]], tmp_path: Path, how: str
) -> None:
    set_plan(tmp_path / "home", split=how)
    outcomes = scores(*FEW, time_limit=2.0 if how == "hang" else 60.0)
    assert all("cutting into clips" in outcome.error for outcome in outcomes)
    assert calls(tmp_path / "home") == []
    set_plan(tmp_path / "home")
    assert [o.error for o in scores()] == [None, None]


def test_a_wrong_number_of_clips_is_found_before_anything_is_scored(
    scores: Callable[..., list[Outcome]], tmp_path: Path
) -> None:
    set_plan(tmp_path / "home", clips=2)
    outcomes = scores()
    assert all("should cut it into 3 clips" in outcome.error for outcome in outcomes)
    assert calls(tmp_path / "home") == []


def test_first_frames_of_a_killed_run_are_deleted(scores: Callable[..., list[Outcome]], tmp_path: Path) -> None:
    """Stale ones would be trusted: the fake, as the real one, then has nothing to compare between clips."""
    set_plan(tmp_path / "home", subject_consistency="kill_after_frames")
    (killed,) = scores("subject_consistency")
    assert "SIGKILL" in killed.error
    (cat,) = (tmp_path / "out" / "views").glob("*/subject_consistency_cat_firstframes_videos")
    for path in cat.iterdir():
        path.unlink()
    set_plan(tmp_path / "home")
    (again,) = scores("subject_consistency")
    assert again.error is None


def test_negative_control_stale_first_frames_are_found_in_the_result(
    scores: Callable[..., list[Outcome]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that deletion the process ends well and the score is wrong; the parser says so."""
    set_plan(tmp_path / "home", subject_consistency="kill_after_frames")
    scores("subject_consistency")
    (cat,) = (tmp_path / "out" / "views").glob("*/subject_consistency_cat_firstframes_videos")
    for path in cat.iterdir():
        path.unlink()
    set_plan(tmp_path / "home")
    monkeypatch.setattr(run.staging, "clear_first_frames", lambda view, dimension: None)
    (again,) = scores("subject_consistency")
    assert "were not compared with each other" in again.error


def test_gpus_count_those_that_this_program_may_use(evaluator: Callable[..., Evaluator]) -> None:
    """A scheduler has given this process some GPUs: the first of them is not the machine's first."""
    given = evaluator(environment={"CUDA_VISIBLE_DEVICES": "4, GPU-abc"})
    assert [environment(given, gpu)["CUDA_VISIBLE_DEVICES"] for gpu in (0, 1)] == ["4", "GPU-abc"]
    assert environment(given, None)["CUDA_VISIBLE_DEVICES"] == "4, GPU-abc"
    assert environment(evaluator(environment={}), 3)["CUDA_VISIBLE_DEVICES"] == "3"
    with pytest.raises(UserError, match="--gpus has 2, and CUDA_VISIBLE_DEVICES leaves 2: 4, GPU-abc; count from 0"):
        environment(given, 2)


def test_gpus_are_handed_out_one_to_a_process(
    scores: Callable[..., list[Outcome]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = scores(*DIMENSIONS, gpus=(2, 5))
    assert [o.error for o in outcomes] == [None] * 6
    seen = [call["environment"]["CUDA_VISIBLE_DEVICES"] for call in calls(tmp_path / "home")]
    assert set(seen) == {"2", "5"}
    assert [o.dimension for o in outcomes] == list(DIMENSIONS)
