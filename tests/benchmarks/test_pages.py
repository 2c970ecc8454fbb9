"""Generated pages equal the output of their command: not edited by hand, and with all results."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from benchmarks import minutes, report
from engine.files.tables import emptier


def read_pages() -> list[str]:
    return [page.read_text(encoding="utf-8") for page in report.PAGES]


def test_the_tables_of_the_pages_are_what_the_command_writes() -> None:
    texts = read_pages()
    assert texts == report.fill(texts, report.page_tables()), "run python -m benchmarks.report"


def test_long_videos_of_every_length_are_in_the_table() -> None:
    """A run that was interrupted, or of fewer lengths, leaves a file as well, and the page compares all of them."""
    rows = report.latest()["minutes"]["results"]
    assert [(row["far"], row["frames"]) for row in rows] == [*itertools.product(minutes.FAR, minutes.FRAMES)]


def test_a_page_without_a_place_for_a_table_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"have places for \['a'\], and the tables are \['a', 'b'\]"):
        report.fill(["<!-- table a -->\nold\n<!-- end a -->\n"], {"a": "new", "b": "other"})


def test_another_result_is_another_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a figure of one file."""
    runs = report.latest()
    fusion = runs["fusion"]["results"][0]["ratios"]["fusion / SVD in fp32"]["wall_s"]
    monkeypatch.setitem(fusion, "median", 10 * fusion["median"])
    monkeypatch.setattr(report, "latest", lambda: runs)
    texts = read_pages()
    assert report.fill(texts, report.page_tables()) != texts


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the results, and of the pages, that a test may change."""
    folder = tmp_path / "results"
    shutil.copytree(report.RESULTS, folder)
    pages = tuple(Path(shutil.copy(page, tmp_path)) for page in report.PAGES)
    monkeypatch.setattr(report, "RESULTS", folder)
    monkeypatch.setattr(report, "PAGES", pages)
    return folder


def test_shapes_that_a_newer_run_leaves_out_stay(results: Path) -> None:
    """`make bench` measures fewer shapes than the page has."""
    [newest] = results.glob("attention-cpu-*.json")
    small = json.loads(newest.read_text())
    kept = {result["shape"] for result in small["results"]}
    small["results"] = [result for result in small["results"] if result["shape"] in ("tiny", "ltx", "wan-short")]
    (results / "attention-cpu-2999-01-01.json").write_text(json.dumps(small))
    run = report.latest()["attention"]
    assert run["file"] == "attention-cpu-2999-01-01.json"
    assert [(each["file"], [x["shape"] for x in each["results"]]) for each in run["older"]] == [(newest.name, ["wan"])]
    assert kept == {"tiny", "ltx", "wan-short", "wan"}
    before = read_pages()
    [text, *_] = after = report.fill(before, report.page_tables())
    assert [emptier(*each) for each in zip(before, after, strict=True)] == [[] for _ in before]
    assert "| CPU, wan | <= 1.3 |" in text
    assert f"`{newest.name}`" in text


def test_the_page_is_not_replaced_by_an_emptier_one(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_pages()
    [fusion] = results.glob("fusion-cpu-*.json")
    fusion.unlink()
    with pytest.raises(SystemExit) as ended:
        report.main([])
    assert "performance.md has more tables than" in str(ended.value)
    assert read_pages() == before
    report.main(["--overwrite"])
    assert read_pages() != before
