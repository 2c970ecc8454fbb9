"""The exact measures of the embedded world for videos that show it; see `metrics.world`. Imports little, as proxies do."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.media.read_video import read_frames
from engine.shown import quoted
from metrics.world import WORLD_UNITS, why_not_world, world_metrics

if TYPE_CHECKING:
    from evaluation.videos import Video

WORLD = {f"world.{name}": unit for name, unit in WORLD_UNITS.items()}
"""Every exact measure by its name in reports, with its unit."""


def videos_of_world(videos: Sequence["Video"]) -> tuple[list["Video"], str | None]:
    """Select the videos that have exact measures, and explain why others, if any, have none.

    They need captions of the world, its size, and one known native length, since identity and drift are measured
    against the first native length of a video.
    """
    reasons = {video.path: _why_not(video) for video in videos}
    of_world = [video for video in videos if reasons[video.path] is None]
    reason = next((reason for reason in reasons.values() if reason is not None), None)
    if (not_one := why_not_one_native(of_world)) is not None:
        return [], not_one
    return of_world, reason


def why_not_one_native(videos: Sequence["Video"]) -> str | None:
    """None if all videos have one known native length, otherwise the reason."""
    native = {video.native_frames for video in videos}
    if None in native:
        return "the model's native length is not known; give --native_frames"
    if len(native) > 1:
        lengths = ", ".join(map(str, sorted(n for n in native if n is not None)))
        return f"the videos are of models of different native lengths ({lengths} frames)"
    return None


def _why_not(video: "Video") -> str | None:
    if why_not_world([video.prompt], *video.size) is None:
        return None
    return why_not_world([], *video.size) or f"this prompt is no caption of the world: {quoted(video.prompt)}"


def measure_world(path: Path, prompt: str, native_frames: int) -> dict[str, float]:
    """Compute all measures of `WORLD` for an mp4; NaN where one does not apply."""
    found = world_metrics(read_frames(path), prompt, native_frames)
    return {f"world.{name}": value for name, value in found.values.items()}
