"""A batch, a checkout that plays VBench, its weights, and an evaluator of them."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.vbench.bench import Evaluator
from tests.evaluation.batches import make_batch
from tests.evaluation.vbench.fake_vbench import forget_hashes, make_checkout, make_weights


@pytest.fixture(scope="session")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two prompts, two seeds; read only."""
    return make_batch(tmp_path_factory.mktemp("batch") / "runs")


@pytest.fixture
def known_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has the real weights here: their published hashes are not compared."""
    forget_hashes(monkeypatch)


@pytest.fixture
def evaluator(tmp_path: Path, known_hashes: None) -> Callable[..., Evaluator]:
    """`evaluator(**changes)`: VBench played by fake_vbench.py, weights and home in tmp_path/home."""
    checkout, home = make_checkout(tmp_path / "VBench"), make_weights(tmp_path / "home")

    def make(**changes: Any) -> Evaluator:
        given = Evaluator(
            checkout=checkout,
            python=Path(sys.executable),
            weights=home,
            device="cpu",
            gpus=(),
            time_limit=60.0,
            environment=dict(os.environ),
        )
        return replace(given, **changes)

    return make
