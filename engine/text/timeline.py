"""A prompt that changes over time: `a red circle [0-4s] | a yellow star [4s-]`, read into events of latent frames.

A timeline is a string, so that ids, records, suites and pages treat it like any prompt. Each part ends with its range, in seconds
or in frames of the video, and may name the transition from the event before:
`[4s-, cut]`, `[4s-, fade 0.5s]`, `[64-, relay 8]`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from engine.errors import UserError
from engine.files.trees import read_yaml
from engine.paths import expand
from freespec.events import TRANSITIONS, WITHOUT_WIDTH, Event, Transition, check

Unit = Literal["s", "frames"]

DEFAULT_TRANSITION: Transition = "scene"  # docs/timeline.md, Measured
# Seconds: the length of a fade, the deviation of a relay.
DEFAULT_WIDTH = {"cut": 0.0, "scene": 0.0, "fade": 0.5, "relay": 0.25}
SYNTAX = (
    "write 'text [0-4s] | text [4s-]', in seconds or in frames (no unit), each range starting where the one before ends"
)

_PART = re.compile(r"(?P<text>.*?)\s*\[(?P<range>\s*\d[^\[\]]*)\]\s*", re.DOTALL)
_NUMBER = r"\d+(?:\.\d+)?"
_RANGE = re.compile(rf"(?P<start>{_NUMBER})\s*(?P<start_unit>s?)\s*-\s*(?:(?P<stop>{_NUMBER})\s*(?P<stop_unit>s?))?")
_MOMENT = re.compile(rf"{_NUMBER}\s*s?")
_OPTION = re.compile(rf"(?P<name>[a-z]+)(?:\s+(?P<width>{_NUMBER})\s*(?P<unit>s?))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedText:
    """One event: its text, start and stop (None: the end of the video), and the transition into it.

    Numbers are in the timeline's unit. `width` None is the transition's default, or the overlap with the event before.
    """

    text: str
    start: float
    stop: float | None
    transition: Transition | None = None
    width: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Events in order, in seconds or in frames of the video."""

    unit: Unit
    events: tuple[TimedText, ...]

    def __str__(self) -> str:
        """The canonical form, which `parse_timeline` reads back."""
        return " | ".join(f"{event.text} [{self._range(event)}]" for event in self.events)

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of each event."""
        return tuple(event.text for event in self.events)

    def joined(self, negatives: Sequence[str]) -> tuple["Timeline", tuple[str, ...]]:
        """Join neighbouring events of one text that a cut would separate, with their negative texts."""
        events: list[TimedText] = []
        kept: list[str] = []
        for event, negative in zip(self.events, negatives, strict=True):
            same = events and (events[-1].text, kept[-1], events[-1].stop) == (event.text, negative, event.start)
            if same and (event.transition or DEFAULT_TRANSITION) == "cut":
                events[-1] = replace(events[-1], stop=event.stop)
            else:
                events.append(event)
                kept.append(negative)
        return replace(self, events=tuple(events)), tuple(kept)

    def in_latents(self, *, num_frames: int, fps: int, step: int) -> tuple[Event, ...]:
        """Latent frames [start, stop) and width of each event, for a video of `num_frames`.

        The first latent frame is one frame of the video, every other `step`. A boundary moves to the nearest start of a
        latent frame. Raises UserError, with the numbers, for events that do not cover the video in order.
        """
        rate = float(fps) if self.unit == "s" else 1.0
        total = (num_frames - 1) // step + 1
        one = f"{step / rate:g} {self._words}"
        spans: list[Event] = []
        for index, event in enumerate(self.events):
            last = index + 1 == len(self.events)
            begin, width, transition = self._boundary(index, fps)
            end = None if last else self._boundary(index + 1, fps)[0]
            start = _latent(begin * rate, step)
            stop = _latent((event.stop if end is None else end) * rate, step) if event.stop is not None else total
            if start >= total or stop > total:
                raise UserError(
                    f"{self.name(index)} exceeds the video, which ends at {num_frames / rate:g} {self._words} "
                    f"({num_frames} frames)"
                )
            if stop <= start:
                raise UserError(f"{self.name(index)} is shorter than a latent frame, which is {one}; make it longer")
            spans.append(Event(start=start, stop=stop, transition=transition, width=width * rate / step))
        if spans[-1].stop != total:
            raise UserError(
                f"{self.name(len(spans) - 1)} is the last, but the video continues to {num_frames / rate:g} {self._words}; "
                f"leave its range open: [{self.number(self.events[-1].start)}-]"
            )
        try:
            check(spans, total)
        except ValueError as error:
            raise UserError(f"{error}; a latent frame is {one}") from error
        return tuple(spans)

    def _boundary(self, index: int, fps: int) -> tuple[float, float, Transition]:
        """Where an event begins, and the width and kind of its transition; an overlap is a fade over it."""
        event, transition = self.events[index], self.events[index].transition or DEFAULT_TRANSITION
        before = self.events[index - 1].stop if index else None
        overlap = 0.0 if before is None else before - event.start
        if overlap > 0.0:
            return event.start + overlap / 2, overlap, "fade"
        unit = 1.0 if self.unit == "s" else float(fps)
        return event.start, DEFAULT_WIDTH[transition] * unit if event.width is None else event.width, transition

    @property
    def _words(self) -> str:
        return "seconds" if self.unit == "s" else "frames"

    def number(self, value: float) -> str:
        """A number with its unit, in canonical form."""
        return f"{value:.10g}{'s' if self.unit == 's' else ''}"

    def name(self, index: int) -> str:
        """The name of an event in messages."""
        event = self.events[index]
        return f"event {index + 1} of the timeline, {event.text!r:.60} [{self._range(event)}],"

    def _range(self, event: TimedText) -> str:
        stop = "" if event.stop is None else self.number(event.stop)
        how = "" if event.transition is None else f", {event.transition}"
        width = "" if event.width is None else f" {self.number(event.width)}"
        return f"{self.number(event.start)}-{stop}{how}{width}"


def parse_timeline(prompt: str) -> Timeline | None:
    """Parse a prompt that is a timeline; None for a plain prompt, in which no part ends with a range in brackets.

    Raises UserError if only some parts have ranges, for gaps, overlaps without a fade, events out of order, empty texts, and
    mixed units.
    """
    parts = [_PART.fullmatch(part) for part in prompt.split("|")]
    if not any(parts):
        return None
    events, units = [], set()
    for index, (part, text) in enumerate(zip(parts, prompt.split("|"), strict=True), start=1):
        if part is None:
            raise UserError(f"event {index} of the timeline, {text.strip()!r:.60}, has no range; {SYNTAX}")
        event, unit = _event(part["text"].strip(), part["range"].strip(), index)
        events.append(event)
        units |= unit
    return _checked(events, units)


def read_timeline(value: str) -> tuple[str, str | None]:
    """Read a timeline as typed, or a YAML file of one: its canonical form, and that of its negative texts, if it has any.

    The file holds `events`, each with `text`, `start`, `stop` (a number of frames, or seconds such as 4s), `transition`,
    `width` and `negative`, and `common`, a text that is added to each.
    """
    if not value.lower().endswith((".yaml", ".yml")):
        timeline = parse_timeline(value)
        if timeline is None:
            raise UserError(f"--timeline {value!r:.60} has no range; {SYNTAX}")
        return str(timeline), None
    tree = _load(expand(value))
    common = tree.get("common")
    suffix = "" if common is None else f", {_text(common, f'common of {value}')}"
    parts, negatives = [], []
    for index, event in enumerate(tree["events"], start=1):
        where = f"event {index} of {value}"
        if not isinstance(event, Mapping) or "text" not in event:
            raise UserError(f"{where} needs a text")
        _refuse_unknown(event, _EVENT_KEYS, where)
        start, stop, width = (_moment(event, key, where) for key in ("start", "stop", "width"))
        transition = event.get("transition")
        if transition not in (None, *TRANSITIONS):
            raise UserError(f"{where} has the unknown transition {transition!r:.40}; write {', '.join(TRANSITIONS)}")
        if width and transition is None:
            raise UserError(f"{where}: a width needs a transition; add transition: fade or relay")
        options = " ".join(option for option in (transition, width) if option)
        bracket = f"[{start or 0}-{stop}{', ' if options else ''}{options}]"
        parts.append(f"{_text(event['text'], where)}{suffix} {bracket}")
        negatives.append(None if event.get("negative") is None else f"{_text(event['negative'], where)} {bracket}")
    given = [negative for negative in negatives if negative is not None]
    if given and len(given) < len(negatives):
        raise UserError(f"{value}: {len(given)} of {len(negatives)} events have a negative text; give all or none one")
    timelines = [parse_timeline(" | ".join(texts)) for texts in (parts, given) if texts]
    assert all(timelines), "each part was given a range"
    return str(timelines[0]), str(timelines[1]) if given else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Direction:
    """A timeline for one video: the text of each event, its negative text, and its latent frames."""

    texts: tuple[str, ...]
    negatives: tuple[str, ...]
    events: tuple[Event, ...]

    def described(self, step: int) -> list[dict[str, Any]]:
        """The events for the record, with the frames of the video that they start and stop at; `step` as in `Timeline.in_latents`."""
        return [
            {
                "text": text,
                "negative_text": negative,
                "start": first_frame(event.start, step),
                "stop": first_frame(event.stop, step),
                "transition": event.transition if index else None,
                "width": event.width * step if index else 0.0,
            }
            for index, (text, negative, event) in enumerate(zip(self.texts, self.negatives, self.events, strict=True))
        ]


def read_direction(prompt: str, negative_prompt: str, *, num_frames: int, fps: int, step: int) -> Direction | None:
    """Resolve a prompt that is a timeline for a video of `num_frames`; None for a plain prompt.

    Raises UserError for a timeline that does not fit the video, and for a negative timeline with a plain prompt.
    """
    timeline = parse_timeline(prompt)
    if timeline is None:
        if parse_timeline(negative_prompt) is not None:
            raise UserError(
                f"the negative prompt is a timeline and the prompt is not: {prompt!r:.60}; give both the same ranges"
            )
        return None
    timeline, negatives = timeline.joined(negative_texts(timeline, negative_prompt))
    events = timeline.in_latents(num_frames=num_frames, fps=fps, step=step)
    return Direction(texts=timeline.texts, negatives=negatives, events=events)


def negative_texts(timeline: Timeline, negative_prompt: str) -> tuple[str, ...]:
    """The negative text of each event: one for all, or those of a timeline with the same ranges."""
    negative = parse_timeline(negative_prompt)
    if negative is None:
        return (negative_prompt,) * len(timeline.events)
    ranges = [[(event.start, event.stop) for event in line.events] for line in (timeline, negative)]
    if timeline.unit != negative.unit or ranges[0] != ranges[1]:
        raise UserError(
            f"the negative prompt is a timeline with other ranges than the prompt: {negative}; give it those of {timeline}"
        )
    return negative.texts


_FILE_KEYS = {"common", "events"}
_EVENT_KEYS = {"text", "start", "stop", "transition", "width", "negative"}


def _load(path: Path) -> Mapping[str, Any]:
    tree = read_yaml(path, name=f"--timeline {path}", remedy="docs/timeline.yaml is an example")
    if not isinstance(tree.get("events"), list) or not tree["events"]:
        raise UserError(f"--timeline {path} needs a list of events, each with text, start and stop")
    _refuse_unknown(tree, _FILE_KEYS, f"--timeline {path}")
    return tree


def _refuse_unknown(tree: Mapping[Any, Any], known: set[str], where: str) -> None:
    if unknown := sorted(str(key) for key in tree.keys() - known):
        raise UserError(f"{where} has the unknown key {unknown[0]:.40}; known are {', '.join(sorted(known))}")


def _moment(event: Mapping[str, Any], key: str, where: str) -> str:
    """A number of frames, or seconds with their unit, as it is written in a range; empty if there is none."""
    value = event.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not _MOMENT.fullmatch(str(value)):
        raise UserError(f"{where}: {key} must be a frame, or seconds such as 4s, got {value!r:.40}")
    return str(value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: a text must be words, got {value!r:.40}")
    if "|" in value:
        raise UserError(f"{where}: a text cannot hold '|', which separates the events of a timeline")
    return " ".join(value.split())


def _event(text: str, written: str, index: int) -> tuple[TimedText, set[str]]:
    """One part, and the units that its numbers have."""
    where = f"event {index} of the timeline, {text!r:.60} [{written}],"
    if not text:
        raise UserError(f"event {index} of the timeline, [{written}], has no text")
    first, *options = (piece.strip() for piece in written.split(","))
    found = _RANGE.fullmatch(first)
    if found is None:
        raise UserError(f"{where} has no range such as 0-4s or 64-; {SYNTAX}")
    if len(options) > 1:
        raise UserError(f"{where} has {len(options)} transitions; give one")
    # [0-4s]: a start without a unit takes that of the stop.
    units = {found["stop_unit"] or found["start_unit"]} if found["stop"] else {found["start_unit"]}
    if found["stop"] and found["start_unit"] and not found["stop_unit"]:
        units = {"s", ""}
    if found["stop"] is None and float(found["start"]) == 0.0:
        units = set()  # [0-] is the same in both
    transition, width = None, None
    for option in options:
        match = _OPTION.fullmatch(option)
        if match is None or match["name"] not in TRANSITIONS:
            raise UserError(
                f"{where} has the unknown transition {option!r}; write {', '.join(TRANSITIONS)}, or fade 0.5s"
            )
        transition, width = cast(Transition, match["name"]), None if match["width"] is None else float(match["width"])
        if width is not None:
            units.add(match["unit"])
            if transition in WITHOUT_WIDTH or not 0.0 < width < math.inf:
                raise UserError(
                    f"{where}: {option!r} needs no width"
                    if transition in WITHOUT_WIDTH
                    else f"{where} has the width {width:g}"
                )
    stop = None if found["stop"] is None else float(found["stop"])
    return TimedText(text=text, start=float(found["start"]), stop=stop, transition=transition, width=width), units


def _checked(events: list[TimedText], units: set[str]) -> Timeline:
    if len(units) > 1:
        raise UserError(f"the timeline mixes seconds and frames; write all its numbers with s, or none; {SYNTAX}")
    timeline = Timeline(unit="s" if units == {"s"} else "frames", events=tuple(events))
    if events[0].start != 0.0:
        raise UserError(f"{timeline.name(0)} must start at 0")
    if events[0].transition is not None:
        raise UserError(f"{timeline.name(0)} is the first; a transition is from the event before")
    for index, event in enumerate(events):
        if event.stop is not None and event.stop <= event.start:
            raise UserError(f"{timeline.name(index)} ends before it starts")
        if index > 0:
            _check_follows(timeline, index)
    return timeline


def _check_follows(timeline: Timeline, index: int) -> None:
    """Raise UserError unless an event begins where the one before ends, or fades in over its end."""
    before, event = timeline.events[index - 1 : index + 1]
    name = timeline.name(index)
    if before.stop is None:
        raise UserError(f"{timeline.name(index - 1)} has no end, and only the last event may be open")
    start, stop = timeline.number(event.start), timeline.number(before.stop)
    if event.start > before.stop:
        raise UserError(f"nothing covers {stop} to {start}, before {name}; {SYNTAX}")
    if event.start == before.stop:
        return
    if event.start <= before.start or (event.stop is not None and event.stop < before.stop):
        raise UserError(f"{name} does not follow {timeline.name(index - 1)} in time; write events in order")
    if event.transition != "fade" or event.width is not None:
        raise UserError(
            f"{name} overlaps the event before by {timeline.number(before.stop - event.start)}; write [{start}-..., fade] to fade "
            f"over the overlap, or let it start at {stop}"
        )


def _latent(frame: float, step: int) -> int:
    """The latent frame that starts nearest to a frame of the video: 0 at frame 0, l at frame (l - 1) step + 1."""
    return 0 if frame < 0.5 else max(math.floor((frame - 1) / step + 0.5) + 1, 1)


def first_frame(latent: int, step: int) -> int:
    """The frame of the video that a latent frame starts at."""
    return 0 if latent == 0 else (latent - 1) * step + 1
