"""compare.py on timelines of the embedded world: measures of events in its tables, on its page and among kept measures."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.files.whole import write_json
from evaluation import events, measure
from metrics.events import EVENT_UNITS
from metrics.version import source_digest
from tests.launch.conftest import Run
from tests.launch.test_compare import words
from tests.metrics.test_events import show

RED, STAR = "a red circle moves right over a blue background", "a yellow star moves right over a blue background"
TIMELINE, REVERSED = f"{RED} [0-9] | {STAR} [9-, cut]", f"{STAR} [0-9] | {RED} [9-, cut]"


@pytest.fixture
def compare_in(
    run: Callable[..., Run], wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None
) -> Callable[..., Run]:
    """`compare_in(*prompts)`: a comparison whose videos all show what TIMELINE asks for."""
    clip = show([RED, STAR], [9, 8])
    monkeypatch.setattr(measure, "read_frames", lambda _: clip)

    def call(*prompts: str, size: int = 64) -> Run:
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        given = {"methods": "direct", "seeds": "0", "sampler.num_steps": 1, "sampler.max_text_tokens": 64}
        given |= {"prompts": tmp_path / "prompts.txt", "measures": tmp_path / "kept.jsonl"}
        given |= {"video.height": size, "video.width": size}
        return run("compare", *words(wan_folder, tmp_path / "out", **given))

    return call


def measures_of(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    told = json.loads((folder / "report.json").read_text())
    return told, [video["values"] for video in told["videos"]]


def test_timelines_have_measures_of_their_events(compare_in: Callable[..., Run], tmp_path: Path) -> None:
    shown = compare_in(TIMELINE, REVERSED, RED)
    assert (shown.code, shown.err) == (0, "")
    told, (own, other, plain) = measures_of(tmp_path / "out")
    assert {name: own[name] for name in EVENT_UNITS} == {"shown": 1.0, "moves": 1.0, "kept": 1.0, "switch": 0.0}
    assert (other["shown"], other["kept"], other["switch"]) == (0.0, 1.0, 9.0)
    assert {plain[name] for name in EVENT_UNITS} == {None}
    assert (own["object_seen"], plain["object_seen"]) == (None, 1.0)
    (row,) = (row for row in told["summary"] if row["metric"] == "shown")
    assert (row["mean"]["mean"], row["mean"]["count"], row["unit"]) == (0.5, 2, "share of frames")
    assert told["notes"][3] == (
        "The exact measures of the embedded world are means over 1 of 3 prompts: 2 prompts are timelines, measured by events "
        "instead (shown, moves, kept, switch)."
    )
    assert "<td>switch</td><td>frames</td>" in (tmp_path / "out/index.html").read_text()
    assert "| `shown` (share of frames) | 0.5 |" in (tmp_path / "out/summary.md").read_text()

    shutil.rmtree(tmp_path / "out")
    assert compare_in(TIMELINE, REVERSED, RED).code == 0
    again, kept = measures_of(tmp_path / "out")
    assert kept == [own, other, plain]
    assert again["notes"][-1].startswith("3 of the videos are not here")


def test_measures_are_made_again_by_other_code_of_events_alone(
    compare_in: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compare_in(TIMELINE, RED).code == 0
    (tmp_path / "kept.jsonl").unlink()
    measured: list[str] = []
    whole = measure._measure_file
    monkeypatch.setattr(
        measure, "_measure_file", lambda jobs: (measured.extend(job.key["prompt"] for job in jobs), whole(jobs))[1]
    )
    assert compare_in(TIMELINE, RED).code == 0
    assert measured == []
    monkeypatch.setattr(events, "_version", lambda *, timed, long: "another" if timed else source_digest())
    assert compare_in(TIMELINE, RED).code == 0
    assert measured == [TIMELINE]


def test_a_sidecar_without_its_events_is_made_again(compare_in: Callable[..., Run], tmp_path: Path) -> None:
    assert compare_in(TIMELINE).code == 0
    (sidecar,) = tmp_path.glob("out/direct/*/videos/*.json")
    tree = json.loads(sidecar.read_text())
    write_json(sidecar, tree | {"run": tree["run"] | {"timeline": None}})
    (tmp_path / "kept.jsonl").unlink()
    shown = compare_in(TIMELINE)
    assert shown.code == 0
    assert "run.timeline is None; it is made again" in shown.err


@pytest.mark.parametrize(
    ("prompts", "size", "reason"),
    [
        ([TIMELINE], 32, "do not apply: frames of the world are 64 x 64 pixels, these are 32 x 32."),
        ([f"{RED} [0-9] | a cat [9-]"], 64, "do not apply: this prompt is no caption of the world: "),
        ([RED], 64, "are included: every prompt is one of its captions."),
    ],
)
def test_others_have_none(
    compare_in: Callable[..., Run], tmp_path: Path, prompts: list[str], size: int, reason: str
) -> None:
    assert compare_in(*prompts, size=size).code == 0
    told, values = measures_of(tmp_path / "out")
    assert not set(values[0]) & set(EVENT_UNITS)
    assert reason in told["notes"][3]
