"""The course of a long video: similarity against distance in time, loops, slopes of colour and sharpness, cuts.

A video that freezes or loops is alike from end to end, and one that drifts is alike from frame to frame: measures of consistency reward
the first and cannot see the second. None of these is good or bad by itself; docs/long-videos.md has their values on clips with known truth.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from metrics.frames import check_frames, luma, mean_or_nan

COURSE_UNITS = {
    "alike_near": "0..1, at a native length",
    "alike_far": "0..1, at the largest distances",
    "loop": "-1..1",
    "loop_lag": "frames",
    "loops": "share of videos",
    "colour_slope": "levels per 100 frames",
    "sharpness_slope": "log ratio per 100 frames",
    "cuts": "count",
}
"""Every measure of `course_metrics`, with its unit."""

READING = (
    "alike_near and alike_far are 1 for a frozen video and for a loop, and low where a scene changes as it should; loop and loops are also those of "
    "true returns, such as straight paths and orbits of the embedded world, so that only differences between methods count; loop_lag is of "
    "meaning where loop is 0.9 or more; colour_slope rises with drift of one direction and with cuts, sharpness_slope is below 0 where a video "
    "gets softer and moves either way with cuts; cuts are wrong unless the prompt has some, and noise on a loop gave up to 3 in 257 frames"
)
"""How to read each measure, with its false alarms; docs/long-videos.md has the figures."""

LOOP = 0.9
"""Correlation from which on a video is said to loop; docs/long-videos.md has the errors at this number."""

SAME = 0.01  # correlations that differ by less are equal: a loop returns after twice its length too
DISTANCES = 12  # of the curve
THUMBNAIL = 16  # pixels of a side, of pictures that are compared at a distance
LEVELS = 48.0  # mean difference of thumbnails at which frames are no longer alike at all
CUT_LEVELS = 12.0  # least mean difference of thumbnails at a cut
CUT_RATIO = 4.0  # of the median difference around it
AROUND = 8  # frames to either side


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """Measures of one video by name (`COURSE_UNITS`), and the curve of (distance in frames, similarity)."""

    values: dict[str, float]
    curve: list[tuple[int, float]]


def course_metrics(frames: np.ndarray, native_frames: int) -> Course:
    """Measures of frames uint8 [T, H, W, 3] of a model of this native length; nan where a video is too short for one."""
    small = thumbnails(frames)
    curve = similarity_curve(small, distances(len(frames), native_frames))
    far = [alike for distance, alike in curve if distance >= len(frames) // 2]
    loop, lag = best_loop(small, native_frames)
    return Course(
        values={
            "alike_near": dict(curve).get(native_frames, math.nan),
            "alike_far": mean_or_nan(far),
            "loop": loop,
            "loop_lag": lag,
            "loops": math.nan if math.isnan(loop) else float(loop >= LOOP),
            "colour_slope": colour_slope(small),
            "sharpness_slope": sharpness_slope(frames),
            "cuts": float(len(find_cuts(small))),
        },
        curve=curve,
    )


def thumbnails(frames: np.ndarray) -> np.ndarray:
    """Frames averaged over areas to 16 x 16 pixels, fp32 [T, 16, 16, 3] in levels."""
    size = (THUMBNAIL, THUMBNAIL)
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in check_frames(frames)]).astype(
        np.float32
    )


def distances(num_frames: int, native_frames: int) -> list[int]:
    """Distances of the curve, evenly spread in their logarithm up to three quarters of the video, the native length among them."""
    last = num_frames * 3 // 4
    if last < 1:
        return []
    spread = np.unique(np.geomspace(1, last, DISTANCES).round().astype(int)).tolist()
    return sorted({*spread, *([native_frames] if native_frames <= last else [])})


def similarity_curve(small: np.ndarray, at: Sequence[int]) -> list[tuple[int, float]]:
    """Mean similarity of frames at each distance: 1 for equal ones, 0 from a mean difference of 48 levels of their thumbnails on."""
    return [(d, float(np.clip(1 - _differences(small, d) / LEVELS, 0, 1).mean())) for d in at if d < len(small)]


def best_loop(small: np.ndarray, native_frames: int) -> tuple[float, float]:
    """The best correlation of what changes with itself at a lag of a native length or more, and the lag; nan, nan if too short.

    What changes are the differences of a frame to the mean frame. At least a native length must overlap. A video in which nothing
    changes, less than a level, repeats nothing: 0.
    """
    changes = (small - small.mean(0)).reshape(len(small), -1)
    lags = range(native_frames, len(small) - native_frames + 1)
    if not lags:
        return math.nan, math.nan
    if np.abs(changes).mean() < 1.0:
        return 0.0, math.nan
    found = [(_correlation(changes[:-lag], changes[lag:]), lag) for lag in lags]
    best = max(alike for alike, _ in found)
    return best, float(next(lag for alike, lag in found if alike >= best - SAME))


def colour_slope(small: np.ndarray) -> float:
    """How fast the mean colour goes one way, levels per 100 frames: length of the slopes of R, G and B by least squares."""
    if len(small) < 2:
        return math.nan
    return float(np.linalg.norm(_slopes(small.mean((1, 2)))))


def sharpness_slope(frames: np.ndarray) -> float:
    """Slope of the logarithm of the variance of the Laplacian of luma, per 100 frames: below 0 a video gets softer."""
    if len(frames) < 2:
        return math.nan
    variances = [cv2.Laplacian(luma(frame), cv2.CV_64F).var() for frame in frames]
    return float(_slopes(np.log(np.maximum(variances, 1e-3))[:, None])[0])


def find_cuts(small: np.ndarray) -> list[int]:
    """Frames that differ from the one before by 12 levels and by four times the median of the eight pairs on either side."""
    steps = _differences(small, 1) if len(small) > 1 else np.zeros(0)
    found: list[int] = []
    for at, step in enumerate(steps):
        around = np.concatenate([steps[max(at - AROUND, 0) : at], steps[at + 1 : at + 1 + AROUND]])
        usual = float(np.median(around)) if len(around) else 0.0
        if step >= CUT_LEVELS and step >= CUT_RATIO * usual:
            found.append(at + 1)
    return found


def _differences(small: np.ndarray, distance: int) -> np.ndarray:
    """Mean absolute difference in levels of frames so far apart, [T - distance]."""
    return np.abs(small[distance:] - small[:-distance]).mean((1, 2, 3))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    power = math.sqrt(float((a**2).sum()) * float((b**2).sum()))
    return float((a * b).sum()) / power if power > 0 else 0.0


def _slopes(values: np.ndarray) -> np.ndarray:
    """Least-squares slope of each column [T, C], per 100 frames."""
    time = np.arange(len(values)) - (len(values) - 1) / 2
    return 100 * (time[:, None] * (values - values.mean(0))).sum(0) / (time**2).sum()
