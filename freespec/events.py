"""Which latent frames attend to which of several texts, as integers and weights: the plan of a timeline.

Between two events lies a boundary, and over it one of four transitions:

    cut     each frame attends to its own event's text alone
    scene   a cut, at which the windows of the local branch end too (freespec.scenes)
    fade    the outputs are mixed over `width` frames, with weights that sum to 1
    relay   both texts are attended in one softmax, with relu(|f - m| - w)^2 / (2 width^2) subtracted from an event's logits, where
            m and w are middle and half length of the event (Prompt Relay, arXiv 2604.10030)
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Transition = Literal["cut", "scene", "fade", "relay"]
TRANSITIONS: tuple[Transition, ...] = ("cut", "scene", "fade", "relay")
WITHOUT_WIDTH = ("cut", "scene")
# An event whose penalty exceeds this is not attended: its share of the softmax is below e^-20 of an equally fitting text's.
MAX_PENALTY = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Latent frames [start, stop) of one text, and the transition from the event before.

    `width` is in latent frames: the length of a fade's ramp, or the deviation of a relay's penalty. It is not used by a
    cut, nor at the first event.
    """

    start: int
    stop: int
    transition: Transition = "cut"
    width: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The part of a piece in one run of relayed events.

    Attributes:
        weights: of each frame of the piece; None if every one is 1.
        events: index of each event, and its penalty in each frame of the piece; None if it is the only one.

    Numbers are tuples in a plan, and tensors once `freespec.timeline.place` has put them on a device.
    """

    weights: Any
    events: tuple[tuple[int, Any], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Frames [start, stop) that attend to the same events, each `Share` in one weighted sum."""

    start: int
    stop: int
    shares: tuple[Share, ...]


def plan(events: Sequence[Event], num_frames: int) -> tuple[Piece, ...]:
    """The fewest pieces that cover `num_frames` latent frames in order.

    Raises ValueError for events that do not cover the frames in order, and for fades that overlap: their weights would not
    sum to 1.
    """
    check(events, num_frames)
    runs = _runs(events)
    frames = [_shares(events, runs, frame) for frame in range(num_frames)]
    pieces = []
    for _, group in itertools.groupby(range(num_frames), key=lambda frame: _attended(frames[frame])):
        rows = list(group)
        pieces.append(Piece(start=rows[0], stop=rows[-1] + 1, shares=_joined([frames[row] for row in rows])))
    return tuple(pieces)


def repeated(pieces: Sequence[Piece], frames: Sequence[int]) -> tuple[Piece, ...]:
    """The pieces of a video whose frames are those `frames` of the planned one: each at least once, ascending."""
    made = []
    for piece in pieces:
        rows = [row for row, frame in enumerate(frames) if piece.start <= frame < piece.stop]

        def numbers(values: Any, piece: Piece = piece, rows: Sequence[int] = rows) -> Any:
            return None if values is None else tuple(values[frames[row] - piece.start] for row in rows)

        shares = tuple(
            Share(weights=numbers(share.weights), events=tuple((index, numbers(each)) for index, each in share.events))
            for share in piece.shares
        )
        made.append(Piece(start=rows[0], stop=rows[-1] + 1, shares=shares))
    return tuple(made)


def check(events: Sequence[Event], num_frames: int) -> None:
    """Raise ValueError unless the events cover `num_frames` frames in order, with transitions that fit into them."""
    stop = 0
    for index, event in enumerate(events):
        if event.start != stop or event.stop <= event.start:
            raise ValueError(
                f"event {index + 1} covers latent frames [{event.start}, {event.stop}), expected to start at {stop}"
            )
        if event.transition not in TRANSITIONS:
            raise ValueError(f"unknown transition {event.transition!r}; choose one of {', '.join(TRANSITIONS)}")
        if index and event.transition not in WITHOUT_WIDTH and not 0.0 < event.width < math.inf:
            raise ValueError(f"a {event.transition} needs a width above 0 frames, got {event.width}")
        stop = event.stop
    if stop != num_frames:
        raise ValueError(f"the events cover {stop} latent frames of {num_frames}")
    ramps = [event.width if index and event.transition == "fade" else 0.0 for index, event in enumerate(events)]
    for index, (event, before, after) in enumerate(zip(events, ramps, [*ramps[1:], 0.0], strict=True)):
        if (before + after) / 2 > event.stop - event.start:
            raise ValueError(
                f"event {index + 1} has {event.stop - event.start} latent frames, too few for fades of {before:g} and {after:g}"
            )


def _runs(events: Sequence[Event]) -> list[range]:
    """Events that relays join; between two runs lies a cut or a fade."""
    starts = [index for index, event in enumerate(events) if index == 0 or event.transition != "relay"]
    return [range(start, stop) for start, stop in itertools.pairwise([*starts, len(events)])]


def _shares(events: Sequence[Event], runs: list[range], frame: int) -> list[tuple[float, dict[int, float]]]:
    """Weight of each run in a frame, and the penalty of each of its events; runs and events of weight 0 are left out."""
    shares = []
    for run in runs:
        weight = _ramp(events, run.start, frame) * (1.0 - _ramp(events, run.stop, frame))
        if weight > 0.0:
            penalties = {index: _penalty(events, run, index, frame) for index in run}
            least = min(penalties.values())
            shares.append((weight, {i: p for i, p in penalties.items() if p - least <= MAX_PENALTY}))
    return shares


def _ramp(events: Sequence[Event], boundary: int, frame: int) -> float:
    """How far a frame has crossed the boundary before event `boundary`, from 0 to 1, at the middle of the frame."""
    if boundary == 0:
        return 1.0
    if boundary == len(events):
        return 0.0
    event = events[boundary]
    past = frame + 0.5 - event.start
    if event.transition != "fade":
        return float(past > 0.0)
    return min(max(past / event.width + 0.5, 0.0), 1.0)


def _penalty(events: Sequence[Event], run: range, index: int, frame: int) -> float:
    """The penalty that relays subtract from an event's logits: its distance beyond the boundaries that it shares with its run."""
    event, penalty = events[index], 0.0
    if index > run.start:
        penalty += max(event.start - (frame + 0.5), 0.0) ** 2 / (2 * event.width**2)
    if index + 1 < run.stop:
        penalty += max(frame + 0.5 - event.stop, 0.0) ** 2 / (2 * events[index + 1].width ** 2)
    return penalty


def _attended(shares: list[tuple[float, dict[int, float]]]) -> tuple:
    """Which events a frame attends to, and whether it mixes them: equal for all frames of a piece."""
    return tuple((weight == 1.0, tuple(penalties)) for weight, penalties in shares)


def _joined(rows: list[list[tuple[float, dict[int, float]]]]) -> tuple[Share, ...]:
    """Join consecutive frames with equal attention."""
    shares = []
    for position, (weight, penalties) in enumerate(rows[0]):
        weights = None if weight == 1.0 else tuple(row[position][0] for row in rows)
        alone = len(penalties) == 1
        events = tuple((i, None if alone else tuple(row[position][1][i] for row in rows)) for i in penalties)
        shares.append(Share(weights=weights, events=events))
    return tuple(shares)
