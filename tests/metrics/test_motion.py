"""Flow of a translation by v is v, a still has none, and only uneven motion has a large interpolation error."""

import math

import numpy as np
import pytest

from metrics.frames import luma
from metrics.motion import flow_between, flow_colours, interpolation_error, motion_magnitude
from tests.metrics.synthetic import moved, still, texture, translation, video


@pytest.mark.parametrize("velocity", [(1.5, 0.0), (0.0, -2.5), (3.0, -1.0), (0.25, 0.0)])
def test_a_translation_by_v_has_magnitude_v(velocity: tuple[float, float]) -> None:
    found = motion_magnitude(translation(5, *velocity))
    wanted = math.hypot(*velocity)
    assert found["flow_mean"] == pytest.approx(wanted, abs=0.03)
    assert found["flow_strongest"] == pytest.approx(wanted, abs=0.1)


def test_flow_points_where_the_picture_goes() -> None:
    frames = translation(2, 2.0, -1.0)
    flow = flow_between(luma(frames[0]), luma(frames[1]))
    assert flow.shape == (64, 64, 2)
    np.testing.assert_allclose(np.median(flow, axis=(0, 1)), [2.0, -1.0], atol=0.05)


def test_a_still_has_no_motion_and_no_error() -> None:
    assert motion_magnitude(still(4)) == {"flow_mean": 0.0, "flow_strongest": 0.0}
    assert interpolation_error(still(4)) == 0.0


def test_a_small_object_shows_in_the_strongest_share_only() -> None:
    patch = np.random.default_rng(1).uniform(60, 255, size=(16, 16, 3))
    pictures = []
    for t in range(4):
        picture = texture()
        picture[20:36, 10 + 2 * t : 26 + 2 * t] = patch
        pictures.append(picture)
    found = motion_magnitude(video(pictures))
    assert found["flow_mean"] < 0.5
    assert found["flow_strongest"] == pytest.approx(2.0, abs=0.4)


def test_jerks_and_flicker_have_large_interpolation_error() -> None:
    even = interpolation_error(translation(12, 1.5, 0.0))
    picture = texture()
    places = np.cumsum([0.0, *([3.0, 0.0] * 5), 3.0])  # the same mean speed, every second frame stands still
    jerky = interpolation_error(video([moved(picture, x, 0.0) for x in places]))
    flicker = interpolation_error(video([moved(picture, 1.5 * t, 0.0) + (10 if t % 2 else -10) for t in range(12)]))
    assert even < 1.0
    assert jerky > 5 * even
    assert flicker > 15


def test_too_few_frames_have_no_measure() -> None:
    assert all(math.isnan(value) for value in motion_magnitude(still(1)).values())
    assert math.isnan(interpolation_error(still(2)))


@pytest.mark.parametrize("frames", [still(2).astype(np.float32), still(2)[0], still(2)[:0], still(2)[..., :2]])
def test_other_arrays_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="frames must be uint8"):
        motion_magnitude(frames)


def test_negative_control_half_the_frames_is_twice_the_magnitude() -> None:
    frames = translation(9, 1.0, 0.0)
    assert motion_magnitude(frames[::2])["flow_mean"] == pytest.approx(2.0, abs=0.05)
    assert abs(motion_magnitude(frames)["flow_mean"] - 2.0) > 0.9


def test_colours_of_flow_tell_direction_and_strength() -> None:
    flow = np.array([[[2.0, 0.0], [0.0, 0.0], [-2.0, 0.0], [1.0, 0.0]]])
    right, nothing, left, half = flow_colours(flow, 2.0)[0].astype(int)
    assert nothing.tolist() == [255, 255, 255]
    assert right.tolist() == [255, 0, 0]
    assert left.tolist() == [0, 255, 255]
    assert half[0] == 255
    assert half[1:] == pytest.approx([128, 128], abs=2)
