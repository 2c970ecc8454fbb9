"""How much a video moves and how evenly, from dense optical flow (Dense Inverse Search, as OpenCV implements it).

Flow is a field [H, W, 2] of (x, y) displacements in pixels: what lies at p in the first frame lies at p + flow(p) in
the second. DIS matches patches of 8 pixels by brightness: it sees no motion in a plain area, is wrong near borders and
where something is uncovered, and follows displacements of a few dozen pixels at most.
"""

import itertools
from collections.abc import Iterator

import cv2
import numpy as np

from metrics.frames import check_frames, luma, mean_or_nan

STRONGEST = 0.05
"""Share of a frame's pixels whose flow counts as its strongest motion."""


def flow_between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Optical flow in pixels, fp32 [H, W, 2], from one luma image, uint8 [H, W], to another."""
    # One object per call: it keeps buffers of the last size, and making it costs microseconds.
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    method.setFinestScale(0)  # whole resolution; the preset stops at half, too coarse for videos of 64 pixels
    return method.calc(first, second, None)


def motion_magnitude(frames: np.ndarray) -> dict[str, float]:
    """Mean optical flow from each frame to the next, of frames uint8 [T, H, W, 3].

    Returns, in pixels per frame: `flow_mean`, the mean of |flow| over pixels and pairs of frames; `flow_strongest`, the
    same over the 5 % of pixels with the largest |flow| of each pair, which a small object on a still background does
    not dilute. A video of one frame has no motion to measure: nan.
    """
    means, strongest = [], []
    for magnitude in _magnitudes(check_frames(frames)):
        count = max(1, round(STRONGEST * magnitude.size))
        means.append(magnitude.mean())
        strongest.append(mean_of_largest(magnitude, count))
    return {"flow_mean": mean_or_nan(means), "flow_strongest": mean_or_nan(strongest)}


def interpolation_error(frames: np.ndarray) -> float:
    """How badly each frame of [T, H, W, 3] is foretold by its two neighbours: mean absolute error in levels.

    With F the flow from frame t - 1 to frame t + 1, frame t is foretold as (I[t-1](p - F/2) + I[t+1](p + F/2)) / 2.
    Even motion is foretold well, jerks and flicker are not: less is smoother. A still video has 0, and so it says
    nothing alone. A video of fewer than three frames has none: nan.
    """
    check_frames(frames)
    gray = [luma(frame) for frame in frames]
    errors = []
    for t in range(1, len(frames) - 1):
        half = flow_between(gray[t - 1], gray[t + 1]) / 2
        before, after = shifted(frames[t - 1], -half), shifted(frames[t + 1], half)
        errors.append(np.abs((before + after) / 2 - frames[t]).mean())
    return mean_or_nan(errors)


def shifted(frame: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """The frame read at p + offset(p), bilinear, with the border repeated outside."""
    height, width = frame.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(
        frame.astype(np.float32),
        x + offset[..., 0].astype(np.float32),
        y + offset[..., 1].astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )


def mean_of_largest(values: np.ndarray, count: int) -> np.floating:
    """The mean of the `count` largest."""
    return np.partition(values.ravel(), -count)[-count:].mean()


def flow_colours(flow: np.ndarray, full: float) -> np.ndarray:
    """A picture uint8 [H, W, 3] of a flow [H, W, 2]: hue is direction, saturation |flow| as a share of `full`."""
    angle = np.arctan2(flow[..., 1], flow[..., 0]) % (2 * np.pi)
    strength = np.clip(np.linalg.norm(flow, axis=-1) / max(full, 1e-6), 0, 1)
    hsv = np.stack([angle / (2 * np.pi) * 180, 255 * strength, np.full_like(strength, 255)], axis=-1)
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)


def _magnitudes(frames: np.ndarray) -> Iterator[np.ndarray]:
    gray = [luma(frame) for frame in frames]
    for first, second in itertools.pairwise(gray):
        yield np.linalg.norm(flow_between(first, second), axis=-1)
