"""A study's file: places, lists and parts, what is made again, and every mistake in one line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.errors import UserError
from evaluation.study.parts import Study, read_study


def study_of(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A study of one comparison and one analysis in a folder."""
    places = {name: str(tmp_path / name) for name in ("runs", "search", "kept", "page")}
    parts = {
        "videos": {
            "command": "compare",
            "settings": {"methods": ["a", ["b", "c"]], "measures": "{kept}/videos.jsonl", "out": "{runs}"},
            "reports": {"all": {}, "some": {"methods": ["a"]}},
        },
        "spectra": {"command": "analyze", "settings": {"out": "{runs}/a"}, "keep": ["plot.png"], "once": True},
    }
    return places | {"device": "cpu", "shards": 3, "make": parts} | changes


def read(tmp_path: Path, tree: dict[str, Any], **own: Any) -> Study:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return read_study(str(file), own)


def test_reports_are_on_what_is_kept_or_made(tmp_path: Path) -> None:
    study = read(tmp_path, study_of(tmp_path), device="cuda", runs=str(tmp_path / "own"))
    assert list(study.reports()) == []
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/videos.jsonl").write_text("")
    first, second = study.reports()
    asked = ["--model.device", "cuda", "--methods", "a,b,c", "--measures", f"{tmp_path}/kept/videos.jsonl"]
    asked += ["--out", f"{tmp_path}/own"]
    assert first == [*asked, "--report", f"{tmp_path}/own/all", "--report_only", "--report_if_any"]
    assert second[second.index("--methods") + 1] == "a"
    assert second[second.index("--report") + 1] == f"{tmp_path}/own/some"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"make": 3}, r"is not a study \(make is 3\)"),
        ({"kept": None}, r"is not a study \(kept is None\)"),
        ({"shards": 0}, "shards must be 1 or more, got 0"),
        ({"device": "wibble"}, "device must be auto, cpu or cuda, got 'wibble'"),
        ({"make": {"a": {"command": "compare", "settings": {}}}}, "a: it has no settings.out"),
        (
            {"make": {"a": {"command": "rm", "settings": {"out": "x"}}}},
            "a: command is rm, not one of analyze, calibrate",
        ),
        ({"make": {"a": {"command": "compare", "settings": {"out": "x"}, "twice": 1}}}, "a: unknown key twice"),
        ({"make": {"a": {"command": "compare", "settings": {"out": "x"}, "keep": 1}}}, "a: keep is 1"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        read(tmp_path, study_of(tmp_path, **changes))
