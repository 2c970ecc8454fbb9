"""The measures of a long video's course for videos longer than their model's native length; see `metrics.course`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.media.read_video import read_frames
from evaluation.world import why_not_one_native
from metrics.course import COURSE_UNITS, course_metrics

if TYPE_CHECKING:
    from evaluation.videos import Video

COURSE = {f"long.{name}": unit for name, unit in COURSE_UNITS.items()}
"""Every measure of the course by its name in reports, with its unit."""


def long_videos(videos: Sequence["Video"]) -> tuple[list["Video"], str | None]:
    """Select the videos longer than their native length, and explain why there are none, if so."""
    if (reason := why_not_one_native(videos)) is not None:
        return [], reason
    longer = [video for video in videos if video.num_frames > (video.native_frames or 0)]
    return longer, None if longer else f"no video is longer than the native {videos[0].native_frames} frames"


def measure_course(path: Path, native_frames: int) -> dict[str, float]:
    """Compute all measures of `COURSE` for an mp4; NaN where it is too short for one."""
    return {f"long.{name}": value for name, value in course_metrics(read_frames(path), native_frames).values.items()}
