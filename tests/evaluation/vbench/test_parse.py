"""The parser on result files of exactly the shapes that VBench-Long writes, and on each of its traps."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from evaluation.vbench.parse import DimensionScores, name_of, read_results

CLIPS = {"a cat-0": 2, "p0001-0": 1}


def plain(stem: str, clip: str, value: Any) -> dict[str, Any]:
    """A row of a clip."""
    return {"video_path": f"V/split_clip/{stem}/{stem}_{clip}.mp4", "video_results": value}


def regrouped(row: dict[str, Any]) -> dict[str, Any]:
    """The row of the third list, whose grouping by video does not group."""
    stem = row["video_path"].split("/")[2]
    return {**row, "video_path": f"{row['video_path']}/{stem}.mp4"}


def consistency(stem: str, clip: str, inside: float, between: float = 0.8, mapped: float = 0.9) -> dict[str, Any]:
    """A row of the consistency dimensions."""
    fused = (inside + mapped) / 2 if mapped else inside
    path = regrouped(plain(stem, clip, None))["video_path"]
    scores = {"inclip_score": inside, "clip2clip_score": between, "mapped_clip2clip_score": mapped}
    return {"video_path": path, **scores, "video_results": fused}


def subject() -> dict[str, Any]:
    """Two clips of one video, one of the other, which therefore has nothing between clips."""
    rows = [
        consistency("a cat-0", "001", 0.6),
        consistency("p0001-0", "full", 0.5, between=0, mapped=0),
        consistency("a cat-0", "000", 0.8),
    ]
    return {"subject_consistency": [sum(row["video_results"] for row in rows) / 3, rows]}


def three(dimension: str, values: list[Any], scale: float = 1.0) -> dict[str, Any]:
    """[score, rows, rows again]: `values` of two clips of one video and one of the other."""
    rows = [plain("a cat-0", "000", values[0]), plain("p0001-0", "full", values[2]), plain("a cat-0", "001", values[1])]
    return {
        dimension: [
            sum(values) / 3 / scale,
            rows,
            [{**regrouped(r), "video_results": float(r["video_results"])} for r in rows],
        ]
    }


def read(
    tree: Any, tmp_path: Path, dimension: str | None = None, clips: dict[str, int] | None = None
) -> DimensionScores:
    """The parser on a tree, written as VBench writes it."""
    path = tmp_path / "x_eval_results.json"
    path.write_text(json.dumps(tree))
    return read_results(path, dimension or next(iter(tree)), clips or CLIPS)


def test_consistency_is_grouped_by_video(tmp_path: Path) -> None:
    found = read(subject(), tmp_path)
    assert found.videos == {"a cat-0": pytest.approx((0.75 + 0.85) / 2), "p0001-0": 0.5}
    assert found.headline == pytest.approx((0.75 + 0.85 + 0.5) / 3)
    assert found.video_mean == pytest.approx((0.8 + 0.5) / 2)
    assert found.notes == (
        "subject_consistency: 1 of 2 videos have a single clip, so nothing between clips is measured",
    )


def test_the_headline_is_not_a_mean_over_videos(tmp_path: Path) -> None:
    """The upstream fault this parser exists for: with unequal clip counts the two differ."""
    found = read(three("motion_smoothness", [0.9, 0.92, 0.98]), tmp_path)
    assert found.headline == pytest.approx(2.8 / 3)
    assert found.video_mean == pytest.approx((0.91 + 0.98) / 2)
    assert abs(found.headline - found.video_mean) > 0.01


def test_truth_values_become_a_rate(tmp_path: Path) -> None:
    found = read(three("dynamic_degree", [True, False, True]), tmp_path)
    assert found.videos == {"a cat-0": 0.5, "p0001-0": 1.0}
    assert found.headline == pytest.approx(2 / 3)


def test_imaging_rows_are_in_percent_and_its_headline_is_not(tmp_path: Path) -> None:
    found = read(three("imaging_quality", [60.0, 70.0, 62.0], scale=100), tmp_path)
    assert found.videos["a cat-0"] == pytest.approx(0.65)
    assert found.headline == pytest.approx(0.64)


def test_another_scale_is_refused(tmp_path: Path) -> None:
    """Were rows of imaging quality in 0..1 some day, a hundredth of the true score would be reported."""
    with pytest.raises(UserError, match="uses another scale"):
        read(three("imaging_quality", [0.60, 0.70, 0.62]), tmp_path)
    with pytest.raises(UserError, match=r"outside 0\.\.1"):
        read(three("aesthetic_quality", [60.0, 70.0, 62.0]), tmp_path)


def test_a_version_that_groups_is_understood(tmp_path: Path) -> None:
    rows = [
        {"video_path": "V/a cat-0.mp4", "video_results": 0.7},
        {"video_path": "V/p0001-0.mp4", "video_results": 0.9},
    ]
    found = read({"aesthetic_quality": [0.8, rows]}, tmp_path)
    assert found.videos["a cat-0"] == 0.7
    assert "one number per video" in found.notes[0]


def test_only_single_clips_come_without_the_parts(tmp_path: Path) -> None:
    rows = [{"video_path": "V/split_clip/a-0/a-0_full.mp4/a-0.mp4", "video_results": 0.9}]
    found = read({"background_consistency": [0.9, rows]}, tmp_path, clips={"a-0": 1})
    assert found.videos == {"a-0": 0.9}


def change(tree: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A tree whose first row of the first list is changed."""
    changed = copy.deepcopy(tree)
    next(iter(changed.values()))[1][0].update(changes)
    return changed


SMOOTH = three("motion_smoothness", [0.9, 0.92, 0.98])


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        # Trap 1: names are cut at the first underscore, and the part between clips is dropped without a word.
        (
            change(subject(), video_path="V/split_clip/run_a-0/run_a-0_000.mp4/run.mp4"),
            "VBench cut the name 'run_a-0' to 'run'",
        ),
        # Trap 2: stale first frames.
        (change(subject(), clip2clip_score=0, mapped_clip2clip_score=0), "were not compared with each other"),
        (change(SMOOTH, video_results=math.nan), "is nan, not a number"),
        (change(SMOOTH, video_results=None), "is None, not a number"),
        (change(SMOOTH, video_path="V/split_clip/dog-0/dog-0_000.mp4"), "dog-0, which is not one of the 2 videos"),
        (change(SMOOTH, video_path="V/split_clip/a cat-0/a cat-0_001.mp4"), "has a clip twice"),
        (change(SMOOTH, video_path="V/split_clip/cat.mp4"), "cannot tell which video"),
        (change(SMOOTH, video_results=0.95), "in one list and 0.910000 in the other"),
        ({"motion_smoothness": [0.95, SMOOTH["motion_smoothness"][1][1:]]}, "has 1 clips, 2 were expected"),
        ({"motion_smoothness": [0.95, SMOOTH["motion_smoothness"][1][1:2]]}, "lacks a cat-0 and 0 more of 2 videos"),
        ({"motion_smoothness": [math.nan, *SMOOTH["motion_smoothness"][1:]]}, "the score of motion_smoothness is nan"),
        ({"motion_smoothness": [0.5, *SMOOTH["motion_smoothness"][1:]]}, "uses another scale"),
        ({"motion_smoothness": [0.9, []]}, "VBench found no clips"),
        ({"motion_smoothness": 0.9}, r"is not \[score, rows, rows\]"),
        ({"subject_consistency": [*subject()["subject_consistency"], []]}, r"is not \[score, rows\]"),
        ({"motion_smoothness": [0.9, [{"video_path": "x"}]]}, "lacks video_path or video_results"),
    ],
)
def test_traps_are_one_line_each(tmp_path: Path, tree: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read(tree, tmp_path)
    assert "\n" not in str(caught.value)


def test_files_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no dynamic_degree but motion_smoothness"):
        read(SMOOTH, tmp_path, dimension="dynamic_degree")
    with pytest.raises(UserError, match="holds no dynamic_degree but list"):
        read([{"prompt_en": "a"}], tmp_path, dimension="dynamic_degree")  # the _full_info file
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(SMOOTH)[:-5])
    with pytest.raises(UserError, match="is not JSON"):
        read_results(path, "motion_smoothness", CLIPS)
    with pytest.raises(UserError, match=r"wrote no missing\.json"):
        read_results(tmp_path / "missing.json", "motion_smoothness", CLIPS)


def test_a_view_may_lie_anywhere() -> None:
    """Underscores and video endings in folders above the clips say nothing about the video."""
    path = "/a_b/x.mp4/split_clip/views/split_clip/p0001-0/p0001-0_003.mp4/p0001-0.mp4"
    assert name_of(path, Path("r")) == ("p0001-0", "p0001-0_003")
    assert name_of(path.rpartition("/")[0], Path("r")) == ("p0001-0", "p0001-0_003")


def test_negative_control_upstream_grouping(tmp_path: Path) -> None:
    """Taking the third list for one entry per video, as its name says, counts videos wrongly."""
    value = three("motion_smoothness", [0.9, 0.92, 0.98])["motion_smoothness"]
    assert len(value[2]) == 3
    assert len(read({"motion_smoothness": value}, tmp_path).videos) == 2
