"""Measure the video files of a comparison; the measures are kept beside each video."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.errors import UserError
from engine.media.read_video import read_frames
from engine.shown import quoted
from evaluation.comparison.store import Comparison, Video
from evaluation.events import has_events, ranges_of, version_of
from evaluation.kept import keep_measures, read_measures
from metrics.course import COURSE_UNITS, course_metrics
from metrics.events import EVENT_UNITS, TextRange, event_metrics
from metrics.video import VIDEO_UNITS, VideoReading, video_metrics
from metrics.world import WORLD_UNITS, why_not_world, world_metrics

_SHOWN_PROMPTS = 3
_WORLD_SIZE = (64, 64)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A video with its record and its measures.

    Attributes:
        video: which.
        record: what `launch/generate.py` would write beside it.
        values: measures by name; nan where a video has none.
        by_clip: measures per clip of native length.
        version: `evaluation.events.version_of` its prompt when the measures were made.
    """

    video: Video
    record: dict[str, Any]
    values: dict[str, float]
    by_clip: dict[str, list[float]]
    version: str


def units(*, world: bool, events: bool = False, long: bool = False) -> dict[str, str]:
    """All measures with their units.

    `world` adds the exact measures of the embedded world, `events` those of its timelines, `long` those of a long video's course.
    """
    found = VIDEO_UNITS | (WORLD_UNITS if world else {}) | (EVENT_UNITS if events else {})
    return found | (COURSE_UNITS if long else {})


def units_of(comparison: Comparison) -> dict[str, str]:
    """The measures of a comparison's videos, with their units."""
    return units(world=has_world(comparison), events=bool(timelines(comparison)), long=comparison.long_measures)


def strange_prompts(comparison: Comparison) -> list[str]:
    """Prompts whose videos have no exact measures of the embedded world."""
    video = comparison.config.video
    return [prompt for prompt in comparison.prompts if why_not_world([prompt], video.height, video.width) is not None]


def timelines(comparison: Comparison) -> list[str]:
    """Prompts that are timelines of the embedded world; their videos are measured by events."""
    video = comparison.config.video
    return [prompt for prompt in comparison.prompts if has_events(prompt, video.height, video.width)]


def not_world(comparison: Comparison) -> str | None:
    """The reason why some videos lack the exact measures of the embedded world; None if all have them."""
    video, timed = comparison.config.video, timelines(comparison)
    strange = [prompt for prompt in strange_prompts(comparison) if prompt not in timed]
    if not strange and not timed:
        return None
    reasons = []
    if strange:
        prompts = "this prompt is" if len(strange) == 1 else f"{len(strange)} prompts are"
        named = ", ".join([*map(quoted, strange[:_SHOWN_PROMPTS]), *([".."] if len(strange) > _SHOWN_PROMPTS else [])])
        reasons.append(f"{prompts} no caption of the world: {named}")
    if timed:
        prompts = "1 prompt is a timeline" if len(timed) == 1 else f"{len(timed)} prompts are timelines"
        reasons.append(f"{prompts}, measured by events instead ({', '.join(EVENT_UNITS)})")
    return why_not_world([], video.height, video.width) or "; ".join(reasons)


def has_world(comparison: Comparison) -> bool:
    """Whether the exact measures of the embedded world apply to any video."""
    return len(strange_prompts(comparison)) < len(comparison.prompts)


def measure_all(
    videos: Iterable[Video],
    *,
    clip_frames: int,
    world: bool,
    events: bool = False,
    long: bool = False,
    progress: bool,
) -> list[Measured]:
    """Measure every video, or reuse measures by the same code of the same file.

    With `world`, videos of its size and captions have exact measures too, and with `events` those of its timelines; for others
    these are NaN. With `long` every video has those of its course.
    """
    return [
        _measure(video, clip_frames=clip_frames, world=world, events=events, long=long)
        for video in tqdm(list(videos), desc="measure", disable=not progress)
    ]


def _measure(video: Video, *, clip_frames: int, world: bool, events: bool, long: bool) -> Measured:
    record = video.record
    if record is None:
        raise UserError(f"{video.files.sidecar} has just been deleted; start the same command again")
    digest = hashlib.sha256(video.files.video.read_bytes()).hexdigest()
    if digest != record["video"]["sha256"]:
        raise UserError(
            f"{video.files.video} is not the file that its sidecar describes; delete both to make it again, and its line in the file of --measures if there is one"
        )
    names, version = units(world=world, events=events, long=long), version_of(video.prompt, long=long)
    world = world and not why_not_world([video.prompt], *_WORLD_SIZE)
    ranges = ranges_of(record["timeline"]) if events and has_events(video.prompt, *_WORLD_SIZE) else None
    key = {"video": digest, "version": version, "clip_frames": clip_frames, "world": world, "prompt": video.prompt}
    found = read_measures(video.files.measures, key)
    if found is None:
        frames = read_frames(video.files.video)
        found = _measures(frames, video.prompt, clip_frames=clip_frames, world=world, events=ranges)
        more = course_metrics(frames, clip_frames).values if long else {}
        found = VideoReading(values=found.values | more, by_clip=found.by_clip)
        keep_measures(video.files.measures, key, found)
    values = dict.fromkeys(names, math.nan) | found.values
    return Measured(video=video, record=record, values=values, by_clip=found.by_clip, version=version)


def _measures(
    frames: np.ndarray, prompt: str, *, clip_frames: int, world: bool, events: Sequence[TextRange] | None
) -> VideoReading:
    found = video_metrics(frames, clip_frames)
    if events is not None:
        return VideoReading(values=found.values | event_metrics(frames, events), by_clip=found.by_clip)
    if not world:
        return found
    exact = world_metrics(frames, prompt, clip_frames)
    by_clip = found.by_clip | {"identity_kept": exact.identity_by_clip}
    return VideoReading(values=found.values | exact.values, by_clip=by_clip)
