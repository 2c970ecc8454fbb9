"""What all tests share: a process that imports torch, diffusers and every test, and whose collector does not look through them again."""

import gc

import pytest

gc.disable()


def pytest_collection_finish() -> None:
    """What is collected so far is never garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of compare.py and analyze.py without plots, which are what takes long; a test of each command looks at them."""
    monkeypatch.setattr("evaluation.comparison.report._write_plots", lambda *_: [])
    monkeypatch.setattr("evaluation.analysis.tables.save_figure", lambda *_: None)
