"""Pipelines of random weights with a method on them, and what their calls give: for tests of `apply_method`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanPipeline
from torch import Tensor, nn

from engine import MethodHandle, apply_method
from engine.errors import UserError
from tests.tiny_pipelines import random_ltx, random_wan

MODELS = {"wan": random_wan, "ltx": random_ltx}
SIZE = {"wan": {"num_frames": 29, "height": 32, "width": 48}, "ltx": {"num_frames": 57, "height": 64, "width": 32}}
every_model = pytest.mark.parametrize("model", MODELS)


def name_of(pipe: DiffusionPipeline) -> str:
    return "wan" if isinstance(pipe, (WanPipeline, WanImageToVideoPipeline)) else "ltx"


def latents_of(pipe: DiffusionPipeline, *, call: Callable[..., Any] | None = None, **overrides: Any) -> Tensor:
    """Latents from given embeddings: of the pipeline's parts only scheduler and transformer are called."""
    draw = torch.Generator().manual_seed(1)
    text = {name: torch.randn(1, 12, 16, generator=draw) for name in ("prompt_embeds", "negative_prompt_embeds")}
    if name_of(pipe) == "ltx":
        text |= {name: torch.ones(1, 12) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    arguments = SIZE[name_of(pipe)] | text | {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    arguments |= {"generator": torch.Generator().manual_seed(3)} | overrides
    return (pipe(**arguments) if call is None else call(pipe, **arguments)).frames


def applied(pipe: DiffusionPipeline, **settings: Any) -> MethodHandle:
    return apply_method(pipe, **{"method": "freespec", "window_frames": 3} | settings)


def blocks_of(pipe: DiffusionPipeline) -> nn.ModuleList:
    return pipe.transformer.blocks if name_of(pipe) == "wan" else pipe.transformer.transformer_blocks


def refused(call: Callable[[], Any], *, match: str) -> None:
    """The call ends in one line that says what was found."""
    with pytest.raises(UserError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def another(pipe: DiffusionPipeline) -> nn.Module:
    return MODELS[name_of(pipe)]().transformer


def in_step(step: int, happen: Callable[[DiffusionPipeline], Any]) -> Callable[..., dict]:
    def callback(pipe: DiffusionPipeline, index: int, _timestep: Any, _tensors: Any) -> dict:
        if index == step:
            happen(pipe)
        return {}

    return callback
