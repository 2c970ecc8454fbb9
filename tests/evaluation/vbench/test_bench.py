"""What is looked at before anything is started, and how what is missing is said."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.vbench.bench import Evaluator, PreflightError, preflight
from evaluation.vbench.dimensions import DIMENSIONS

FEW = ("subject_consistency", "dynamic_degree")


def test_preflight_lists_everything_that_is_missing_and_starts_nothing(
    evaluator: Callable[..., Evaluator], tmp_path: Path
) -> None:
    tool = evaluator()
    (tool.weights / ".cache/vbench/raft_model/models/raft-things.pth").unlink()
    (tool.weights / ".cache/vbench/amt_model/amt-s.pth").write_bytes(b"")
    (tool.checkout / "vbench2_beta_long/configs/slow_fast_params.yaml").unlink()
    with pytest.raises(PreflightError) as caught:
        preflight(tool, DIMENSIONS, tmp_path / "out")
    details = caught.value.details
    assert len(details) == 3
    assert "slow_fast_params.yaml" in details[0]
    assert details[1].startswith(
        f"empty file: {tool.weights}/.cache/vbench/amt_model/amt-s.pth (for motion_smoothness)"
    )
    assert details[2].startswith(f"missing file: {tool.weights}/.cache/vbench/raft_model/models/raft-things.pth")
    assert "3 things are missing" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_preflight_looks_into_the_environment(evaluator: Callable[..., Evaluator], tmp_path: Path) -> None:
    tool = evaluator()
    assert preflight(tool, FEW, tmp_path / "out").probe["versions"]["numpy"]
    with pytest.raises(PreflightError, match="sees no GPU"):
        preflight(replace(tool, device="cuda"), FEW, tmp_path / "out")
    with pytest.raises(PreflightError, match="is not an executable file"):
        preflight(replace(tool, python=tmp_path / "nothing"), FEW, tmp_path / "out")
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexit 0\n")
    silent.chmod(0o755)
    with pytest.raises(PreflightError, match="reported nothing; is it a Python"):
        preflight(replace(tool, python=silent), FEW, tmp_path / "out")
    broken = tool.checkout / "vbench2_beta_long" / "dynamic_degree.py"
    broken.write_text("import moviepy_of_long_ago")
    with pytest.raises(
        PreflightError, match="cannot import VBench-Long: ModuleNotFoundError: No module named 'moviepy_of"
    ):
        preflight(tool, FEW, tmp_path / "out")
    preflight(tool, ["subject_consistency"], tmp_path / "out")
