"""Measure the video files of a comparison; the measures are kept beside each video."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.files.whole import file_sha256
from engine.shown import quoted
from evaluation.comparison.store import Comparison, Video
from evaluation.events import has_events, ranges_of, version_of
from evaluation.measure import Job, Measurer
from metrics.course import COURSE_UNITS, course_metrics
from metrics.events import EVENT_UNITS, TextRange, event_metrics
from metrics.video import VIDEO_UNITS, VideoReading, video_metrics
from metrics.world import WORLD_UNITS, why_not_world, world_metrics

_SHOWN_PROMPTS = 3


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


def measure_all(comparison: Comparison, videos: Sequence[Video], measurer: Measurer) -> list[Measured]:
    """Measure these videos, or reuse measures by the same code of the same file; nan for what a video has no measure of."""
    records = [_record(video) for video in videos]
    jobs = [_job(comparison, video, record) for video, record in zip(videos, records, strict=True)]
    nothing = dict.fromkeys(units_of(comparison), math.nan)
    return [
        Measured(
            video=video, record=record, values=nothing | found.values, by_clip=found.by_clip, version=job.key["version"]
        )
        for video, record, job, found in zip(videos, records, jobs, measurer.measure(jobs), strict=True)
    ]


def _record(video: Video) -> dict[str, Any]:
    """The record of a video; UserError unless the file is the one that it describes."""
    record = video.record
    if record is None:
        raise UserError(f"{video.files.sidecar} has just been deleted; start the same command again")
    if file_sha256(video.files.video) != record["video"]["sha256"]:
        raise UserError(
            f"{video.files.video} is not the file that its sidecar describes; delete both to make it again, and its line in the file of --measures if there is one"
        )
    return record


def _job(comparison: Comparison, video: Video, record: Mapping[str, Any]) -> Job:
    """Its exact measures if it shows the world, or those of its events; with those of its course if they are asked for."""
    size = (comparison.config.video.height, comparison.config.video.width)
    prompt, long = video.prompt, comparison.long_measures
    told = {
        "clip_frames": comparison.model.native_frames,
        "world": why_not_world([prompt], *size) is None,
        "prompt": prompt,
    }
    events = ranges_of(record["timeline"]) if has_events(prompt, *size) else None
    return Job(
        path=video.files.video,
        place=video.files.measures,
        key={"video": record["video"]["sha256"], "version": version_of(prompt, long=long), **told},
        call=partial(_measures, **told, events=events, long=long),
    )


def _measures(
    frames: np.ndarray, *, prompt: str, clip_frames: int, world: bool, events: Sequence[TextRange] | None, long: bool
) -> VideoReading:
    found = video_metrics(frames, clip_frames)
    values, by_clip = found.values, found.by_clip
    if events is not None:
        values = values | event_metrics(frames, events)
    elif world:
        exact = world_metrics(frames, prompt, clip_frames)
        values, by_clip = values | exact.values, by_clip | {"identity_kept": exact.identity_by_clip}
    more = course_metrics(frames, clip_frames).values if long else {}
    return VideoReading(values=values | more, by_clip=by_clip)
