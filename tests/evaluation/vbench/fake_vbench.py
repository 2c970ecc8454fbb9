"""A checkout that plays VBench-Long: its class, its file names, its result shapes and its traps, without networks.

The real driver runs it with a real interpreter; see fake_long.py.
"""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.vbench import weights
from evaluation.vbench.weights import WEIGHTS

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)

_TORCH = """
class device:
    def __init__(self, name):
        self.name = name

class cuda:
    @staticmethod
    def is_available():
        return False
"""

_LONG = Path(__file__).with_name("fake_long.py")


def make_checkout(folder: Path) -> Path:
    """The files that a run looks for, in the places of a real checkout."""
    long = folder / "vbench2_beta_long"
    (long / "configs").mkdir(parents=True)
    (folder / "vbench").mkdir()
    (folder / "vbench" / "__init__.py").write_text("")
    (folder / "torch.py").write_text(_TORCH)
    shutil.copyfile(_LONG, long / "__init__.py")
    (long / "VBench_full_info.json").write_text("[]")
    for dimension in DIMENSIONS:
        (long / f"{dimension}.py").write_text("")
    for name in ("clip_length_mix", "slow_fast_params", "subject_mapping_table", "background_mapping_table"):
        (long / "configs" / f"{name}.yaml").write_text("{}")
    return folder


def make_weights(folder: Path) -> Path:
    """Every file that is asked for, empty but for a byte; see `forget_hashes`."""
    for found in WEIGHTS.values():
        for weight in found:
            place = folder / weight.place
            if weight.marker is None:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(b"w")
            else:
                place.mkdir(parents=True, exist_ok=True)
                (place / (weight.marker or "adapter")).write_bytes(b"w")
    return folder


def forget_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare no published hashes: the real weights are not available here."""
    unknown = {name: tuple(replace(weight, sha256="") for weight in found) for name, found in WEIGHTS.items()}
    monkeypatch.setattr(weights, "WEIGHTS", unknown)


def set_plan(home: Path, **plan: Any) -> None:
    """What shall go wrong from now on."""
    (home / "plan.json").write_text(json.dumps(plan))


def calls(home: Path) -> list[dict[str, Any]]:
    """What VBench was asked to score, in order."""
    path = home / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ends(pid: int) -> bool:
    """Whether a process is gone before long, or waits to be collected; signals take their time on a busy machine."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False
