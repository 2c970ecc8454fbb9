"""The timelines of the benchmark: what is drawn is read back, with the ranges that the engine gives the events."""

import itertools
from dataclasses import replace

from benchmarks.events import EVENT, draw_timelines, list_ranges, write_timeline
from engine.text.timeline import parse_timeline, read_direction
from evaluation.events import ranges_of
from tiny.captions import parse_caption


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


def test_events_are_measured_in_the_frames_that_the_engine_gives_them() -> None:
    for texts in draw_timelines(3):
        given = {"num_frames": EVENT * len(texts) + 1, "fps": 16, "step": 4}
        made = {name: read_direction(write_timeline(texts, name), "", **given) for name in ("cut", "fade")}
        for direction in made.values():
            assert direction is not None
            assert ranges_of(direction.described(4)) == list_ranges(texts)
            assert ranges_of(direction.described(8)) != list_ranges(texts)
