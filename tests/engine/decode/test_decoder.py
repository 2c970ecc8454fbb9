"""The decoder alone: the engine's frames without weights of transformer and text encoder."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, VideoConfig
from engine.decode.decoder import open_decoder
from engine.engine import LongVideoEngine
from engine.errors import UserError
from tests.tiny_pipelines import save_random_wan


def config_of(folder: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(folder), device="cpu"),
        video=VideoConfig(num_frames=9, height=32, width=32),
        method=MethodConfig(window_frames=3),
        output=OutputConfig(progress="off"),
    )


def test_only_the_vae_is_read(tmp_path: Path) -> None:
    folder = save_random_wan(tmp_path / "wan")
    latents = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    engine = LongVideoEngine(config_of(folder))
    expected = np.concatenate(list(engine.decode(latents)))
    engine.close()
    for part in ("transformer", "text_encoder"):
        (folder / part / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
        (folder / part / "model.safetensors").unlink(missing_ok=True)
    shutil.rmtree(folder / "tokenizer")

    with open_decoder(config_of(folder)) as decoder:
        assert decoder.decode_plan is None
        frames = np.concatenate(list(decoder.decode(latents)))
        assert decoder.decode_plan == engine.decoder.decode_plan
    assert np.array_equal(frames, expected)
    with pytest.raises(UserError, match="transformer has no weights"):
        LongVideoEngine(config_of(folder))

    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="vae has no weights"), open_decoder(config_of(folder)):
        pass
