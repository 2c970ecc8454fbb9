"""What every measure asks of its frames, and their brightness."""

import cv2
import numpy as np


def check_frames(frames: np.ndarray) -> np.ndarray:
    """The frames themselves; ValueError unless they are uint8 [T, H, W, 3] with at least one frame."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise ValueError(f"frames must be uint8 [T, H, W, 3] with T >= 1, got {frames.dtype} {list(frames.shape)}")
    return frames


def luma(frame: np.ndarray) -> np.ndarray:
    """Brightness uint8 [H, W] of a frame uint8 [H, W, 3]: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)."""
    return cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
