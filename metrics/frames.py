"""What every measure asks of its frames: their shape, brightness and colours, and means of what may be nothing."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

BINS = 8
"""Bins per colour channel of a histogram: 32 levels each."""


def check_frames(frames: np.ndarray) -> np.ndarray:
    """The frames themselves; ValueError unless they are uint8 [T, H, W, 3] with at least one frame."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise ValueError(f"frames must be uint8 [T, H, W, 3] with T >= 1, got {frames.dtype} {list(frames.shape)}")
    return frames


def luma(frame: np.ndarray) -> np.ndarray:
    """Brightness uint8 [H, W] of a frame uint8 [H, W, 3]: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)."""
    return cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)


def colour_histogram(frames: np.ndarray) -> np.ndarray:
    """Share of the pixels of frames [T, H, W, 3], in any colour space, in each bin: [BINS, BINS, BINS], sum 1."""
    tall = np.ascontiguousarray(frames).reshape(-1, frames.shape[2], 3)
    counts = cv2.calcHist([tall], [0, 1, 2], None, [BINS] * 3, [0, 256] * 3)
    return counts / counts.sum()


def mean_or_nan(values: Sequence[Any]) -> float:
    """The mean; nan of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")
