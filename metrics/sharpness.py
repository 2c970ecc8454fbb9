"""How much fine detail the frames of a video have."""

import cv2
import numpy as np

from metrics.frames import check_frames, luma


def laplacian_variance(frames: np.ndarray) -> float:
    """Mean over frames of the variance of the Laplacian of luma, in squared levels, of frames uint8 [T, H, W, 3].

    The Laplacian is the kernel [0 1 0; 1 -4 1; 0 1 0]. Blur lowers it; noise, flicker of pixels and hard edges raise
    it, so that only videos of the same scene and size can be compared, and more is not always better.
    """
    return float(np.mean([cv2.Laplacian(luma(frame), cv2.CV_64F).var() for frame in check_frames(frames)]))
