"""How alike the frames of a video are, in colour and structure: each to the next, and each clip to the first clip.

A clip is a piece of the model's native length. Alike is not good by itself: a frozen or a looping video scores 1.
"""

import itertools

import numpy as np
from skimage.metrics import structural_similarity

from metrics.frames import check_frames, colour_histogram, luma, mean_or_nan

POSITIONS = 8
"""Evenly spaced frames of a clip at which its structure is compared."""

_WINDOW = 11  # pixels of SSIM's Gaussian window of sigma 1.5


def frame_colour_similarity(frames: np.ndarray) -> float:
    """Mean colour similarity, 0..1, of each frame with the next, of frames uint8 [T, H, W, 3]; nan for one frame.

    The similarity of two frames is the intersection of their colour histograms, sum over bins of min(p, q), with 8 x 8
    x 8 bins of RGB. It does not see where a colour is.
    """
    histograms = [colour_histogram(frame[None]) for frame in check_frames(frames)]
    return mean_or_nan([np.minimum(a, b).sum() for a, b in itertools.pairwise(histograms)])


def frame_structural_similarity(frames: np.ndarray) -> float:
    """Mean SSIM of the luma of each frame with the next, of frames uint8 [T, H, W, 3]; nan for one frame.

    SSIM (Wang et al. 2004) with their Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03: at most 1, for equal frames.
    """
    gray = [luma(frame) for frame in check_frames(frames)]
    return mean_or_nan([_ssim(a, b) for a, b in itertools.pairwise(gray)])


def clip_colour_similarity(frames: np.ndarray, clip_frames: int) -> list[float]:
    """Colour similarity, 0..1, of each clip after the first with the first: one number per later clip.

    That of `frame_colour_similarity`, with histograms of all frames of a clip of `clip_frames` frames.
    """
    clips = _clips(frames, clip_frames)
    histograms = [colour_histogram(clip) for clip in clips]
    return [float(np.minimum(histograms[0], other).sum()) for other in histograms[1:]]


def clip_structural_similarity(frames: np.ndarray, clip_frames: int) -> list[float]:
    """SSIM of each clip after the first with the first: one number per clip, none if there is but one clip.

    The mean SSIM of luma between frames at the same place in both clips, at 8 evenly spaced places. A loop as long as a
    clip has
    1: read it together with a measure of motion.
    """
    clips = [[luma(frame) for frame in clip] for clip in _clips(frames, clip_frames)]
    scores = []
    for clip in clips[1:]:
        places = np.unique(np.linspace(0, len(clip) - 1, POSITIONS).round().astype(int))
        scores.append(mean_or_nan([_ssim(clips[0][place], clip[place]) for place in places]))
    return scores


def num_clips(num_frames: int, clip_frames: int) -> int:
    """Clips of a video: the last may be shorter, but a rest of less than half a clip is left out."""
    whole, rest = divmod(num_frames, clip_frames)
    return max(1, whole + (rest * 2 >= clip_frames))


def _clips(frames: np.ndarray, clip_frames: int) -> list[np.ndarray]:
    if clip_frames < 1:
        raise ValueError(f"a clip has 1 frame or more, got {clip_frames}")
    count = num_clips(len(check_frames(frames)), clip_frames)
    return [frames[i * clip_frames : (i + 1) * clip_frames] for i in range(count)]


def _ssim(first: np.ndarray, second: np.ndarray) -> float:
    if min(first.shape) < _WINDOW:
        raise ValueError(f"SSIM needs frames of {_WINDOW} x {_WINDOW} pixels or more, got {list(first.shape)}")
    score = structural_similarity(
        first, second, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return float(score)
