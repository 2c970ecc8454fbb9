"""Blur lowers sharpness, a plain picture has none, and one step edge has the value of its kernel."""

import cv2
import numpy as np
import pytest

from metrics.sharpness import laplacian_variance
from tests.metrics.synthetic import still


def test_each_blur_lowers_it() -> None:
    sharp = still(2)
    values = [laplacian_variance(sharp)]
    for sigma in (0.7, 1.5, 3.0):
        values.append(laplacian_variance(np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in sharp])))
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.5 * values[0]


def test_plain_video_has_no_sharpness() -> None:
    assert laplacian_variance(np.full((2, 32, 32, 3), 90, np.uint8)) == 0.0


def test_a_step_edge_has_the_value_of_the_kernel() -> None:
    frames = np.zeros((1, 40, 40, 3), np.uint8)
    frames[:, :, 20:] = 100
    # The Laplacian is +100 in one column and -100 in the next, and 0 in the other 38.
    assert laplacian_variance(frames) == pytest.approx(2 * 100**2 / 40)
