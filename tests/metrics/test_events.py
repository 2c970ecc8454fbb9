"""Measures of timelines: exact on clips that show their events, and on clips that do not."""

import math
from pathlib import Path

import numpy as np
import pytest

from metrics import version
from metrics.events import EVENT_UNITS, TextRange, event_metrics, measure, observe
from tiny.captions import parse_caption
from tiny.world import STRAIGHT, Scene, render

TEXTS = [
    "a red circle moves right over a blue background",
    "a yellow circle moves down over a blue background",
    "a yellow star moves down over a gray background",
]


def show(texts: list[str], lengths: list[int]) -> np.ndarray:
    """A clip that shows each text for so many frames; the object goes on from where it is."""
    clips, place = [], np.array([20.0, 20.0])
    for text, length in zip(texts, lengths, strict=True):
        told = parse_caption(text)
        assert told is not None
        scene = Scene(
            **{
                name: getattr(told, name)
                for name in ("shape", "colour", "size", "motion", "speed", "background", "pan")
            },
            start=(float(place[0]), float(place[1])),
            angle=0.0,
            texture_start=(0.0, 0.0),
        )
        clips.append(render(scene, length))
        place = place + length * 1.0 * np.array(STRAIGHT[told.motion])
    return np.concatenate(clips)


def ranges(texts: list[str], lengths: list[int]) -> list[TextRange]:
    """The events one after the other."""
    stops = np.cumsum(lengths)
    return [
        TextRange(text=text, start=int(stop) - length, stop=int(stop))
        for text, length, stop in zip(texts, lengths, stops, strict=True)
    ]


LENGTHS = [33, 24, 17]


@pytest.mark.parametrize("lengths", [LENGTHS, [33, 32, 32], [9, 8, 40]])
def test_a_video_of_its_events_has_full_marks(lengths: list[int]) -> None:
    found = event_metrics(show(TEXTS, lengths), ranges(TEXTS, lengths))
    assert list(found) == list(EVENT_UNITS)
    assert found["shown"] == found["kept"] == 1.0
    assert found["switch"] == 0.0
    assert found["moves"] > 0.95


@pytest.mark.parametrize(
    ("texts", "lengths", "expected"),
    [
        ([TEXTS[0]] * 3, LENGTHS, {"shown": 33 / 74, "kept": 1.0, "switch": (24 + 17) / 2}),
        (TEXTS, [33, 18, 23], {"shown": 68 / 74, "switch": 3.0}),  # six frames early at one of two boundaries
        (TEXTS[::-1], LENGTHS, {"shown": 24 / 74}),  # the middle one
    ],
)
def test_a_video_of_others_has_not(texts: list[str], lengths: list[int], expected: dict[str, float]) -> None:
    found = event_metrics(show(texts, lengths), ranges(TEXTS, LENGTHS))
    assert {name: pytest.approx(found[name]) for name in expected} == expected
    assert found["shown"] < 1.0


def test_directions_are_those_of_the_events() -> None:
    still = observe(np.repeat(show(TEXTS[:1], [1]), 32, axis=0))
    assert set(still["motion"]) == {""}
    for motion in STRAIGHT:
        seen = observe(show([f"a red circle moves {motion} over a blue background"], [32]))
        assert seen["motion"][2:-2] == [motion] * 28


def test_what_a_timeline_does_not_ask_for_has_no_value() -> None:
    seen = observe(show([TEXTS[0]], [20]))
    red, bounces, star = TEXTS[0], "a red circle bounces over a blue background", TEXTS[2]

    def values(*events: TextRange) -> dict[str, float]:
        return {name: value for name, value in measure(events, seen).items() if not math.isnan(value)}

    first, later = {"start": 0, "stop": 10}, {"start": 10, "stop": 20}
    assert values(TextRange(text=red, start=0, stop=20)).keys() == {"shown", "moves"}
    # Too short for a direction, the first events of a video too.
    short = [TextRange(text=red, start=0, stop=1), TextRange(text=star, start=1, stop=5)]
    assert values(*short).keys() == {"shown", "switch"}
    # A bounce has no direction; its motion alone is not seen in a frame.
    assert values(TextRange(text=bounces, **first), TextRange(text=red, **later)) == {
        "shown": 1.0,
        "moves": 1.0,
        "kept": 1.0,
    }
    assert values(TextRange(text=bounces, **first), TextRange(text=bounces, **later)).keys() == {"shown", "kept"}
    turned = red.replace("right", "left")
    assert values(TextRange(text=red, **first), TextRange(text=turned, **later)) == {
        "shown": 1.0,
        "moves": 0.5,
        "kept": 1.0,
        "switch": 8.0,  # the last frames have no direction
    }


def test_frames_that_cannot_be_read_keep_nothing() -> None:
    """Nor does an event keep a shape that was not seen before."""
    seen = observe(show(TEXTS[:1], [20]))
    events = [TextRange(text=TEXTS[0], start=0, stop=10), TextRange(text=TEXTS[0], start=10, stop=20)]
    shapes = {
        "all": seen["shape"],
        "few": [""] * 9 + ["circle"] * 11,
        "later": [""] * 10 + ["circle"] * 10,
        "none": [""] * 20,
    }
    found = {name: measure(events, seen | {"shape": values})["kept"] for name, values in shapes.items()}
    assert found == {"all": 1.0, "few": 1.0, "later": pytest.approx(2 / 3), "none": pytest.approx(2 / 3)}


def test_invalid_caption_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no captions of the world: \['a cat'\]"):
        event_metrics(show(TEXTS[:1], [9]), ranges([TEXTS[0], "a cat"], [5, 4]))


def test_measures_of_one_prompt_do_not_depend_on_the_code_of_these(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else kept measures of any video would be of another version whenever these change."""
    read: list[Path] = []
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path), whole(path))[1])
    own = Path(measure.__code__.co_filename)
    assert version.source_digest() != version.source_digest(own)
    assert read.count(own) == 1
