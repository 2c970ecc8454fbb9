"""Measures of timelines: exact on clips that show their events, and on clips that do not."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.events import EVENT, draw_timelines, measure, observe, write_timeline
from engine.text.timeline import parse_timeline
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


LENGTHS = [EVENT + 1, EVENT, EVENT]


def test_a_video_of_its_events_has_full_marks() -> None:
    found = measure(TEXTS, observe(show(TEXTS, LENGTHS)))
    assert found["shown"] == found["kept"] == 1.0
    assert found["switch"] == 0.0
    assert found["moves"] > 0.95


@pytest.mark.parametrize(
    ("texts", "lengths", "expected"),
    [
        ([TEXTS[0]] * 3, LENGTHS, {"shown": (EVENT + 1) / (3 * EVENT + 1), "kept": 1.0}),
        (TEXTS, [EVENT + 1, EVENT - 6, EVENT + 6], {"switch": 3.0}),  # six frames early at one of two boundaries
        (TEXTS[::-1], LENGTHS, {"shown": EVENT / (3 * EVENT + 1)}),  # the middle one
    ],
)
def test_a_video_of_others_has_not(texts: list[str], lengths: list[int], expected: dict[str, float]) -> None:
    found = measure(TEXTS, observe(show(texts, lengths)))
    assert {name: pytest.approx(found[name]) for name in expected} == expected
    assert found["shown"] < 1.0


def test_directions_are_those_of_the_events() -> None:
    still = observe(np.repeat(show(TEXTS[:1], [1]), EVENT, axis=0))
    assert set(still["motion"]) == {""}
    for motion in STRAIGHT:
        seen = observe(show([f"a red circle moves {motion} over a blue background"], [EVENT]))
        assert seen["motion"][2:-2] == [motion] * (EVENT - 4)


def test_timelines_are_read_back_and_change_one_or_two_attributes() -> None:
    timelines = draw_timelines(12)
    assert [len(texts) for texts in timelines] == [2, 3, 4] * 4
    assert draw_timelines(3) == timelines[:3]
    for texts in timelines:
        assert parse_timeline(write_timeline(texts, "cut")).texts == tuple(texts)
        told = [parse_caption(text) for text in texts]
        for before, after in itertools.pairwise(told):
            assert before is not None and after is not None
            changed = sum(getattr(before, n) != getattr(after, n) for n in ("shape", "colour", "motion", "background"))
            assert changed in (1, 2)
            assert (
                replace(before, **{n: getattr(after, n) for n in ("shape", "colour", "motion", "background")}) == after
            )


def test_what_is_no_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="no captions of the world"):
        measure(["a cat"], observe(show(TEXTS[:1], [EVENT])))
