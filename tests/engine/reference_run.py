"""A whole run on a stock pipeline whose attention is a twin, such as masks and SVDs: the simple form of every model's fast path."""

import math
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from engine.adapters import ModelAdapter
from freespec.attention import masked_ref
from freespec.methods import FreeSpec, Grid
from freespec.spectrum import svd_fusion_ref
from tests.freespec.layers import QKV

Layer = Callable[[QKV, int], Tensor]


class ReferenceProcessor:
    """Attention by `layer`, a twin in fp64: shares no code with the fast path but the model's projections.

    Those are the adapter's, which tests of `direct` hold against the stock pipeline.
    """

    def __init__(self, adapter: ModelAdapter, layer: Layer) -> None:
        self.adapter, self.layer = adapter, layer
        self.step = 0

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        q, k, v = self.adapter.qkv(attn, hidden_states, rotary_emb)
        return self.adapter.project_out(attn, self.layer((q, k, v), self.step).to(q.dtype))


def latents_by(
    pipe: DiffusionPipeline, adapter: ModelAdapter, latents_of: Callable[..., Tensor], layer: Layer
) -> Tensor:
    """What `latents_of(pipe)` returns when every self-attention is `layer` of its q, k, v [B, S, N, D] and the step."""
    processor = ReferenceProcessor(adapter, layer)
    for attn in adapter.attention_modules(pipe.transformer):
        attn.set_processor(processor)

    def next_step(_pipe: DiffusionPipeline, index: int, _timestep: Tensor, _kwargs: dict) -> dict:
        processor.step = index + 1
        return {}

    return latents_of(pipe, callback_on_step_end=next_step)


def weights_by_equations(method: FreeSpec, step: int, num_steps: int, head_dim: int) -> tuple[Tensor, float] | None:
    """g and lam of a step by docs/method.md, number by number, for the defaults counted in steps; None for a late step."""
    assert (method.domain, method.basis, method.residual, method.residual_form) == ("step", "local", "time", "lerp")
    assert method.time
    assert method.rank
    num_dual = math.ceil(method.fused_share * num_steps)
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
    """`latents_by` FreeSpec in so many steps: both branches by mask and the fusion by SVD."""
    head_dim = pipe.transformer.config.attention_head_dim

    def layer(qkv: QKV, step: int) -> Tensor:
        out = masked_ref(*qkv, frame_tokens=grid.frame_tokens, window_frames=grid.window_frames)
        weights = weights_by_equations(method, step, num_steps, head_dim)
        if weights is None:
            return out
        o_global = masked_ref(*qkv, frame_tokens=grid.frame_tokens, window_frames=None)
        return svd_fusion_ref(out, o_global, *weights)

    return latents_by(pipe, adapter, latents_of, layer)
