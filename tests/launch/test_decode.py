"""decode.py: what it may be told about the model and the decoding, and its mistakes in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launch.commands import decode
from tests.launch.conftest import Run


@pytest.fixture
def kept(make: Callable[..., Run], tmp_path: Path) -> Path:
    """Latents that a run kept."""
    path = tmp_path / "kept.safetensors"
    assert make({"output.save_latents": path}).code == 0
    return path


def test_settings_of_decoding_are_used_and_recorded(run: Callable[..., Run], kept: Path, tmp_path: Path) -> None:
    tiles = {"mode": "tiled", "tile_height": 16, "tile_width": 16, "stride_height": 8, "stride_width": 8}
    words = [f"--decode.{key}={value}" for key, value in tiles.items()]
    assert run(decode.main, kept, "--output", tmp_path / "b.mp4", *words).code == 0
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["config"]["decode"].items() >= tiles.items()
    assert record["decode"]["mode"] == "tiled"
    first = json.loads((tmp_path / "a.json").read_text())
    assert first["config"]["decode"]["mode"] == "auto"
    assert record["video"]["sha256"] != first["video"]["sha256"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--model.dtype", "float16"), "unknown setting"),
        (("--progress", "maybe"), "progress"),
        (("--decode.stride_height", "999"), "decode.stride_height must lie in [1, decode.tile_height]"),
        (("--model.path", "~nosuchuser/model"), "nosuchuser"),
    ],
)
def test_mistakes_end_in_one_line(
    run: Callable[..., Run], kept: Path, tmp_path: Path, words: tuple[str, ...], line: str
) -> None:
    assert line in run(decode.main, kept, "--output", tmp_path / "b.mp4", *words).error
    assert not (tmp_path / "b.mp4").exists()


def test_a_home_that_nobody_has_is_one_line(run: Callable[..., Run], kept: Path, tmp_path: Path) -> None:
    assert "nosuchuser" in run(decode.main, "~nosuchuser/a.safetensors", "--output", tmp_path / "b.mp4").error
    assert "nosuchuser" in run(decode.main, kept, "--output", "~nosuchuser/b.mp4").error


def test_a_record_of_another_version_is_refused(run: Callable[..., Run], kept: Path, tmp_path: Path) -> None:
    with safe_open(kept, "pt") as file:
        metadata = SimpleNamespace(**file.metadata())
    record = json.loads(metadata.record)
    record["config"]["sampler"]["of_the_future"] = 1
    metadata.record = json.dumps(record)
    save_file(load_file(kept), tmp_path / "other.safetensors", metadata=vars(metadata))
    shown = run(decode.main, tmp_path / "other.safetensors", "--output", tmp_path / "b.mp4")
    assert "settings that this version does not know" in shown.error
    assert "of_the_future" in shown.error
