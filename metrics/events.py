"""How well the events of a timeline are shown by a clip of the embedded world, measured exactly as in `metrics.world`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiny.captions import Told, parse_caption
from tiny.measure import track
from tiny.world import STRAIGHT

NAMED = ("shape", "colour", "background")
NEAR = 2
"""Frames to either side between which a direction is measured."""

STILL = 0.25
"""Pixels per frame: the least that counts as a direction."""

EVENT_UNITS = {
    "shown": "share of frames",
    "moves": "share of frames",
    "kept": "share of frames",
    "switch": "frames",
}
"""Every measure of `event_metrics`, with its unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRange:
    """The text of an event, and the frames [start, stop) of the video that it is for."""

    text: str
    start: int
    stop: int


def event_metrics(frames: np.ndarray, events: Sequence[TextRange]) -> dict[str, float]:
    """Measures of frames [T, 64, 64, 3] (levels 0..255) whose events are captions of the world; see `measure`."""
    return measure(events, observe(frames))


def observe(frames: np.ndarray) -> dict[str, list[Any]]:
    """What is seen in each frame of [T, 64, 64, 3]: shape, colour, background and direction, "" where there is none."""
    seen = track(frames)
    return {**{name: list(getattr(seen, name)) for name in NAMED}, "motion": _directions(seen.centre)}


def measure(events: Sequence[TextRange], seen: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Measures of a video of these events, in order, from what `observe` sees in it; nan where there is nothing to measure.

    shown: share of frames with the shape, colour and background of their event.
    moves: share of frames with the direction of their event, without those NEAR frames from its ends; of events that move straight.
    kept: share of frames of an event that keep what the event before it shows of the shape, colour and background that both have;
    0 for a shape or colour that no frame of the event before shows.
    switch: frames between a boundary and the frame that best parts what changes there (the direction counts if nothing else
    changes); the mean over boundaries.

    ValueError for a text that is no caption of the world.
    """
    told = [parse_caption(event.text) for event in events]
    captions = [each for each in told if each is not None]
    if len(captions) < len(events):
        strange = [event.text for event, each in zip(events, told, strict=True) if each is None]
        raise ValueError(f"these are no captions of the world: {strange}")
    named = {name: np.array(values) for name, values in seen.items()}
    spans = [slice(event.start, event.stop) for event in events]
    shown, moves, kept, switches = [], [], [], []
    for number, (event, span) in enumerate(zip(captions, spans, strict=True)):
        shown.append(_matches(named, event, NAMED, span).all(0))
        if event.motion in STRAIGHT:
            inner = slice(span.start + NEAR, max(span.stop - NEAR, span.start + NEAR))
            moves.append(_matches(named, event, ("motion",), inner)[0])
        if number:
            before, first = captions[number - 1], spans[number - 1]
            shared = [name for name in NAMED if getattr(before, name) == getattr(event, name)]
            kept += [_kept(named[name], first, span) for name in shared]
            if names := _changed(before, event):
                both = slice(first.start, span.stop)
                scores = [_matches(named, each, names, both).mean(0) for each in (before, event)]
                switches.append(abs(_best_switch(*scores) - (span.start - first.start)))
    return {
        "shown": _mean(np.concatenate(shown)),
        "moves": _mean(np.concatenate(moves)) if moves else float("nan"),
        "kept": _mean(kept),
        "switch": _mean(switches),
    }


def _directions(centre: np.ndarray) -> list[str]:
    """The direction of each frame, between the centres [T, 2] NEAR frames before and after."""
    names = [""] * len(centre)
    for frame in range(NEAR, len(centre) - NEAR):
        step = centre[frame + NEAR] - centre[frame - NEAR]
        if np.isfinite(step).all() and np.abs(step).max() >= 2 * NEAR * STILL:
            names[frame] = max(STRAIGHT, key=lambda name: float(np.dot(STRAIGHT[name], step)))
    return names


def _changed(before: Told, event: Told) -> list[str]:
    """What changes between two events and is seen in a frame; the direction only if nothing else does."""
    names = [name for name in NAMED if getattr(before, name) != getattr(event, name)]
    turns = before.motion != event.motion and {before.motion, event.motion} <= set(STRAIGHT)
    return names or ["motion"] * turns


def _matches(seen: Mapping[str, np.ndarray], event: Told, names: Sequence[str], span: slice) -> np.ndarray:
    """Whether each attribute [N] of each frame [T] of the span is the event's."""
    return np.stack([seen[name][span] == getattr(event, name) for name in names])


def _best_switch(before: np.ndarray, after: np.ndarray) -> int:
    """The frame s for which most frames before s show the event before, and most from s on the event after."""
    return int(np.argmax([before[:s].sum() + after[s:].sum() for s in range(len(before) + 1)]))


def _kept(names: np.ndarray, first: slice, later: slice) -> float:
    values, counts = np.unique(names[first][names[first] != ""], return_counts=True)
    return float(np.mean(names[later] == values[counts.argmax()])) if len(values) else 0.0


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
