"""What a safetensors file says of itself, read without torch, and files that are none or were cut."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from engine.denoise.snapshot import Snapshot
from engine.files.tensors import read_metadata, take_former_name
from engine.files.trees import DamagedError


def test_the_metadata_are_those_that_were_saved(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert read_metadata(path) is None
    path.write_bytes(safetensors.torch.save({"x": torch.zeros(3), "y": torch.ones(2, 2)}, {"step": "5", "é": "ü"}))
    assert read_metadata(path) == {"step": "5", "é": "ü"}
    path.write_bytes(safetensors.torch.save({"x": torch.zeros(0)}))
    assert read_metadata(path) == {}


@pytest.mark.parametrize("size", [0, 1, 7, 8, 30, -1])
def test_a_file_that_was_cut_is_damaged(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors.torch.save({"x": torch.zeros(3)}, {"step": "5"})[:size])
    with pytest.raises(DamagedError, match="is not a whole safetensors file"):
        read_metadata(path)


@pytest.mark.parametrize(
    "data",
    [
        b"mine",
        b"\0" * 100,
        b"\xff" * 100,
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x04\0\0\0\0\0\0\0null",
        b"\x07\0\0\0\0\0\0\0" + b'{"x":3}',
    ],
)
def test_a_file_of_another_kind_is_damaged(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="is not a whole safetensors file"):
        read_metadata(path)


def test_dangling_link_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DamagedError):
        read_metadata(path)


def test_a_snapshot_takes_its_name_of_today(tmp_path: Path) -> None:
    former, path = tmp_path / "a.checkpoint.safetensors", tmp_path / "a.snapshot.safetensors"
    take_former_name(path)
    assert list(tmp_path.iterdir()) == []
    snapshot = safetensors.torch.save({"latents": torch.zeros(2)}, {"run_id": "1234", "step": "2"})
    former.write_bytes(snapshot)
    take_former_name(tmp_path / "a.safetensors")  # not the name of a snapshot
    assert former.exists()
    take_former_name(path)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [(path.name, snapshot)]
    former.write_bytes(snapshot + b"another")
    take_former_name(path)
    assert (former.read_bytes(), path.read_bytes()) == (snapshot + b"another", snapshot)


SNAPSHOT = safetensors.torch.save({"latents": torch.zeros(2)}, {"run_id": "1234", "step": "2"})


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"mine at all", "is not a whole safetensors file (its header is too long)"),
        (SNAPSHOT[:-3], f"is not a whole safetensors file (it has {len(SNAPSHOT) - 3} of {len(SNAPSHOT)} bytes)"),
        (safetensors.torch.save({"latents": torch.zeros(2)}, {"settings": "{}"}), "is not the snapshot of a run"),
    ],
    ids=["foreign", "cut", "latents"],
)
def test_a_file_that_is_no_whole_snapshot_keeps_its_name_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, why: str
) -> None:
    former = tmp_path / "a.checkpoint.safetensors"
    former.write_bytes(data)
    assert Snapshot(tmp_path / "a.snapshot.safetensors", settings={}).read() == b""
    said = capsys.readouterr().err
    assert said == f"the run starts at its first step: {former} {why}; move it away\n"
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [(former.name, data)]
