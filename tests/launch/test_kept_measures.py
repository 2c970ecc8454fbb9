"""Measures that outlive their videos: compare.py --measures on a small model, with the videos there and gone."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.files.locks import locked
from engine.files.whole import part_path
from evaluation.comparison import kept_measures, report
from tests.launch.conftest import Run
from tests.launch.forked import run_forked
from tests.launch.test_compare import References, video_of, words
from tests.launch.test_interruptions import interrupted_at_forward

PROMPT = ("--prompt", "a red circle")
Compare = Callable[..., Run]

pytestmark = pytest.mark.usefixtures("no_plots")


def no_plots_in(rank: int) -> None:
    """In a rank."""
    report._write_plots = lambda *_: []


@pytest.fixture
def compare_in(run: Callable[..., Run], wan_folder: Path, tmp_path: Path) -> Compare:
    def call(*argv: object, out: str = "out", **settings: object) -> Run:
        given = {"measures": tmp_path / "kept" / "videos.jsonl"} | settings
        return run("compare", *words(wan_folder, tmp_path / out, *PROMPT, *argv, **given))

    return call


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, whoever loads the model fails."""
    return lambda: monkeypatch.setattr("engine.engine.load_pipeline", lambda *_, **__: pytest.fail("loaded"))


def as_text(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_a_report_without_videos_says_what_the_report_with_them_said(
    compare_in: Compare, no_loading: Callable[[], None], tmp_path: Path
) -> None:
    with interrupted_at_forward(3):  # so that one of the runs was resumed, and does not count for a whole run's time
        assert compare_in().code == 130
    assert compare_in().code == 0
    kept = (tmp_path / "kept/videos.jsonl").read_text()
    before = report_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    no_loading()
    shown = compare_in()
    assert (shown.code, shown.err) == (0, "")
    after = report_of(tmp_path / "out")
    assert (tmp_path / "kept/videos.jsonl").read_text() == kept
    gone = f"4 of the videos are not here: their measures are kept in {tmp_path / 'kept/videos.jsonl'}."
    assert after["notes"] == [*before["notes"], gone]
    for key in ("summary", "clips", "comparison", "pairs", "noise", "baseline"):
        assert after[key] == before[key]
    assert [each | {"file": None} for each in before["videos"]] == after["videos"]
    assert before["times"]["direct"]["runs"] == after["times"]["direct"]["runs"] == 1
    for label, found in before["times"].items():
        again = after["times"][label]
        assert again["decode"] == pytest.approx(found["decode"], abs=1e-4)
        assert again["denoise"] == pytest.approx(found["denoise"], abs=1e-4)
        assert again["steps"].keys() == found["steps"].keys()
    page = (tmp_path / "out/index.html").read_text()
    assert json.loads(References(page).data)["prompts"] == []
    assert "No video of this report is here." in page


def test_only_what_is_not_kept_is_made_and_what_is_here_counts_first(compare_in: Compare, tmp_path: Path) -> None:
    assert compare_in(seeds=0).code == 0
    path = tmp_path / "kept/videos.jsonl"
    header, direct, freespec = path.read_text().splitlines()
    lie = json.loads(direct)
    lie["values"] = [value if value is None else value + 1.0 for value in lie["values"]]
    path.write_text("\n".join((header, json.dumps(lie), freespec)) + "\n")
    # Elsewhere the kept number is all there is.
    shown = compare_in(out="other", seeds="0,1")
    made = [line for line in shown.out.splitlines() if not line.startswith("note: ")]
    assert made[0].startswith(f"1 of 2, {video_of(tmp_path / 'other', 'direct', seed=1)}")
    values = {(each["label"], each["seed"]): each["values"] for each in report_of(tmp_path / "other")["videos"]}
    honest = report_of(tmp_path / "out")["videos"][0]["values"]
    assert values["direct", 0] == pytest.approx({name: value + 1.0 for name, value in honest.items()})
    lines = [json.loads(line)["video"] for line in path.read_text().splitlines()[1:]]
    assert lines == [["direct", 0, 0], ["freespec", 0, 0], ["direct", 0, 1], ["freespec", 0, 1]]
    # Where the video is, it is measured; and a report on one method leaves the others in the file.
    assert compare_in("--report_only", seeds=0, methods="direct").code == 0
    assert report_of(tmp_path / "out")["videos"][0]["values"] == honest
    lines = path.read_text().splitlines()
    assert json.loads(lines[1])["values"] == json.loads(direct)["values"]
    assert len(lines) == 5
    assert list(json.loads(lines[0])["variants"]) == ["direct", "freespec"]


def test_measures_of_other_settings_are_not_mixed_in(
    compare_in: Compare, no_loading: Callable[[], None], tmp_path: Path
) -> None:
    assert compare_in(seeds=0, methods="direct").code == 0
    path = tmp_path / "kept/videos.jsonl"
    before = path.read_bytes()
    no_loading()
    steps = compare_in(out="other", seeds=0, methods="direct", **{"sampler.num_steps": 3})
    assert f"{path} holds direct videos of another configuration; changed: sampler.num_steps 2 -> 3" in steps.error
    assert "choose another --measures" in steps.error
    window = compare_in(out="fifth", seeds=0, methods="sliding_window", **{"method.window_frames": 4})
    assert "measures of clips of 9 frames, and these are of 13" in window.error
    star = compare_in("--prompt", "a blue star", out="sixth", seeds=0, methods="direct")
    assert "another prompt p0000 (line 1 of the prompts is 'a blue star'" in star.error
    lines = [json.loads(line) for line in before.decode().splitlines()]
    fewer = [lines[0] | {"measures": lines[0]["measures"][1:]}, lines[1] | {"values": lines[1]["values"][1:]}]
    path.write_text(as_text(fewer))
    refused = compare_in(out="third", seeds="0,1", methods="direct")
    assert f"{path} has 7 measures of each video, and 8 are made of these (what differs: flow_mean)" in refused.error
    odd = [
        lines[1] | {"origin": 7},
        lines[1] | {"origin": -1},
        lines[1] | {"values": [*lines[1]["values"], 1.0]},
        lines[1] | {"values": ["a"] * 8},
        lines[1] | {"video": ["freelong", 0, 0]},
        lines[1] | {"video": ["direct"]},
        lines[1] | {"by_clip": {"flow_mean": 3}},
        lines[1] | {"steps": [["local", "soon"]]},
        lines[1] | {"sha256": None},
    ]
    broken_lines = [as_text([lines[0], line]).encode() for line in odd]
    origin = lines[0]["origins"][0]
    strange = ({"model": {"commit": 3}}, {"versions": {}}, {"git": "a"}, {"measured_by": 3}, {"device": {"name": 3}})
    headers = [{name: 3} for name in ("configs", "variants", "origins")]
    headers += [{"origins": [origin | each]} for each in strange]
    broken_lines += [as_text([lines[0] | header, lines[1]]).encode() for header in headers]
    for broken in (*broken_lines, before[:-20], b'{"a": 1}\n', b"", b"[]\n", bytes(range(128, 255))):
        path.write_bytes(broken)
        refused = compare_in(out="fourth", seeds=0, methods="direct")
        assert f"{path} does not contain kept measures, or is incomplete" in refused.error
        assert path.read_bytes() == broken
    # Nothing that was refused has taken a folder for itself, which the corrected command would then be refused in.
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir()) == ["kept", "out"]
    assert "is a folder" in compare_in(seeds=0, measures=tmp_path).error
    assert "cannot write" in compare_in(seeds=0, measures="/dev/null/x.jsonl").error


def test_a_prompt_may_hold_any_letter(compare_in: Compare, no_loading: Callable[[], None]) -> None:
    """JSON is not lines to everybody: Unicode has ends of line of its own."""
    given = ("--prompt", "a red\u2028circle\u0085")
    assert compare_in(*given, seeds=0, methods="direct").code == 0
    no_loading()
    assert compare_in(*given, out="other", seeds=0, methods="direct").code == 0


def test_a_shard_that_lost_a_video_does_not_say_that_it_is_measured(
    compare_in: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.batching.comparison.missing_videos", lambda *_, **__: [])
    said = compare_in("--shard", "1/1").error
    assert f"4 of 4 videos of {tmp_path / 'out'} are gone since they were made" in said


def test_a_name_that_only_its_lock_is_too_long_for_is_refused_first(
    compare_in: Compare, no_loading: Callable[[], None], tmp_path: Path
) -> None:
    no_loading()
    longest = 255 - len(part_path(tmp_path / "x").name) + 1
    error = compare_in(measures=tmp_path / f"{'x' * (longest - 3)}").error
    assert "File name too long: with the ending of a temporary file it has 258 bytes" in error


def test_two_that_add_to_one_file_wait_for_each_other(
    compare_in: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold a lock beside the file, not in the folder of the videos, of which each may have its own."""
    added: list[Any] = []
    monkeypatch.setattr(report, "add_kept", lambda *arguments: added.extend(arguments))
    (tmp_path / "kept").mkdir()
    assert compare_in(seeds=0, methods="direct").code == 0
    path = tmp_path / "kept/videos.jsonl"
    with ThreadPoolExecutor() as pool:
        with locked(path.with_name(".videos.jsonl.lock")):
            adding = pool.submit(kept_measures.add_kept, *added)
            with pytest.raises(TimeoutError):
                adding.result(timeout=0.3)
        adding.result(timeout=200)
    assert [entry.name for entry in path.parent.iterdir()] == ["videos.jsonl"]


def test_what_was_read_is_not_written_back_over_what_another_has_measured_meanwhile(
    compare_in: Compare, no_loading: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compare_in(seeds=0, methods="direct").code == 0
    path = tmp_path / "kept/videos.jsonl"
    header, line = (json.loads(text) for text in path.read_text().splitlines())
    newer = as_text([header, line | {"sha256": "0" * 64}])
    no_loading()

    def meanwhile(*arguments: Any) -> None:
        path.write_text(newer)
        kept_measures.add_kept(*arguments)

    monkeypatch.setattr(report, "add_kept", meanwhile)
    assert compare_in(out="other", seeds=0, methods="direct").code == 0  # its video is kept, and not there
    assert path.read_text() == newer
    assert compare_in(seeds=0, methods="direct").code == 0  # the control: here it is there, and is measured
    assert json.loads(path.read_text().splitlines()[1])["sha256"] == line["sha256"]


def test_other_versions_and_weights_of_kept_videos_are_reported(compare_in: Compare, tmp_path: Path) -> None:
    assert compare_in(seeds=0, methods="direct").code == 0
    path = tmp_path / "kept/videos.jsonl"
    header, line = path.read_text().splitlines()
    origin = json.loads(header)["origins"][0]
    assert origin.keys() == {"device", "parallel", "versions", "git", "model", "measured_by"}
    sha256 = dict.fromkeys(origin["model"]["sha256"], "0" * 64)
    other = origin | {"measured_by": "0" * 64, "model": origin["model"] | {"sha256": sha256}}
    path.write_text("\n".join((json.dumps(json.loads(header) | {"origins": [other]}), line)) + "\n")
    shown = compare_in(out="other", seeds="0,1", methods="direct")
    assert shown.code == 0
    notes = " ".join(report_of(tmp_path / "other")["notes"])
    assert "1 videos were measured by another version of metrics/ or of its libraries than is here" in notes
    assert "The videos were made with different weights and must not be compared" in notes
    assert [each["measured_by"] == "0" * 64 for each in json.loads(path.read_text().splitlines()[0])["origins"]] == [
        True,
        False,
    ]


def test_ranks_take_what_the_first_has_kept(compare_in: Compare, wan_folder: Path, tmp_path: Path) -> None:
    assert compare_in(seeds=0).code == 0
    kept = tmp_path / "kept/videos.jsonl"
    elsewhere = tmp_path / "elsewhere.jsonl"  # as on another machine, where another file is
    elsewhere.write_text("nothing")
    argv = [words(wan_folder, tmp_path / "ranks", *PROMPT, seeds="0,1", measures=path) for path in (kept, elsewhere)]
    ended = run_forked(argv, tmp_path, script="compare", fault=no_plots_in)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert ended[0].out.splitlines()[0].startswith("1 of 2, ")
    assert elsewhere.read_text() == "nothing"
    assert len(kept.read_text().splitlines()) == 5
    # What is wrong with the first rank's file ends both.
    ended = run_forked(argv[::-1], tmp_path, script="compare")
    assert [rank.code for rank in ended] == [2, 2], ended
    assert "elsewhere.jsonl does not contain kept measures" in ended[0].err
