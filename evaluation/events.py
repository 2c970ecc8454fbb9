"""Which videos are timelines of the embedded world, their events, and versions of measures; see `metrics.events`."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.text.timeline import parse_timeline
from metrics import course, events
from metrics.events import TextRange
from metrics.version import source_digest
from metrics.world import why_not_world


def has_events(prompt: str, height: int, width: int) -> bool:
    """Whether a video of this size has measures of events: a timeline, and every text of it a caption of the world."""
    timeline = parse_timeline(prompt)
    return timeline is not None and why_not_world(list(timeline.texts), height, width) is None


def ranges_of(timeline: Sequence[Mapping[str, Any]]) -> list[TextRange]:
    """The events of a record's `timeline`."""
    return [TextRange(**{name: event[name] for name in ("text", "start", "stop")}) for event in timeline]


def version_of(prompt: str, *, long: bool = False) -> str:
    """Version of the measures of a prompt's video: `source_digest`, with those of events for a timeline, and `long` ones if made."""
    return _version(timed=parse_timeline(prompt) is not None, long=long)


@functools.cache
def _version(*, timed: bool, long: bool) -> str:
    modules = [*([events] if timed else []), *([course] if long else [])]
    return source_digest(*(Path(str(module.__file__)) for module in modules))
