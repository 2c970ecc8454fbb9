"""Similarity of frames and clips: 1 for stills and loops, less with drift, and the reference twins of both formulas."""

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from metrics.similarity import (
    clip_colour_similarity,
    clip_structural_similarity,
    frame_colour_similarity,
    frame_structural_similarity,
    num_clips,
)
from tests.metrics.synthetic import moved, still, texture, translation, video


def test_still_is_similar() -> None:
    frames = still(6)
    assert frame_colour_similarity(frames) == pytest.approx(1.0)
    assert frame_structural_similarity(frames) == pytest.approx(1.0)
    assert clip_colour_similarity(frames, 3) == pytest.approx([1.0])
    assert clip_structural_similarity(frames, 3) == pytest.approx([1.0])


def test_a_loop_of_a_clip_s_length_is_alike_from_clip_to_clip_though_it_moves() -> None:
    picture = texture()
    loop = video([moved(picture, 16.0 * (t % 4), 0.0) for t in range(12)])
    assert clip_structural_similarity(loop, 4) == pytest.approx([1.0, 1.0])
    assert frame_structural_similarity(loop) < 0.5
    # Negative control: cut at another length, it is no loop.
    assert max(clip_structural_similarity(loop, 3)) < 0.9


def test_drift_of_colour_lowers_colour_from_clip_to_clip_and_hardly_from_frame_to_frame() -> None:
    picture = texture()
    drifting = video([picture + np.array([3.0 * t, 0.0, -3.0 * t]) for t in range(16)])
    by_clip = clip_colour_similarity(drifting, 4)
    assert by_clip == sorted(by_clip, reverse=True)
    assert by_clip[-1] < 0.5
    assert frame_colour_similarity(drifting) > 0.85


def test_colour_does_not_see_place_and_structure_does() -> None:
    frames = translation(2, 16.0, 0.0)
    assert frame_colour_similarity(frames) == pytest.approx(1.0, abs=0.01)
    assert frame_structural_similarity(frames) < 0.5


def test_structure_is_the_published_formula() -> None:
    first, second = (np.rint(texture(seed).mean(-1)).clip(0, 255) for seed in (0, 1))
    frames = np.stack([first, second])[..., None].repeat(3, -1).astype(np.uint8)

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, radius=5, mode="reflect")

    a, b = frames[0, ..., 0].astype(float), frames[1, ..., 0].astype(float)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    va, vb, cov = mean(a * a) - mean(a) ** 2, mean(b * b) - mean(b) ** 2, mean(a * b) - mean(a) * mean(b)
    ssim = (2 * mean(a) * mean(b) + c1) * (2 * cov + c2) / ((mean(a) ** 2 + mean(b) ** 2 + c1) * (va + vb + c2))
    assert frame_structural_similarity(frames) == pytest.approx(ssim[5:-5, 5:-5].mean(), abs=1e-9)


def test_colour_is_the_intersection_of_histograms() -> None:
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    frames[0, :4] = (255, 0, 0)  # a quarter red, the rest black
    frames[1, :12] = (255, 0, 0)  # three quarters red
    assert frame_colour_similarity(frames) == pytest.approx(0.25 + 0.25)


@pytest.mark.parametrize(("frames", "clip", "wanted"), [(129, 33, 4), (33, 33, 1), (40, 33, 1), (50, 33, 2), (5, 9, 1)])
def test_a_rest_of_less_than_half_a_clip_is_left_out(frames: int, clip: int, wanted: int) -> None:
    assert num_clips(frames, clip) == wanted


def test_what_is_too_short_or_too_small() -> None:
    assert math.isnan(frame_colour_similarity(still(1)))
    assert clip_colour_similarity(still(3), 3) == []
    with pytest.raises(ValueError, match="11 x 11"):
        frame_structural_similarity(still(2)[:, :8])
    with pytest.raises(ValueError, match="1 frame or more"):
        clip_colour_similarity(still(2), 0)
