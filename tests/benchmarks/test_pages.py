"""Pages that are written by a command are what the command writes: nobody edited them, and no result is missing from them."""

from types import ModuleType

import pytest

from benchmarks import models, report


@pytest.mark.parametrize("module", [report, models], ids=lambda module: module.PAGE.name)
def test_a_page_is_what_its_command_writes(module: ModuleType) -> None:
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), f"run python -m {module.__name__}"


def test_another_result_is_another_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a figure of one file."""
    runs = report.latest()
    fusion = runs["fusion", "cpu"]["results"][0]["ratios"]["fusion / SVD in fp32"]["wall_s"]
    monkeypatch.setitem(fusion, "median", 10 * fusion["median"])
    monkeypatch.setattr(report, "latest", lambda: runs)
    assert report.page() != report.PAGE.read_text(encoding="utf-8")
