"""Weight-free measures that stand beside VBench's dimensions where VBench is not there; never under their names.

No correlation with VBench has been measured. One value is VBench's own formula,
`vbench.temporal_flickering_unfiltered`, and even that is not the official score, which first drops clips that move.
Nothing here stands for aesthetic quality, the identity of a subject or the text: those need networks and are not
available without them. Optical flow is Dense Inverse Search as OpenCV has it, which finds displacements of tens of
pixels that Farneback's misses.
"""

import hashlib
import importlib.metadata
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from skimage.measure import blur_effect
from skimage.metrics import structural_similarity

import engine.media.read_video
from engine.media.read_video import read_video

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
_PACKAGES = ("av", "numpy", "opencv-python-headless", "scikit-image")


def proxies(frames: np.ndarray, fps: int) -> dict[str, float]:
    """Every one of `PROXIES` for frames uint8 [T, H, W, 3] at `fps` per second; nan where a video is too short."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0 or fps < 1:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)} at {fps} fps")
    gray = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])
    differences = [float(np.abs(a.astype(np.int16) - b).mean()) for a, b in itertools.pairwise(frames)]
    return {
        "vbench.temporal_flickering_unfiltered": (255 - _mean(differences)) / 255,
        **_flow(gray, fps),
        "proxy.midframe_flow_mae": _midframes(frames, gray),
        "proxy.freeze_ratio": _mean([difference < _SAME_LEVELS for difference in differences]),
        "proxy.lab_hist_consistency": _histograms(frames),
        "proxy.lab_hist_consistency_clipfirst": _histograms(frames[:: CLIP_SECONDS * fps]),
        "proxy.ssim_prev": _ssim(gray),
        **_repeats(gray, fps),
        **_drifts(frames, gray, fps),
        "proxy.blur_effect": _blur(gray),
        "proxy.clipping_ratio": float(np.mean((gray <= 2) | (gray >= 253))),
    }


def measure_file(path: Path, fps: int) -> dict[str, float]:
    """`proxies` of a video file, on one thread."""
    cv2.setNumThreads(1)
    return proxies(read_frames(path), fps)


def read_frames(path: Path) -> np.ndarray:
    """All frames of a video file, uint8 [T, H, W, 3], by its own colour tags; UserError if it does not decode."""
    return np.stack(list(read_video(path)))


def version() -> str:
    """SHA-256 over this code and the versions of its libraries: what a kept value belongs to, beside its video."""
    versions = "".join(f"{package} {importlib.metadata.version(package)}\n" for package in _PACKAGES)
    sources = b"".join(
        Path(module.__file__).read_bytes() for module in (sys.modules[__name__], engine.media.read_video)
    )
    return hashlib.sha256(sources + versions.encode()).hexdigest()


def flow_between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Optical flow in pixels, fp32 [H, W, 2], from one luma image, uint8 [H, W], to another."""
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
        "proxy.flow_top5_px": _mean([value for clip in pairs for value in clip]),
        "proxy.moving_clip_rate": _mean(moving_clips(pairs, min(gray.shape[1:]))),
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
    magnitude = np.linalg.norm(flow_between(first, second), axis=-1).ravel()
    count = max(1, int(magnitude.size * 0.05))
    return float(np.partition(magnitude, -count)[-count:].mean())


def _midframes(frames: np.ndarray, gray: np.ndarray) -> float:
    """Odd frames as (I_{t-1}(p + G/2) + I_{t+1}(p + F/2)) / 2, with forward flow F and backward flow G."""
    errors = []
    for t in range(1, len(frames) - 1, 2):
        forward, backward = flow_between(gray[t - 1], gray[t + 1]), flow_between(gray[t + 1], gray[t - 1])
        rebuilt = (_read_at(frames[t - 1], backward / 2) + _read_at(frames[t + 1], forward / 2)) / 2
        errors.append(float(np.abs(rebuilt - frames[t]).mean()))
    return (255 - _mean(errors)) / 255


def _read_at(frame: np.ndarray, offset: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(
        frame.astype(np.float32),
        x + offset[..., 0],
        y + offset[..., 1],
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )


def _histograms(frames: np.ndarray) -> float:
    """Mean over t of (s(t, t - 1) + s(t, 0)) / 2, s = 1 - the Bhattacharyya distance of 8 x 8 x 8 Lab histograms."""
    histograms = []
    for frame in frames:
        lab = cv2.cvtColor(frame, cv2.COLOR_RGB2LAB)
        counts = cv2.calcHist([lab], [0, 1, 2], None, [8] * 3, [0, 256] * 3)
        histograms.append(counts / counts.sum())
    likeness = [
        [1 - cv2.compareHist(now, other, cv2.HISTCMP_BHATTACHARYYA) for other in (before, histograms[0])]
        for before, now in itertools.pairwise(histograms)
    ]
    return _mean(likeness)


def _ssim(gray: np.ndarray) -> float:
    scale = min(1.0, _SSIM_SIDE / min(gray.shape[1:]))
    size = [max(7, round(side * scale)) for side in gray.shape[:0:-1]]
    small = [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in gray]
    return _mean([structural_similarity(a, b, data_range=255) for a, b in itertools.pairwise(small)])


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
    saturation = _mean([cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)[..., 1].mean() for frame in frames])
    return float(gray.mean()), saturation, _mean([cv2.Laplacian(frame, cv2.CV_64F).var() for frame in gray])


def _blur(gray: np.ndarray) -> float:
    places = np.unique(np.linspace(0, len(gray) - 1, _BLUR_FRAMES).round().astype(int))
    values = [float(blur_effect(gray[place])) for place in places if gray[place].min() < gray[place].max()]
    return _mean(values)


def _mean(values: list) -> float:
    return float(np.mean(values)) if len(values) else math.nan
