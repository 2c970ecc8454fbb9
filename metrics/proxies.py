"""Weight-free measures for use without VBench; never named like its dimensions.

No correlation with VBench has been measured. One value is VBench's own formula,
`vbench.temporal_flickering_unfiltered`, and even that is not the official score, which first drops clips that move.
None measures aesthetic quality, the identity of a subject or the text, which need networks. Definitions differ from those of
`metrics.motion` and `metrics.similarity` where they follow VBench's or serve large pictures: a faster flow, SSIM on smaller
pictures, frames rebuilt from both sides.
"""

import itertools
import math
from collections.abc import Iterator

import cv2
import numpy as np
from skimage.measure import blur_effect
from skimage.metrics import structural_similarity

from metrics.frames import check_frames, colour_histogram, luma, mean_or_nan
from metrics.motion import mean_of_largest, shifted
from metrics.sharpness import laplacian_variance

PROXIES = {
    "vbench.temporal_flickering_unfiltered": "VBench's temporal_flickering formula on all frames: 1 if still",
    "proxy.flow_top5_px": "px per 1/8 s: mean of the largest 5 % of |DIS flow|, beside dynamic_degree",
    "proxy.moving_clip_rate": "share of 2 s clips that dynamic_degree's rule calls moving, DIS instead of RAFT",
    "proxy.midframe_flow_mae": "(255 - error) / 255 of odd frames rebuilt by DIS half-warps, beside motion_smoothness",
    "proxy.freeze_ratio": "share of frames that repeat the one before",
    "proxy.lab_hist_consistency": "Lab histograms against previous and first frame, beside background_consistency",
    "proxy.lab_hist_consistency_clipfirst": "the same on the first frame of each 2 s clip",
    "proxy.ssim_prev": "SSIM of luma with the previous frame",
    "proxy.repeat_peak": "-1..1: best self-similarity of what moves, 1.5 s or more apart; 1 is a loop",
    "proxy.repeat_lag_s": "s: the distance at which that is",
    "proxy.drift_luma": "levels: mean luma of the last 2 s less that of the first",
    "proxy.drift_saturation": "levels: mean HSV saturation, likewise",
    "proxy.drift_sharpness": "log of the ratio of Laplacian variances, last 2 s to first",
    "proxy.blur_effect": "0..1 (Crete et al. 2007): more is blurrier; not imaging_quality",
    "proxy.clipping_ratio": "share of pixels that are black or white",
}
"""Every proxy by name, with its unit or meaning."""

CLIP_SECONDS = 2
_FLOW_RATE = 8  # pairs a second at which dynamic_degree looks
_SAME_LEVELS = 0.5  # mean difference below which a frame repeats the one before: less than encoders add
_REPEAT_SECONDS = 1.5
_THUMBNAIL = (32, 18)
_SSIM_SIDE = 240  # shorter side in pixels at which SSIM is taken: it is slow, and fine noise is not structure
_BLUR_FRAMES = 8
_SMALL_SIDE = 256


def proxies(frames: np.ndarray, fps: int) -> dict[str, float]:
    """Every one of `PROXIES` for frames uint8 [T, H, W, 3] at `fps` per second; nan where a video is too short."""
    if fps < 1:
        raise ValueError(f"fps must be 1 or more, got {fps}")
    gray = np.stack([luma(frame) for frame in check_frames(frames)])
    differences = [float(np.abs(a.astype(np.int16) - b).mean()) for a, b in itertools.pairwise(frames)]
    return {
        "vbench.temporal_flickering_unfiltered": (255 - mean_or_nan(differences)) / 255,
        **_flow(gray, fps),
        "proxy.midframe_flow_mae": _midframes(frames, gray),
        "proxy.freeze_ratio": mean_or_nan([difference < _SAME_LEVELS for difference in differences]),
        "proxy.lab_hist_consistency": _histograms(frames),
        "proxy.lab_hist_consistency_clipfirst": _histograms(frames[:: CLIP_SECONDS * fps]),
        "proxy.ssim_prev": _ssim(gray),
        **_repeats(gray, fps),
        **_drifts(frames, gray, fps),
        "proxy.blur_effect": _blur(gray),
        "proxy.clipping_ratio": float(np.mean((gray <= 2) | (gray >= 253))),
    }


def fast_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`metrics.motion.flow_between` by the fast preset, of a quarter of the resolution unless a picture is small."""
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    if min(first.shape) < _SMALL_SIDE:
        method.setFinestScale(0)  # the preset stops at a quarter of the resolution
    return method.calc(first, second, None)


def moving_clips(pairs: list[list[float]], side: int) -> list[bool]:
    """Whether each clip moves, by dynamic_degree's rule, from the strongest flow of its pairs of frames at 8 a second.

    A pair moves if its mean of the largest 5 % of |flow| exceeds 6 px per 256 px of the shorter `side`; a clip of n
    frames moves if round(4 n / 16) of its pairs do.
    """
    threshold = 6.0 * side / 256
    return [sum(value > threshold for value in clip) >= round(4 * (len(clip) + 1) / 16) for clip in pairs]


def _flow(gray: np.ndarray, fps: int) -> dict[str, float]:
    step = max(1, round(fps / _FLOW_RATE))
    pairs = [
        [_strongest(a, b) for a, b in itertools.pairwise(clip[::step])] for clip in _clips(gray, CLIP_SECONDS * fps)
    ]
    pairs = [clip for clip in pairs if clip]
    return {
        "proxy.flow_top5_px": mean_or_nan([value for clip in pairs for value in clip]),
        "proxy.moving_clip_rate": mean_or_nan(moving_clips(pairs, min(gray.shape[1:]))),
    }


def _clips(frames: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Whole clips, and a rest that reaches back to be as long, as VBench-Long cuts them."""
    if len(frames) < length:
        yield frames
        return
    for start in range(0, len(frames) - length + 1, length):
        yield frames[start : start + length]
    if len(frames) % length:
        yield frames[-length:]


def _strongest(first: np.ndarray, second: np.ndarray) -> float:
    magnitude = np.linalg.norm(fast_flow(first, second), axis=-1)
    return float(mean_of_largest(magnitude, max(1, int(magnitude.size * 0.05))))


def _midframes(frames: np.ndarray, gray: np.ndarray) -> float:
    """Odd frames as (I_{t-1}(p + G/2) + I_{t+1}(p + F/2)) / 2, with forward flow F and backward flow G."""
    errors = []
    for t in range(1, len(frames) - 1, 2):
        forward, backward = fast_flow(gray[t - 1], gray[t + 1]), fast_flow(gray[t + 1], gray[t - 1])
        rebuilt = (shifted(frames[t - 1], backward / 2) + shifted(frames[t + 1], forward / 2)) / 2
        errors.append(float(np.abs(rebuilt - frames[t]).mean()))
    return (255 - mean_or_nan(errors)) / 255


def _histograms(frames: np.ndarray) -> float:
    """Mean over t of (s(t, t - 1) + s(t, 0)) / 2, s = 1 - the Bhattacharyya distance of 8 x 8 x 8 Lab histograms."""
    histograms = [colour_histogram(cv2.cvtColor(frame, cv2.COLOR_RGB2LAB)[None]) for frame in frames]
    likeness = [
        [1 - cv2.compareHist(now, other, cv2.HISTCMP_BHATTACHARYYA) for other in (before, histograms[0])]
        for before, now in itertools.pairwise(histograms)
    ]
    return mean_or_nan(likeness)


def _ssim(gray: np.ndarray) -> float:
    scale = min(1.0, _SSIM_SIDE / min(gray.shape[1:]))
    size = [max(7, round(side * scale)) for side in gray.shape[:0:-1]]
    small = [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in gray]
    return mean_or_nan([structural_similarity(a, b, data_range=255) for a, b in itertools.pairwise(small)])


def _repeats(gray: np.ndarray, fps: int) -> dict[str, float]:
    """The lag L of 1.5 s to half the video with the largest mean cosine of thumbnails t and t + L less their mean."""
    thumbnails = np.stack([cv2.resize(frame, _THUMBNAIL, interpolation=cv2.INTER_AREA) for frame in gray]).reshape(
        len(gray), -1
    )
    moving = thumbnails - thumbnails.mean(0, dtype=np.float64)
    norms = np.linalg.norm(moving, axis=1)
    lags = range(math.ceil(_REPEAT_SECONDS * fps), len(gray) // 2 + 1)
    # Rounding alone makes thumbnails of a still video differ by a level or so.
    if not lags or norms.mean() < math.sqrt(moving.shape[1]):
        return {"proxy.repeat_peak": math.nan, "proxy.repeat_lag_s": math.nan}
    unit = moving / np.maximum(norms, 1e-9)[:, None]
    peaks = [float((unit[lag:] * unit[:-lag]).sum(1).mean()) for lag in lags]
    best = int(np.argmax(peaks))
    return {"proxy.repeat_peak": peaks[best], "proxy.repeat_lag_s": lags[best] / fps}


def _drifts(frames: np.ndarray, gray: np.ndarray, fps: int) -> dict[str, float]:
    length = CLIP_SECONDS * fps
    names = ("proxy.drift_luma", "proxy.drift_saturation", "proxy.drift_sharpness")
    if len(frames) < 2 * length:
        return dict.fromkeys(names, math.nan)
    (luma0, saturation0, sharp0), (luma1, saturation1, sharp1) = (
        _window(frames[part], gray[part]) for part in (slice(length), slice(-length, None))
    )
    return dict(
        zip(
            names,
            (luma1 - luma0, saturation1 - saturation0, math.log(max(sharp1, 1e-9) / max(sharp0, 1e-9))),
            strict=True,
        )
    )


def _window(frames: np.ndarray, gray: np.ndarray) -> tuple[float, float, float]:
    saturation = mean_or_nan([cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)[..., 1].mean() for frame in frames])
    return float(gray.mean()), saturation, laplacian_variance(frames)


def _blur(gray: np.ndarray) -> float:
    places = np.unique(np.linspace(0, len(gray) - 1, _BLUR_FRAMES).round().astype(int))
    values = [float(blur_effect(gray[place])) for place in places if gray[place].min() < gray[place].max()]
    return mean_or_nan(values)
