"""Which prompts are timelines of the embedded world, whose videos have the measures of `metrics.timelines.events`."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.text.timeline import parse_timeline
from metrics.timelines import events
from metrics.timelines.events import TextRange
from metrics.version import source_digest
from metrics.world import why_not_world


def has_events(prompt: str, height: int, width: int) -> bool:
    """Whether a video of this size has measures of events: a timeline, and every text of it a caption of the world."""
    timeline = parse_timeline(prompt)
    return timeline is not None and why_not_world(list(timeline.texts), height, width) is None


def ranges_of(timeline: Sequence[Mapping[str, Any]]) -> list[TextRange]:
    """The events of a record's `timeline`."""
    return [TextRange(**{name: event[name] for name in ("text", "start", "stop")}) for event in timeline]


def version_of(prompt: str) -> str:
    """Version of the measures of a prompt's video: `source_digest`, with the measures of events for a timeline."""
    return _version(timed=parse_timeline(prompt) is not None)


@functools.cache
def _version(*, timed: bool) -> str:
    return source_digest(Path(events.__file__)) if timed else source_digest()
