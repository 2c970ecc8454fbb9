"""The exact measures of the embedded world for videos that show it: see `metrics.world`. Imports little, as proxies do."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.proxies import read_frames
from metrics.version import source_digest
from metrics.world import WORLD_UNITS, why_not_world, world_metrics

if TYPE_CHECKING:
    from evaluation.videos import Video

WORLD = {f"world.{name}": unit for name, unit in WORLD_UNITS.items()}
"""Every exact measure by the name that it has in reports, with its unit."""


def why_not(videos: Sequence["Video"]) -> str | None:
    """None if these videos can be measured as clips of the world; otherwise the reason, as a sentence.

    They must be of captions of the world, of its size, and all of one known native length, since identity and drift
    are told from the first native length of a video.
    """
    for size in sorted({video.size for video in videos}):
        reason = why_not_world([video.prompt for video in videos if video.size == size], *size)
        if reason is not None:
            return reason
    native = {video.native_frames for video in videos}
    if None in native:
        return "how many frames the model was trained on is not known: --native_frames says it"
    if len(native) > 1:
        lengths = ", ".join(map(str, sorted(n for n in native if n is not None)))
        return f"the videos are of models of different native lengths ({lengths} frames)"
    return None


def measure_world(path: Path, prompt: str, native_frames: int) -> dict[str, float]:
    """Every one of `WORLD` for an mp4; nan where a video has none."""
    found = world_metrics(read_frames(path), prompt, native_frames)
    return {f"world.{name}": value for name, value in found.values.items()}


def version() -> str:
    """What a kept value belongs to, beside its video, prompt and native length."""
    return source_digest()
