"""Exact measures of videos of the embedded world: of its own clips, of others not, and kept by what they belong to."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.media.read_video import read_video
from engine.media.write_video import open_video
from evaluation.course import COURSE, long_videos
from evaluation.measure import measure_all_course, measure_all_world
from evaluation.videos import Video, read_list
from evaluation.world import WORLD, measure_world, videos_of_world
from metrics.course import course_metrics
from metrics.world import WORLD_UNITS, world_metrics
from tiny.world import caption, render, sample_scene

NATIVE = 9


def write_clip(path: Path, seed: int) -> str:
    """A clip of the world as an mp4; returns its caption."""
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    with open_video(path, fps=8, height=64, width=64, crf=10) as video:
        video.write(render(scene, 24))
    return caption(scene, rng)


@pytest.fixture
def videos(tmp_path: Path) -> list[Video]:
    """Three clips of the world, whose native length is nine frames."""
    rows = ["method,prompt,seed,path"]
    for seed in range(3):
        rows.append(f'direct,"{write_clip(tmp_path / f"{seed}.mp4", seed)}",{seed},{seed}.mp4')
    (tmp_path / "list.csv").write_text("\n".join(rows))
    return [replace(video, native_frames=NATIVE) for video in read_list(tmp_path / "list.csv")]


def test_values_are_those_of_the_frames_in_the_file(videos: list[Video], tmp_path: Path) -> None:
    said: list[str] = []
    found = measure_all_world(videos, tmp_path / "kept", workers=1, say=said.append)
    assert list(WORLD) == [f"world.{name}" for name in WORLD_UNITS]
    for video in videos:
        frames = np.stack(list(read_video(video.path)))
        plain = world_metrics(frames, video.prompt, NATIVE).values
        assert str(found[video.path]) == str({f"world.{name}": value for name, value in plain.items()})
        # A clip of the world itself is what its caption says.
        assert found[video.path]["world.colour_as_captioned"] > 0.9
    again = measure_all_world(videos, tmp_path / "kept", workers=2, say=said.append)
    raise_together = measure_all_world(videos, tmp_path / "others", workers=2, say=said.append)
    assert str(again) == str(found) == str({path: raise_together[path] for path in found})
    assert said == [f"exact measures: {count} of 3 videos to be measured" for count in (3, 0, 3)]


def test_long_videos_have_the_measures_of_their_course(videos: list[Video], tmp_path: Path) -> None:
    said: list[str] = []
    [longer], reason = long_videos([videos[0]])
    assert reason is None
    found = measure_all_course([longer], tmp_path / "kept", workers=1, say=said.append)[longer.path]
    plain = course_metrics(np.stack(list(read_video(longer.path))), NATIVE).values
    assert str(found) == str({f"long.{name}": value for name, value in plain.items()})
    assert list(found) == list(COURSE)
    native = [replace(video, native_frames=24) for video in videos]
    assert long_videos(native) == ([], "no video is longer than the native 24 frames")
    assert (
        long_videos([videos[0], native[1]])[1] == "the videos are of models of different native lengths (9, 24 frames)"
    )


def test_another_prompt_or_native_length_is_measured_again(videos: list[Video], tmp_path: Path) -> None:
    said: list[str] = []
    video = videos[0]
    other = videos[1].prompt
    for changed in (video, replace(video, prompt=other), replace(video, native_frames=12)):
        found = measure_all_world([changed], tmp_path / "kept", workers=1, say=said.append)[video.path]
        assert str(found) == str(measure_world(video.path, changed.prompt, changed.native_frames or 0))
    assert said == ["exact measures: 1 of 1 videos to be measured"] * 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"size": (32, 64)}, "frames of the world are 64 x 64 pixels, these are 32 x 64"),
        ({"prompt": "a lighthouse in a storm"}, 'this prompt is no caption of the world: "a lighthouse in a storm"'),
        ({"native_frames": None}, "is not known; give --native_frames"),
        ({"native_frames": 33}, "different native lengths (9, 33 frames)"),
    ],
)
def test_why_videos_are_not_of_the_world(videos: list[Video], changes: dict[str, object], reason: str | None) -> None:
    changed = replace(videos[0], **changes)
    measured, found = videos_of_world([changed, *videos[1:]])
    assert found is None if reason is None else reason in (found or "")
    of_models = "native_frames" in changes
    assert measured == ([] if of_models else [*([changed] if reason is None else []), *videos[1:]])
    if reason is not None and not of_models:
        assert videos_of_world([changed])[0] == []
