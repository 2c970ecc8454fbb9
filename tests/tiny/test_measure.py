"""What is measured in a rendered clip is what was rendered, also through noise and blur, and not something else."""

from dataclasses import replace

import numpy as np
import pytest

from tiny.measure import read, track
from tiny.state import numpy_rng
from tiny.world import PAN_SPEED, PANS, SIZE, SPEEDS, backdrop, positions, render, sample_scene

WORDS = ("shape", "colour", "size", "motion", "speed", "background", "pan")


def blur(clip: np.ndarray) -> np.ndarray:
    """A 3 x 3 box filter on the torus."""
    shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return np.mean([np.roll(clip, shift, (1, 2)) for shift in shifts], axis=0)


def damage(clip: np.ndarray, kind: str) -> np.ndarray:
    """The clip as a generator would hand it over: perfect, noisy, or soft."""
    clip = clip.astype(float)
    if kind == "noise":
        return np.clip(clip + numpy_rng(1).normal(0, 12, clip.shape), 0, 255)
    return blur(clip) if kind == "blur" else clip


@pytest.mark.parametrize("kind", ["clean", "noise", "blur"])
@pytest.mark.parametrize(("num_frames", "num_clips"), [(33, 12), (129, 2)])
def test_words_and_speed_are_recovered(kind, num_frames, num_clips):
    for index in range(num_clips):
        scene = sample_scene(numpy_rng(11, num_frames, index))
        reading = read(damage(render(scene, num_frames), kind))
        assert {word: getattr(reading, word) for word in WORDS} == {word: getattr(scene, word) for word in WORDS}
        if scene.motion != "bounce":
            assert reading.pixels_per_frame == pytest.approx(SPEEDS[scene.speed], rel=0.06)


@pytest.mark.parametrize("num_frames", [33, 129])
@pytest.mark.parametrize("motion", ["left", "down", "bounce", "clockwise"])
def test_positions_and_pan_are_followed_over_the_edges(motion, num_frames):
    scene = replace(sample_scene(numpy_rng(12)), motion=motion, start=(30.0, 30.0), pan="left")
    seen = track(render(scene, num_frames))
    error = seen.centre - positions(scene, num_frames)
    # The track may be a whole turn of the torus away, the same one in all frames.
    error -= SIZE * np.round(error[0] / SIZE)
    assert np.abs(error).max() < 0.4
    np.testing.assert_allclose(seen.pan, np.arange(num_frames) * PAN_SPEED * PANS["left"], atol=1.0)


def test_another_clip_reads_otherwise():
    scene = replace(sample_scene(numpy_rng(13)), shape="star", colour="red", motion="left", pan="right")
    clip = render(scene, 33)
    assert read(clip[::-1]).motion == "right" and read(clip[::-1]).pan == "left"
    assert read(clip.transpose(0, 2, 1, 3)).motion == "up"
    assert read(np.repeat(clip[:1], 33, axis=0)).motion == "still"
    assert read(clip[..., ::-1]).colour == "blue"
    assert np.median(track(render(replace(scene, shape="circle"), 33)).overlap) > 0.9
    assert track(clip).shape != track(render(replace(scene, shape="circle"), 33)).shape


def test_frames_without_an_object_are_recognised():
    scene = replace(sample_scene(numpy_rng(14)), motion="right")
    clip = render(scene, 33).astype(float)
    empty = backdrop(scene, 33)
    assert read(empty).shape == "" and read(empty).motion == "still"
    clip[10:13] = empty[10:13]
    seen = track(clip)
    assert seen.shape[9] == scene.shape and seen.shape[10:13] == ("",) * 3
    assert np.isnan(seen.centre[10:13]).all() and np.isfinite(seen.centre[13:]).all()
    assert read(clip).motion == "right"


def test_a_clip_of_another_size_is_an_error():
    with pytest.raises(ValueError, match="64"):
        track(np.zeros((5, 32, 32, 3)))
