"""Whole runs of the compared methods through the engine's hooks: those of a stock pipeline whose attention is as published."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from engine import apply_method
from engine.adapters import ModelAdapter
from engine.adapters.ltx import LTX
from engine.adapters.wan import WAN
from freespec.methods import FreeLong, FreeNoise, FreePCA, Grid, Method
from tests.engine import test_ltx
from tests.engine.hooks import test_apply
from tests.engine.reference_run import latents_by
from tests.freespec import published
from tests.freespec.layers import QKV
from tests.tiny_pipelines import random_ltx, random_wan

STRIDE = 2  # of views of 3 frames in 8: the last frame has a view of its own


class Family(NamedTuple):
    """A model whose video has 8 latent frames of an even number of rows, and how exact its stock pipeline is."""

    pipe: Callable[[], DiffusionPipeline]
    adapter: ModelAdapter
    latents_of: Callable[..., Tensor]
    grid: Grid
    tolerance: float


FAMILIES = {
    "wan": Family(random_wan, WAN, test_apply.latents_of, Grid(frames=8, rows=4, columns=6, window_frames=3), 1e-9),
    # Its stock pipeline rounds the prediction to fp32, whatever the model's precision.
    "ltx": Family(random_ltx, LTX, test_ltx.latents_of, Grid(frames=8, rows=4, columns=2, window_frames=3), 1e-6),
}


def freenoise(qkv: QKV, grid: Grid, step: int, *, tail: str = "shifted") -> Tensor:
    return published.freenoise(qkv, grid, STRIDE, tail)


def freelong(qkv: QKV, grid: Grid, step: int, *, d_t: float = 0.25) -> Tensor:
    return published.freelong(*published.branches_of(grid, qkv), grid, uncentred=False, d_t=d_t)


def freepca(qkv: QKV, grid: Grid, step: int, *, scale: float | None = None, late: int = 2) -> Tensor:
    """With a fused share of 0.4 the last of three steps is late, and of four the last two."""
    scale = published.token_scale(grid) if scale is None else scale
    return published.freepca(qkv, grid, STRIDE, scale=scale, fused=step < late)


CASES = [
    (FreeNoise(stride=STRIDE), freenoise, {"tail": "none"}),
    (FreeLong(), freelong, {"d_t": 0.3}),
    (FreePCA(stride=STRIDE, domain="step", fused_share=0.4), freepca, {"scale": 1.0}),
    (FreePCA(stride=STRIDE, domain="step", fused_share=0.4), freepca, {"late": 1}),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "twin", "wrong"), CASES)
def test_a_run_is_the_published_one(family: str, method: Method, twin: Callable[..., Tensor], wrong: dict) -> None:
    pipe, adapter, latents_of, grid, tolerance = FAMILIES[family]
    fast = pipe().to(torch.float64)
    with apply_method(fast, method=method, window_frames=grid.window_frames):
        ours = latents_of(fast)

    def error(**details: object) -> float:
        theirs = latents_by(
            pipe().to(torch.float64), adapter, latents_of, lambda qkv, step: twin(qkv, grid, step, **details)
        )
        return float(torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs))

    assert error() < tolerance
    assert error(**wrong) > 1000 * tolerance  # negative control: one detail that is not as published
