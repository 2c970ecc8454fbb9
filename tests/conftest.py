"""What all tests share: a process that imports torch, diffusers and every test, and whose collector does not look through them again."""

import gc
import os

import pytest

# Ranks have one thread each (tests/ranks.py), and have the bits of a process with as many; before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
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
