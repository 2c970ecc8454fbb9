"""Timelines of the benchmark: drawn ones are read back, with the engine's ranges of events."""

import itertools
from dataclasses import replace
from pathlib import Path

from benchmarks.events import EVENT, draw_timelines, list_ranges, write_timeline
from benchmarks.videos import write_report
from engine.text.timeline import parse_timeline, read_direction
from evaluation.events import ranges_of
from evaluation.study.timelines_and_extensions import JOINED, OURS, timelines
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


def test_the_page_is_of_timelines_that_every_method_has(tmp_path: Path) -> None:
    """Eight timelines and two seeds; freespec misses the goal by what the negative control adds."""

    def lines(shown: float) -> list[dict]:
        values = {OURS: shown, JOINED: 1.0}
        return [
            {"seed": seed, "index": index, "method": names[0], "transition": names[1]}
            | {"values": {"shown": value - 0.01 * index, "moves": 1.0, "kept": float("nan"), "switch": 2.0 * seed}}
            for index in range(9)
            for seed in range(2)
            for names, value in values.items()
        ][:-1]  # the last has no joined clips of the second seed

    def page(shown: float) -> list[str]:
        report = write_report(
            tmp_path / "report.json",
            lines(shown),
            [65],
            {"model": "tiny/wan", "checkpoint": "b673", "steps": 6, "guidance": 2.5},
        )
        return timelines(report).splitlines()

    met, missed = page(0.95), page(0.9)
    assert "8 timelines of 2 to 4 events" in met[2]
    assert "6 steps, guidance 2.5, 2 seeds, checkpoint `b673`." in met[2]
    rows = [line for line in met if line.startswith("| freespec")]
    assert rows == ["| freespec | scene | 0.915 [0.895, 0.935] | 1 [1, 1] | – | 1.0 |  |"]
    assert (
        "90 % of the frames show their event, met (0.915 [0.895, 0.935], −0.05 [−0.05, −0.05] against `joined`)"
        in met[-1]
    )
    assert "their event, **missed** (0.865" in missed[-1]
    assert timelines(None).endswith("Not measured yet.\n")
