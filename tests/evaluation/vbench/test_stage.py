"""Views: names, places, rates and contents that VBench-Long reads rightly, and refusals of all others."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from engine.errors import UserError
from evaluation.vbench import stage as staging
from evaluation.vbench.stage import View, check, check_place, check_stem, clip_names, plan_view, predict_clips, stage
from evaluation.videos import Video, groups, read_batch


@pytest.fixture
def videos(batch: Path) -> list[Video]:
    """Those of one method."""
    return groups(read_batch(batch))["sliding_window"]


@pytest.fixture
def view(videos: list[Video], tmp_path: Path) -> View:
    """Their view, staged."""
    made = plan_view("sliding_window", videos, tmp_path / "views")
    stage(made)
    return made


def split(view: View) -> None:
    """Cut as VBench-Long does."""
    for item in view.items:
        folder = view.folder / "split_clip" / item.stem
        folder.mkdir(parents=True)
        for name in clip_names(item.stem, item.clips, item.video.num_frames, view.fps):
            (folder / name).write_bytes(b"clip")


@pytest.mark.parametrize(
    ("num_frames", "fps", "clips"),
    [(81, 16, 3), (161, 16, 6), (321, 16, 11), (481, 30, 9), (32, 16, 1), (31, 16, 1), (33, 16, 2)],
)
def test_clips_are_predicted(num_frames: int, fps: int, clips: int) -> None:
    """The figures of the notes, and of the paper's tables: 11 clips of 321 frames, 9 of 481 at 30."""
    assert predict_clips(num_frames, fps) == clips
    assert len(clip_names("p0-0", clips, num_frames, fps)) == clips


def test_a_short_video_is_kept_whole() -> None:
    assert clip_names("p0-0", 1, 31, 16) == ["p0-0_full.mp4"]
    assert clip_names("p0-0", 1, 32, 16) == ["p0-0_000.mp4"]


def test_names_count_the_seeds_of_a_prompt(view: View, videos: list[Video]) -> None:
    names = sorted(path.name for path in view.folder.iterdir())
    assert names == ["p0000-0.mp4", "p0000-1.mp4", "p0001-0.mp4", "p0001-1.mp4"]
    by_stem = {item.stem: item.video for item in view.items}
    assert [(by_stem[s].prompt_id, by_stem[s].seed) for s in ("p0000-0", "p0000-1")] == [("p0000", 0), ("p0000", 7)]
    for item in view.items:
        assert (view.folder / f"{item.stem}.mp4").read_bytes() == item.video.path.read_bytes()


def test_nothing_but_videos_lies_in_the_folder_and_no_underscore_in_a_name(view: View) -> None:
    assert view.description.parent == view.folder.parent
    assert view.description.is_file()
    assert "_" not in view.folder.name
    assert all("_" not in path.name for path in view.folder.iterdir())


def test_a_link_keeps_the_file_whatever_becomes_of_its_name(view: View, tmp_path: Path) -> None:
    item = view.items[0]
    place = tmp_path / "linked.mp4"
    source = tmp_path / "source.mp4"
    source.write_bytes(item.video.path.read_bytes())
    staging.link(source, place)
    source.with_suffix(".new").write_bytes(b"other")
    source.with_suffix(".new").replace(source)
    assert place.read_bytes() == item.video.path.read_bytes()


def test_without_hard_links_there_are_symbolic_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    (tmp_path / "a.mp4").write_bytes(b"a")
    staging.link(tmp_path / "a.mp4", tmp_path / "b.mp4")
    assert (tmp_path / "b.mp4").is_symlink()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "hardlink_to", full)
    with pytest.raises(OSError, match="No space left"):
        staging.link(tmp_path / "a.mp4", tmp_path / "c.mp4")


@pytest.mark.parametrize(
    "stem", ["run_a-0", "a-Scene-0", "a.mp4-0", "a", "-0", "a-0b", "ä-0", "a/b-0", "a b-0", "x" * 100 + "-0", ""]
)
def test_names_that_would_be_misread_are_refused(stem: str) -> None:
    with pytest.raises(UserError):
        check_stem(stem)


def test_names_that_are_read_rightly() -> None:
    for stem in ("p0007-0", "p0007-12", "a.b-0", "p-1-0"):
        check_stem(stem)


@pytest.mark.parametrize("part", ["split_clip", "filtered_clips", "a-Scene-1", "x.mp4"])
def test_places_that_would_be_misread_are_refused(tmp_path: Path, part: str) -> None:
    with pytest.raises(UserError, match="searches paths for"):
        check_place(tmp_path / part / "views")
    check_place(tmp_path / "views_of_a_run")


def test_rates_must_be_whole_and_equal(videos: list[Video], tmp_path: Path) -> None:
    film = [replace(videos[0], fps=Fraction(24000, 1001)), *videos[1:]]
    with pytest.raises(UserError, match=r"23\.976 frames per second; VBench-Long reads whole rates only"):
        plan_view("x", film, tmp_path)
    with pytest.raises(UserError, match="clips must be equally long"):
        plan_view("x", [*videos[:-1], replace(videos[-1], fps=Fraction(8))], tmp_path)


def test_ids_that_do_not_tell_prompts_apart_are_counted_on(videos: list[Video], tmp_path: Path) -> None:
    same = [replace(video, prompt_id="p0000") for video in videos]
    assert [item.stem for item in plan_view("x", same, tmp_path).items] == ["p0000-0", "p0000-1", "p0000-2", "p0000-3"]
    with pytest.raises(UserError, match="underscore"):
        plan_view("x", [replace(videos[0], prompt_id="p_0")], tmp_path)


def test_a_label_cannot_make_a_folder_that_would_be_misread(videos: list[Video], tmp_path: Path) -> None:
    for label in ("my.methods:A-Scene-1", "x.mp4", "split_clip", "m" * 300):
        folder = plan_view(label, videos, tmp_path).folder
        check_place(folder)
        assert len(folder.name) < 120
    assert plan_view("A", videos, tmp_path).folder != plan_view("a", videos, tmp_path).folder


def test_a_video_that_is_gone_is_one_line(view: View, tmp_path: Path) -> None:
    item = view.items[0]
    gone = replace(view, items=(replace(item, video=replace(item.video, path=tmp_path / "gone.mp4")), *view.items[1:]))
    with pytest.raises(UserError, match=r"gone\.mp4 is gone; it must be made again"):
        check(gone)


def test_foreign_missing_and_changed_files_are_found(view: View) -> None:
    check(view)
    (view.folder / "extra.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds extra\.mp4"):
        check(view)
    (view.folder / "extra.mp4").unlink()
    first = view.folder / "p0000-0.mp4"
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(UserError, match=r"lacks p0000-0\.mp4"):
        check(view)
    first.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"is not .* any more"):
        check(view)


def test_clips_and_first_frames_of_before_are_strange_before_the_cut(view: View) -> None:
    split(view)
    with pytest.raises(UserError, match="holds split_clip"):
        check(view)
    check(view, split=True)
    (view.folder / "subject_consistency_cat_firstframes_videos").mkdir()
    check(view, split=True)
    staging.clear_first_frames(view, "background_consistency")
    assert (view.folder / "subject_consistency_cat_firstframes_videos").exists()
    staging.clear_first_frames(view, "subject_consistency")
    assert not (view.folder / "subject_consistency_cat_firstframes_videos").exists()
    (view.folder / "split_clip" / "p0000-0" / "p0000-0_001.mp4").unlink()
    with pytest.raises(UserError, match=r"should cut it into 3 clips of 2 s, and .* holds 2"):
        check(view, split=True)


def test_staging_again_starts_afresh_and_videos_stay(view: View, videos: list[Video]) -> None:
    split(view)
    stage(view)
    check(view)
    staging.remove(view)
    assert not view.folder.exists()
    assert all(video.path.is_file() for video in videos)


def test_foreign_folder_is_not_deleted(videos: list[Video], tmp_path: Path) -> None:
    planned = plan_view("direct", videos, tmp_path / "views")
    planned.folder.mkdir(parents=True)
    (planned.folder / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="not made by this program"):
        stage(planned)
    assert (planned.folder / "thesis.txt").exists()


def test_a_view_is_known_by_its_contents(videos: list[Video], tmp_path: Path) -> None:
    first = plan_view("direct", videos, tmp_path)
    assert plan_view("direct", list(reversed(videos)), tmp_path / "elsewhere").fingerprint == first.fingerprint
    other = plan_view("direct", [replace(videos[0], sha256="0" * 64), *videos[1:]], tmp_path)
    assert other.fingerprint != first.fingerprint
