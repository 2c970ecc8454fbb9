"""Every measure of any video at once, by name and unit."""

from dataclasses import dataclass

import numpy as np

from metrics.motion import interpolation_error, motion_magnitude
from metrics.sharpness import laplacian_variance
from metrics.similarity import (
    clip_colour_similarity,
    clip_structural_similarity,
    frame_colour_similarity,
    frame_structural_similarity,
)

VIDEO_UNITS = {
    "flow_mean": "px/frame",
    "flow_strongest": "px/frame",
    "interpolation_error": "levels",
    "laplacian_variance": "levels²",
    "frame_colour_similarity": "0..1",
    "frame_structural_similarity": "SSIM",
    "clip_colour_similarity": "0..1",
    "clip_structural_similarity": "SSIM",
}
"""Every measure of `video_metrics`, with its unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoReading:
    """Measures of one video by name (`VIDEO_UNITS`), and those that compare clips as lists, one per later clip."""

    values: dict[str, float]
    by_clip: dict[str, list[float]]


def video_metrics(frames: np.ndarray, clip_frames: int) -> VideoReading:
    """Measures of frames uint8 [T, H, W, 3]; `clip_frames` is the native length. Fewer clips than two: nan."""
    by_clip = {
        "clip_colour_similarity": clip_colour_similarity(frames, clip_frames),
        "clip_structural_similarity": clip_structural_similarity(frames, clip_frames),
    }
    values = {
        **motion_magnitude(frames),
        "interpolation_error": interpolation_error(frames),
        "laplacian_variance": laplacian_variance(frames),
        "frame_colour_similarity": frame_colour_similarity(frames),
        "frame_structural_similarity": frame_structural_similarity(frames),
        **{name: float(np.mean(scores)) if scores else float("nan") for name, scores in by_clip.items()},
    }
    return VideoReading(values=values, by_clip=by_clip)
