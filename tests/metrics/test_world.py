"""Rendered scenes have known measures: what is kept, how far it goes, how evenly, and whether it repeats."""

import dataclasses
import math
import warnings

import numpy as np
import pytest

from metrics.world import (
    WORLD_UNITS,
    background_drift,
    distance_travelled,
    path_roughness,
    repetition,
    why_not_world,
    world_metrics,
)
from tiny.world import BACKGROUNDS, SPEEDS, Scene, caption, positions, render, sample_scene

NATIVE, FRAMES = 33, 129


def scene(**changes: object) -> Scene:
    plain = Scene(
        shape="square",
        colour="red",
        size="large",
        motion="right",
        speed="normal",
        background="gray",
        pan="none",
        start=(20.0, 30.0),
        angle=0.6,
        texture_start=(3.0, 5.0),
    )
    return dataclasses.replace(plain, **changes)


def measured(frames: np.ndarray, told: Scene) -> dict[str, float]:
    return world_metrics(frames, caption(told, np.random.default_rng(0)), NATIVE).values


def test_a_true_clip_is_perfect() -> None:
    found = measured(render(scene(), FRAMES), scene())
    assert found.keys() == WORLD_UNITS.keys()
    for name in ("object_seen", "shape_kept", "colour_kept", "motion_as_captioned"):
        assert found[name] == 1.0, name
    for name in ("shape_as_captioned", "colour_as_captioned", "background_as_captioned"):
        assert found[name] == 1.0, name
    assert found["background_drift"] < 2.0
    assert found["rgb_drift"] < 5.0
    assert found["path_roughness"] < 0.2
    assert found["distance_travelled"] == pytest.approx(128 * 1.5, rel=0.02)
    assert found["speed"] == pytest.approx(1.5, abs=0.05)
    assert found["speed_error"] < 0.05
    assert found["repetition"] == found["repetition_straight"]
    assert found["repetition"] < 0.5


@pytest.mark.parametrize("motion", ["up", "clockwise", "counterclockwise", "bounce"])
def test_every_motion_is_read_with_its_speed(motion: str) -> None:
    start = (32.0, 32.0) if motion != "bounce" else (30.0, 25.0)
    told = scene(motion=motion, speed="fast", size="small", start=start)
    found = measured(render(told, FRAMES), told)
    assert found["motion_as_captioned"] == 1.0
    assert found["speed_error"] < 0.25
    assert found["distance_travelled"] == pytest.approx(128 * SPEEDS["fast"], rel=0.05)
    if motion != "up":
        assert math.isnan(found["repetition_straight"])


def test_a_change_of_identity_counts_from_the_frame_where_it_happens() -> None:
    frames = render(scene(), FRAMES)
    frames[81:] = render(scene(shape="circle", colour="green"), FRAMES)[81:]
    found = world_metrics(frames, "a red square moves right over a gray background", NATIVE)
    assert found.values["shape_kept"] == pytest.approx(48 / 96)
    assert found.values["colour_kept"] == pytest.approx(48 / 96)
    assert found.values["shape_as_captioned"] == pytest.approx(81 / 129)
    assert found.values["rgb_drift"] > 50
    assert found.identity_by_clip == pytest.approx([1.0, 1.0, 15 / 33, 0.0])


def test_frames_without_an_object() -> None:
    frames = render(scene(), FRAMES)
    empty = np.zeros_like(frames[:1]) + np.array(BACKGROUNDS["gray"], np.uint8)
    frames[60:80] = empty
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measured(frames, scene())
        nothing = world_metrics(np.repeat(empty, FRAMES, 0), "a red square moves right over a gray background", NATIVE)
    assert found["object_seen"] == pytest.approx(109 / 129)
    assert found["shape_kept"] == pytest.approx(76 / 96)
    assert found["distance_travelled"] == pytest.approx(128 * 1.5, rel=0.25)
    assert nothing.values["object_seen"] == 0.0
    assert nothing.values["shape_as_captioned"] == 0.0
    assert nothing.values["distance_travelled"] == 0.0
    assert nothing.identity_by_clip == []
    for name in ("shape_kept", "rgb_drift", "path_roughness", "speed", "speed_error", "repetition"):
        assert math.isnan(nothing.values[name]), name


def test_background_drift_is_the_distance_of_colours() -> None:
    colours = np.tile(np.array([100.0, 100.0, 100.0]), (FRAMES, 1))
    colours[NATIVE:] += (3.0, 0.0, 4.0)
    assert background_drift(colours, NATIVE) == pytest.approx(5.0)
    assert background_drift(colours[NATIVE:], NATIVE) == 0.0
    assert math.isnan(background_drift(colours[:NATIVE], NATIVE))


def test_paths_of_known_roughness_and_length() -> None:
    straight = np.arange(50)[:, None] * np.array([3.0, 4.0])
    assert path_roughness(straight) == pytest.approx(0.0, abs=1e-9)
    assert distance_travelled(straight) == pytest.approx(49 * 5.0)
    orbit = positions(scene(motion="clockwise", speed="fast"), 100)
    assert path_roughness(orbit) == pytest.approx(2.5**2 / 14, rel=0.01)
    zigzag = straight.copy()
    zigzag[1::2] += (0.0, 1.0)
    assert path_roughness(zigzag) == pytest.approx(2.0)


def test_repetition_finds_a_loop_beyond_the_native_length_and_nothing_else() -> None:
    rng = np.random.default_rng(5)
    wander = np.cumsum(rng.normal(size=(FRAMES, 2)), axis=0)
    loop = np.cumsum(np.tile(rng.normal(size=(40, 2)), (4, 1)), axis=0)[:FRAMES]
    assert repetition(loop, NATIVE) == pytest.approx(1.0)
    assert repetition(wander, NATIVE) < 0.5
    # A loop shorter than the native length is found at a multiple of its period; a period that does not fit is not.
    short = np.cumsum(np.tile(rng.normal(size=(20, 2)), (7, 1)), axis=0)[:FRAMES]
    assert repetition(short, NATIVE) == pytest.approx(1.0)
    long = np.cumsum(np.tile(rng.normal(size=(100, 2)), (2, 1)), axis=0)[:FRAMES]
    assert repetition(long, NATIVE) < 0.5
    # An even straight path repeats nothing, and a true orbit does.
    assert repetition(np.arange(FRAMES)[:, None] * np.array([1.5, 0.0]), NATIVE) == 0.0
    assert repetition(positions(scene(motion="clockwise"), FRAMES), NATIVE) > 0.95
    assert math.isnan(repetition(loop[: 2 * NATIVE], NATIVE))
    holes = loop.copy()
    holes[10:20] = np.nan
    assert repetition(holes, NATIVE) == pytest.approx(1.0, abs=0.02)


def test_which_videos_are_of_the_world() -> None:
    rng = np.random.default_rng(6)
    prompts = [caption(sample_scene(rng), rng) for _ in range(20)]
    assert why_not_world(prompts, 64, 64) is None
    assert "480 x 832" in why_not_world(prompts, 480, 832)
    assert "'a cat'" in why_not_world([*prompts, "a cat"], 64, 64)
    with pytest.raises(ValueError, match="no caption"):
        world_metrics(render(scene(), 2), "a cat", NATIVE)
