"""Proxies on videos with known truth: order and known displacements, not absolute scores."""

import math

import cv2
import numpy as np
import pytest

from metrics.proxies import PROXIES, fast_flow, moving_clips, proxies

FPS = 8
SIDE = 64


def texture(width: int, seed: int = 0) -> np.ndarray:
    """Smooth noise, uint8 [SIDE, width, 3]."""
    noise = np.random.default_rng(seed).integers(0, 256, (SIDE, width, 3), dtype=np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX)


def pan(speed: float, num_frames: int = 32, seed: int = 0) -> np.ndarray:
    """A camera that moves `speed` px a frame: uint8 [T, SIDE, SIDE, 3]."""
    wide = texture(SIDE + int(speed * num_frames) + 1, seed)
    return np.stack([wide[:, int(speed * t) : int(speed * t) + SIDE] for t in range(num_frames)])


STILL = pan(0)
FOUND = {
    "still": proxies(STILL, FPS),
    "slow": proxies(pan(1), FPS),
    "fast": proxies(pan(6), FPS),
    "loop": proxies(np.concatenate([pan(3, 16)] * 2), FPS),
    "even": proxies(pan(2), FPS),
    "stutter": proxies(np.repeat(pan(8, 8), 4, 0), FPS),
    "cut": proxies(np.concatenate([pan(1, 16), pan(1, 16) // np.array([1, 4, 4], dtype=np.uint8)]), FPS),
    "darker": proxies((STILL * np.linspace(1, 0.5, 32)[:, None, None, None]).astype(np.uint8), FPS),
}


def test_every_proxy_has_a_meaning_and_a_value() -> None:
    for found in FOUND.values():
        assert list(found) == list(PROXIES)
    assert not [name for name in PROXIES if name.split(".")[0] not in ("proxy", "vbench")]
    assert all(math.isfinite(value) for value in FOUND["fast"].values())


def test_a_still_video_has_everything_but_motion() -> None:
    still = FOUND["still"]
    for name in (
        "vbench.temporal_flickering_unfiltered",
        "proxy.midframe_flow_mae",
        "proxy.ssim_prev",
        "proxy.freeze_ratio",
    ):
        assert still[name] == pytest.approx(1, abs=1e-6)
    assert still["proxy.lab_hist_consistency"] == pytest.approx(1, abs=1e-6)
    assert (still["proxy.flow_top5_px"], still["proxy.moving_clip_rate"], still["proxy.drift_luma"]) == (0, 0, 0)
    assert math.isnan(still["proxy.repeat_peak"])


def test_flow_is_in_pixels() -> None:
    first, second = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in pan(5, 2))
    x, y = fast_flow(first, second)[16:48, 16:48].mean((0, 1))
    assert (x, y) == (pytest.approx(-5, abs=0.3), pytest.approx(0, abs=0.3))
    assert FOUND["slow"]["proxy.flow_top5_px"] == pytest.approx(1, abs=0.3)
    assert FOUND["fast"]["proxy.moving_clip_rate"] == 1
    assert FOUND["slow"]["proxy.moving_clip_rate"] == 0


def test_the_rule_of_dynamic_degree() -> None:
    """16 frames need 4 moving pairs of more than 6 px at a shorter side of 256, and 480 px need 11.25."""
    clip = [6.1] * 4 + [0.0] * 11
    assert moving_clips([clip], 256) == [True]
    assert moving_clips([[6.1] * 3 + [0.0] * 12], 256) == [False]
    assert moving_clips([clip], 480) == [False]
    assert moving_clips([[11.3] * 4 + [0.0] * 11], 480) == [True]


def test_uneven_motion_has_larger_interpolation_error() -> None:
    assert FOUND["even"]["proxy.midframe_flow_mae"] > FOUND["stutter"]["proxy.midframe_flow_mae"]
    assert FOUND["stutter"]["proxy.freeze_ratio"] == pytest.approx(24 / 31)


def test_a_loop_repeats_at_its_length() -> None:
    assert FOUND["loop"]["proxy.repeat_peak"] == pytest.approx(1, abs=1e-6)
    assert FOUND["loop"]["proxy.repeat_lag_s"] == 2
    assert FOUND["fast"]["proxy.repeat_peak"] < 0.5


def test_a_cut_shows_in_colours_and_a_drift_in_light() -> None:
    assert FOUND["cut"]["proxy.lab_hist_consistency"] < FOUND["slow"]["proxy.lab_hist_consistency"] - 0.05
    assert FOUND["darker"]["proxy.drift_luma"] < -20
    assert FOUND["darker"]["proxy.lab_hist_consistency_clipfirst"] < 0.9


def test_too_short_videos_have_no_number_rather_than_a_wrong_one() -> None:
    one = proxies(STILL[:1], FPS)
    assert math.isnan(one["proxy.flow_top5_px"])
    assert math.isnan(one["proxy.moving_clip_rate"])
    assert math.isnan(one["vbench.temporal_flickering_unfiltered"])
    assert math.isnan(proxies(pan(1, 31), FPS)["proxy.drift_luma"])


def test_frames_of_another_kind() -> None:
    for wrong in (STILL.astype(np.float32), STILL[0], STILL[:0]):
        with pytest.raises(ValueError, match="frames must be uint8"):
            proxies(wrong, FPS)
