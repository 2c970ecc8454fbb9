"""What is missing is listed with its place, its users and its source, before anything is started."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.vbench import weights
from evaluation.vbench.dimensions import DIMENSIONS
from evaluation.vbench.weights import WEIGHTS, Weight, missing_weights
from tests.evaluation.vbench.fake_vbench import make_weights


def test_on_an_empty_folder_everything_is_missing_once(tmp_path: Path) -> None:
    lines = missing_weights(tmp_path, DIMENSIONS)
    assert len(lines) == len({weight.place for found in WEIGHTS.values() for weight in found}) == 17
    assert all(line.startswith(("missing file: ", "missing folder: ")) for line in lines)
    assert all(str(tmp_path) in line and ", from " in line and "\n" not in line for line in lines)
    assert missing_weights(tmp_path, []) == []


def test_complete_weights_have_nothing_missing(tmp_path: Path, known_hashes: None) -> None:
    assert missing_weights(make_weights(tmp_path), DIMENSIONS) == []


def test_only_what_the_dimensions_need_is_looked_for(tmp_path: Path) -> None:
    lines = missing_weights(tmp_path, ["dynamic_degree"])
    assert [line.split(" (for ")[0] for line in lines] == [
        f"missing file: {tmp_path}/.cache/vbench/raft_model/models/raft-things.pth"
    ]


def test_broken_files_and_folders(tmp_path: Path, known_hashes: None) -> None:
    root = make_weights(tmp_path)
    (root / ".cache/vbench/amt_model/amt-s.pth").write_bytes(b"")
    (root / ".cache/torch/hub/facebookresearch_dinov2_main/hubconf.py").rename(root / "elsewhere.py")
    (root / ".cache/ensemble_lora/adapter").unlink()
    (root / ".cache/facebookresearch_dino_main/other").write_bytes(b"")
    (root / ".cache/facebookresearch_dino_main/hubconf.py").unlink()
    assert sorted(line.split(": ")[0] for line in missing_weights(root, DIMENSIONS)) == [
        "empty file",
        "empty folder",
        "empty folder",
        "folder without hubconf.py",
    ]


def test_published_hashes_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_weights(tmp_path)
    lines = missing_weights(root, DIMENSIONS)
    assert [line.split(": ")[0] for line in lines] == ["file with another SHA-256 than was published"] * 3
    assert [Path(line.split(": ")[1].split(" (for")[0]).name for line in lines] == [
        "ViT-B-32.pt",
        "ViT-L-14.pt",
        "musiq_spaq_ckpt-358bb6af.pth",
    ]
    digest = hashlib.sha256(b"w").hexdigest()
    right = {name: tuple(replace(w, sha256=w.sha256 and digest[:8]) for w in found) for name, found in WEIGHTS.items()}
    monkeypatch.setattr(weights, "WEIGHTS", right)
    assert missing_weights(root, DIMENSIONS) == []


def test_every_dimension_has_weights_inside_the_cache() -> None:
    assert WEIGHTS.keys() == set(DIMENSIONS)
    every = [weight for found in WEIGHTS.values() for weight in found]
    assert all(isinstance(w, Weight) and w.place.parts[0] == ".cache" and w.source for w in every)
