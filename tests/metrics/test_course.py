"""Measures of the course of a video on clips whose truth is known."""

import math

import numpy as np
import pytest

from benchmarks.long_measures import NATIVE, cut, looped, reddened, softened, wander
from metrics import version
from metrics.course import COURSE_UNITS, LOOP, course_metrics, distances, find_cuts, thumbnails
from tests.metrics.synthetic import still, translation


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_every_measure_has_a_unit_and_short_videos_have_none() -> None:
    found = course_metrics(translation(20, 1, 0), native_frames=33)
    assert list(found.values) == list(COURSE_UNITS)
    assert [name for name, value in found.values.items() if math.isnan(value)] == [
        "alike_near",
        "loop",
        "loop_lag",
        "loops",
    ]
    assert math.isnan(course_metrics(still(1), 33).values["colour_slope"])
    assert distances(1, 9) == []
    assert distances(129, 33)[-1] == 96
    assert 33 in distances(129, 33)


@pytest.mark.parametrize("length", [41, 80])
def test_loop_is_found_and_wandering_object_is_not(length: int) -> None:
    values = course_metrics(looped(length)(draw())[0], NATIVE).values
    assert values["loop"] > LOOP
    assert values["loop_lag"] == length
    assert all(course_metrics(wander(draw(seed)), NATIVE).values["loop"] < LOOP - 0.2 for seed in range(3))


def test_still_video_is_similar_without_repetition() -> None:
    found = course_metrics(still(99), 33)
    assert {alike for _, alike in found.curve} == {1.0}
    assert found.values["loop"] == found.values["colour_slope"] == found.values["sharpness_slope"] == 0.0


def test_slopes_are_those_that_were_added() -> None:
    frames, truth = reddened(draw())
    assert course_metrics(frames, NATIVE).values["colour_slope"] == pytest.approx(truth["colour_slope"], rel=0.1)
    assert course_metrics(softened(draw())[0], NATIVE).values["sharpness_slope"] < -0.3
    plain = course_metrics(wander(draw()), NATIVE).values
    assert plain["colour_slope"] < 1
    assert abs(plain["sharpness_slope"]) < 0.2


def test_cuts_are_where_scenes_begin() -> None:
    frames, _ = cut(draw())
    found = find_cuts(thumbnails(frames))
    assert set(found) <= {NATIVE * number for number in range(1, 8)}
    assert len(found) >= 5
    assert find_cuts(thumbnails(wander(draw()))) == []


def test_similarity_falls_with_the_distance_of_a_drifting_video_and_returns_in_a_loop() -> None:
    drifting = dict(course_metrics(reddened(draw())[0], NATIVE).curve)
    assert drifting[1] > drifting[NATIVE] > drifting[max(drifting)]
    loop = translation(128, 1, 0)  # a torus of 64 pixels
    assert course_metrics(loop, 32).values["loop_lag"] == 64


def test_kept_measures_do_not_depend_on_this_folder() -> None:
    assert "long" not in {path.name for path in version.Path(version.__file__).parent.glob("*.py")}
