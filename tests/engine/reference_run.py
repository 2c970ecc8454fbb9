"""A whole run by masks and SVDs on a stock pipeline: the simple twin of every model's fast path."""

import math
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from engine.adapters import ModelAdapter
from freespec.attention import masked_ref
from freespec.methods import FreeSpec, Grid
from freespec.spectrum import svd_fusion_ref


class ReferenceProcessor:
    """Both branches by mask and the fusion by SVD, in fp64: shares no code with the fast path but the model's projections.

    Those are the adapter's, which tests of `direct` hold against the stock pipeline.
    """

    def __init__(self, adapter: ModelAdapter, grid: Grid) -> None:
        self.adapter, self.grid = adapter, grid
        self.weights: tuple[Tensor, float] | None = None  # g [D] and lam of a dual step

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        q, k, v = self.adapter.qkv(attn, hidden_states, rotary_emb)
        frame_tokens = self.grid.frame_tokens
        out = masked_ref(q, k, v, frame_tokens=frame_tokens, window_frames=self.grid.window_frames)
        if self.weights is not None:
            wide = masked_ref(q, k, v, frame_tokens=frame_tokens, window_frames=None)
            g, lam = self.weights
            out = svd_fusion_ref(out, wide, g, lam)
        return self.adapter.project_out(attn, out.to(q.dtype))


def weights_by_equations(method: FreeSpec, step: int, num_steps: int, head_dim: int) -> tuple[Tensor, float] | None:
    """g and lam of a step by docs/method.md, number by number, for the defaults counted in steps; None for a late step."""
    assert (method.domain, method.basis, method.residual, method.residual_form) == ("step", "local", "time", "lerp")
    assert method.time
    assert method.rank
    num_dual = math.ceil(method.split * num_steps)
    if step >= num_dual:
        return None
    decay = math.exp(-method.alpha * step / num_dual)  # p = i / n_d
    g = [decay * math.exp(-method.beta * (r - 1) / (head_dim - 1)) for r in range(1, head_dim + 1)]
    return torch.tensor(g, dtype=torch.float64), method.lam_end + (method.lam_start - method.lam_end) * decay


def latents_by_masks(
    pipe: DiffusionPipeline,
    adapter: ModelAdapter,
    latents_of: Callable[..., Tensor],
    method: FreeSpec,
    *,
    num_steps: int,
    grid: Grid,
) -> Tensor:
    """What `latents_of(pipe)` returns in so many steps when every self-attention is the reference."""
    processor = ReferenceProcessor(adapter, grid)
    for attn in adapter.attention_modules(pipe.transformer):
        attn.set_processor(processor)
    head_dim = pipe.transformer.config.attention_head_dim

    def begin(step: int) -> None:
        processor.weights = weights_by_equations(method, step, num_steps, head_dim)

    def next_step(_pipe: DiffusionPipeline, index: int, _timestep: Tensor, _kwargs: dict) -> dict:
        begin(index + 1)
        return {}

    begin(0)
    return latents_of(pipe, callback_on_step_end=next_step)
