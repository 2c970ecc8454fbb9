"""What evaluate.py measures of videos: proxies, exact measures of the embedded world's own clips, kept by what they belong to."""

import hashlib
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from engine.errors import UserError
from engine.media.read_video import read_video
from engine.media.write_video import open_video
from evaluation.measure import Measurer
from evaluation.scoring import measures
from evaluation.scoring.measures import COURSE, WORLD, long_videos, measure_videos, videos_of_world
from evaluation.videos import Video, read_batch, read_list
from metrics.course import course_metrics
from metrics.proxies import PROXIES, proxies
from metrics.version import source_digest
from metrics.world import WORLD_UNITS, world_metrics
from tests.evaluation.batches import write_sidecar, write_video
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
    found = measure_videos(videos, tmp_path / "kept", Measurer(say=said.append))
    assert (found.not_world, found.not_long, found.events, found.notes) == (None, None, False, [])
    assert list(WORLD) == [f"world.{name}" for name in WORLD_UNITS]
    for video in videos:
        frames = np.stack(list(read_video(video.path)))
        exact = world_metrics(frames, video.prompt, NATIVE).values
        course = course_metrics(frames, NATIVE).values
        plain = proxies(frames, 8) | {f"world.{name}": value for name, value in exact.items()}
        plain |= {f"long.{name}": value for name, value in course.items()}
        assert str(found.values[video]) == str(plain)
        assert list(plain) == [*PROXIES, *WORLD, *COURSE]
        # A clip of the world itself is what its caption says.
        assert found.values[video]["world.colour_as_captioned"] > 0.9
    again = measure_videos(videos, tmp_path / "kept", Measurer(say=said.append))
    assert str(again) == str(found)
    assert said == [f"{count} of 3 videos to be measured" for count in (3, 0)]


def test_values_kept_by_earlier_versions_are_read(videos: list[Video], tmp_path: Path) -> None:
    """Their file's name, key and shape; beside a negative control of another key."""
    video, folder = videos[0], tmp_path / "kept"
    what = hashlib.sha256(f"{video.prompt}\n9".encode()).hexdigest()[:12]
    place = folder / "world" / f"{video.sha256}-{what}.json"
    place.parent.mkdir(parents=True)
    key = {"version": source_digest(), "measures": list(WORLD)}
    place.write_text(json.dumps({"key": key, "values": dict.fromkeys(WORLD, 7.0), "by_clip": {}}))
    found = measure_videos([video], folder, Measurer()).values[video]
    assert {found[name] for name in WORLD} == {7.0}
    assert found["proxy.flow_top5_px"] > 0
    place.write_text(json.dumps({"key": key | {"version": "0"}, "values": dict.fromkeys(WORLD, 7.0), "by_clip": {}}))
    assert measure_videos([video], folder, Measurer()).values[video]["world.object_seen"] <= 1
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.json")) == [
        f"course/{video.sha256}-9.json",
        f"proxies/{video.sha256}-8.json",
        f"world/{video.sha256}-{what}.json",
    ]


def test_settings_of_a_sidecar_may_be_nested(tmp_path: Path) -> None:
    path = write_video(tmp_path / "batch/freespec/000000000000/videos/p0000-s0.mp4")
    settings = {"bands": [[0, 1], [2, 3]], "tiers": {"far": 2}}
    write_sidecar(path, run={"config": {"model": {"path": "m"}, "method": {"freespec": settings}}})
    (video,) = read_batch(tmp_path / "batch")
    assert dict(video.settings) == {"bands": ([0, 1], [2, 3]), "tiers": {"far": 2}}
    found = measure_videos([video], tmp_path / "kept", Measurer())
    assert found.values[video]["proxy.flow_top5_px"] > 0


def test_another_prompt_or_native_length_is_measured_again(videos: list[Video], tmp_path: Path) -> None:
    said: list[str] = []
    video = videos[0]
    frames = np.stack(list(read_video(video.path)))
    for changed in (video, replace(video, prompt=videos[1].prompt), replace(video, native_frames=12)):
        found = measure_videos([changed], tmp_path / "kept", Measurer(say=said.append)).values[changed]
        exact = world_metrics(frames, changed.prompt, changed.native_frames or 0).values
        assert str({name: found[f"world.{name}"] for name in exact}) == str(exact)
    assert said == ["1 of 1 videos to be measured"] * 3


def test_other_code_of_proxies_measures_again(batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = read_batch(batch)[:1]
    measure_videos(videos, tmp_path, Measurer())
    monkeypatch.setattr(measures, "source_digest", lambda *_, **__: "another")
    said: list[str] = []
    measure_videos(videos, tmp_path, Measurer(say=said.append))
    assert said == ["1 of 1 videos to be measured"]


def test_rates_must_be_whole(batch: Path, tmp_path: Path) -> None:
    video = replace(read_batch(batch)[0], fps=Fraction(24000, 1001))
    with pytest.raises(UserError, match=r"23\.976 frames per second; proxies need a whole rate"):
        measure_videos([video], tmp_path, Measurer())


def test_which_videos_are_long(videos: list[Video]) -> None:
    assert long_videos(videos[:1]) == (videos[:1], None)
    native = [replace(video, native_frames=24) for video in videos]
    assert long_videos(native) == ([], "no video is longer than the native 24 frames")
    assert (
        long_videos([videos[0], native[1]])[1] == "the videos are of models of different native lengths (9, 24 frames)"
    )


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
