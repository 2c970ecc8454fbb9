"""What evaluate.py measures of each video: proxies; exact measures, those of events and of a long video's course where they apply."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.errors import UserError
from engine.media import read_video
from engine.shown import quoted
from evaluation.events import has_events, version_of
from evaluation.measure import Job, Measurer
from evaluation.videos import Video
from metrics import proxies
from metrics.course import COURSE_UNITS, course_metrics
from metrics.events import EVENT_UNITS, event_metrics
from metrics.proxies import PROXIES
from metrics.version import source_digest
from metrics.video import VideoReading
from metrics.world import WORLD_UNITS, why_not_world, world_metrics

# Measures by their names in reports, with units.
WORLD = {f"world.{name}": unit for name, unit in WORLD_UNITS.items()}
EVENTS = {f"events.{name}": unit for name, unit in EVENT_UNITS.items()}
COURSE = {f"long.{name}": unit for name, unit in COURSE_UNITS.items()}


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Measures by video, and which it may have.

    Attributes:
        values: measures of each video by name; nan where one does not apply.
        events: whether some videos have measures of events.
        not_world: why no video has exact measures of the embedded world; None if some have.
        not_long: why no video has measures of its course; None if some have.
        notes: on measures that some videos lack.
    """

    values: Mapping[Video, Mapping[str, float]]
    events: bool
    not_world: str | None
    not_long: str | None
    notes: Sequence[str]


def measure_videos(videos: Sequence[Video], folder: Path, measurer: Measurer) -> Measures:
    """Measure what applies to each video; results are kept in `folder`, one file for each set of measures and video.

    UserError for a fractional frame rate: windows of two seconds are counted in frames.
    """
    broken = next((video for video in videos if video.fps.denominator != 1), None)
    if broken is not None:
        raise UserError(f"{broken.path} has {float(broken.fps):.3f} frames per second; proxies need a whole rate")
    timed = [video for video in videos if video.events and has_events(video.prompt, *video.size)]
    plain = [video for video in videos if video not in timed]
    of_world, reason = videos_of_world(plain) if plain else ([], "every prompt is a timeline, measured by events")
    longer, not_long = long_videos(videos)
    # Kept proxies depend on their own code and on that of the reader too.
    code = source_digest(*(Path(module.__file__) for module in (proxies, read_video)), packages=("av",))
    of_proxies = _Kind(folder / "proxies", PROXIES, "", code, proxies.proxies)
    exact = _Kind(folder / "world", WORLD, "world.", version_of(""), world_metrics)
    of_events = _Kind(folder / "events", EVENTS, "events.", version_of(timed[0].prompt) if timed else "", event_metrics)
    course = _Kind(folder / "course", COURSE, "long.", version_of("", long=True), course_metrics)
    asked = [(v, of_proxies.job(v, v.fps, int(v.fps))) for v in videos]
    asked += [(v, exact.job(v, _digest(f"{v.prompt}\n{v.native_frames}"), v.prompt, v.native_frames)) for v in of_world]
    asked += [(v, of_events.job(v, _digest(repr(v.events)), v.events)) for v in timed]
    asked += [(v, course.job(v, v.native_frames, v.native_frames)) for v in longer]
    values: dict[Video, dict[str, float]] = {}
    for (video, _), found in zip(asked, measurer.measure([job for _, job in asked]), strict=True):
        values.setdefault(video, {}).update(found.values)
    share = f"The exact measures of the embedded world are of {len(of_world)} of {len(videos)} videos: {reason}."
    return Measures(
        values=values,
        events=bool(timed),
        not_world=None if of_world else reason,
        not_long=not_long,
        notes=[share] if of_world and reason is not None else [],
    )


class _Kind(NamedTuple):
    """A set of measures: the folder that keeps it, its names and their prefix, the version of its code, and its function of frames."""

    folder: Path
    names: Collection[str]
    prefix: str
    version: str
    call: Callable[..., Any]

    def job(self, video: Video, ending: object, *given: object) -> Job:
        """The job for a video; `ending` of its file's name tells apart what is `given` to the function after the frames."""
        return Job(
            path=video.path,
            place=self.folder / f"{video.sha256}-{ending}.json",
            key={"version": self.version, "measures": list(self.names)},
            call=partial(_read, self.call, self.prefix, given),
        )


def _read(call: Callable[..., Any], prefix: str, given: Sequence[object], frames: np.ndarray) -> VideoReading:
    found = call(frames, *given)
    values = found if isinstance(found, dict) else found.values
    return VideoReading(values={f"{prefix}{name}": value for name, value in values.items()}, by_clip={})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def videos_of_world(videos: Sequence[Video]) -> tuple[list[Video], str | None]:
    """Select the videos that have exact measures, and explain why others, if any, have none.

    They need captions of the world, its size, and one known native length, since identity and drift are measured
    against the first native length of a video.
    """
    reasons = {video.path: _why_not_world(video) for video in videos}
    of_world = [video for video in videos if reasons[video.path] is None]
    reason = next((reason for reason in reasons.values() if reason is not None), None)
    if (not_one := _why_not_one_native(of_world)) is not None:
        return [], not_one
    return of_world, reason


def long_videos(videos: Sequence[Video]) -> tuple[list[Video], str | None]:
    """Select the videos longer than their native length, and explain why there are none, if so."""
    if (reason := _why_not_one_native(videos)) is not None:
        return [], reason
    longer = [video for video in videos if video.num_frames > (video.native_frames or 0)]
    return longer, None if longer else f"no video is longer than the native {videos[0].native_frames} frames"


def _why_not_one_native(videos: Sequence[Video]) -> str | None:
    """None if all videos have one known native length, otherwise the reason."""
    native = {video.native_frames for video in videos}
    if None in native:
        return "the model's native length is not known; give --native_frames"
    if len(native) > 1:
        lengths = ", ".join(map(str, sorted(n for n in native if n is not None)))
        return f"the videos are of models of different native lengths ({lengths} frames)"
    return None


def _why_not_world(video: Video) -> str | None:
    if why_not_world([video.prompt], *video.size) is None:
        return None
    return why_not_world([], *video.size) or f"this prompt is no caption of the world: {quoted(video.prompt)}"
