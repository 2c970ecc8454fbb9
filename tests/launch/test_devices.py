"""Commands on a simulated CUDA device (tests/pretend_cuda.py): every tensor is on the right device."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.media.read_video import count_frames
from tests.launch.conftest import LTX, SMALL, Run
from tests.pretend_cuda import pretend_cuda

# Videos longer than the window, of frames larger than a tile.
MODELS = {
    "wan": SMALL | {"sampler.num_steps": 2, "video.num_frames": 17},
    "ltx": SMALL | LTX | {"video.num_frames": 25, "video.height": 64, "video.width": 64},
}
TILES = {"tile_height": 32, "tile_width": 32, "stride_height": 16, "stride_width": 16}


def words(settings: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture
def on_gpu(run: Callable[..., Run], wan_folder: Path) -> Callable[..., str]:
    """`on_gpu(model, command, settings)`: a command on the pretended device; returns its last line."""

    def call(model: str, command: str, settings: dict[str, object]) -> str:
        chosen = {"model.path": wan_folder} | MODELS[model] | {"model.device": "cuda", "prompt": "a red circle"}
        with pretend_cuda():
            shown = run(command, *words(chosen | settings))
        assert shown.code == 0, shown.err
        return shown.out.splitlines()[-1]

    return call


# Wan's resident weights are seen below, offloaded ones of LTX-Video in tests/engine/test_devices.py.
@pytest.mark.parametrize(("model", "weights"), [("ltx", "resident"), ("wan", "cpu_offload")])
def test_latents_are_made_traced_decoded_and_decoded_again(
    model: str, weights: str, on_gpu: Callable[..., str], run: Callable[..., Run], tmp_path: Path
) -> None:
    latents, video = tmp_path / "a.safetensors", tmp_path / "a.mp4"
    asked = {"output.path": video, "output.save_latents": latents, "output.trace": "true", "model.weights": weights}
    on_gpu(model, "generate", asked)
    record = json.loads(video.with_suffix(".json").read_text())
    assert record["device"]["type"] == "cuda"
    assert {step["mode"] for step in record["steps"]} >= {"dual"}
    again = {"output": tmp_path / "b.mp4", "decode.mode": "tiled"}
    with pretend_cuda():
        shown = run("decode", latents, *words(again | {f"decode.{name}": size for name, size in TILES.items()}))
    assert shown.code == 0, shown.err
    assert count_frames(tmp_path / "b.mp4") == MODELS[model]["video.num_frames"]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("model", ["wan", pytest.param("ltx", marks=pytest.mark.slow)])
def test_methods_are_compared_and_spectra_seen(model: str, on_gpu: Callable[..., str], tmp_path: Path) -> None:
    last = on_gpu(model, "compare", {"out": tmp_path / "compared", "methods": "direct,freespec"})
    assert "2 videos: 2 methods on 1 pairs of prompt and seed" in last
    last = on_gpu(model, "analyze", {"out": tmp_path / "seen", "ratios": 0.5, "num_reconstructed": 1, "num_points": 2})
    assert "effective rank late in the run" in last
    assert not torch.cuda.is_available()  # or this would be no pretence
