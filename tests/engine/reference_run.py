"""A whole run by masks and SVDs on a stock pipeline: the simple twin of every model's fast path."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from engine.adapters import ModelAdapter
from freespec.attention import masked_ref
from freespec.methods import FreeSpec, Grid, StepPlan
from freespec.spectrum import svd_fusion_ref


class ReferenceProcessor:
    """Both branches by mask and the fusion by SVD, in fp64: shares no code with the fast path but the projections."""

    def __init__(self, adapter: ModelAdapter, grid: Grid) -> None:
        self.adapter, self.grid = adapter, grid
        self.weights: Any = None  # of a dual step

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
            out = svd_fusion_ref(out, wide, g, float(lam))
        return self.adapter.project_out(attn, out.to(q.dtype))


def latents_by_masks(
    pipe: DiffusionPipeline,
    adapter: ModelAdapter,
    latents_of: Callable[..., Tensor],
    method: FreeSpec,
    *,
    plan: Sequence[StepPlan],
    grid: Grid,
) -> Tensor:
    """What `latents_of(pipe)` returns when every self-attention is the reference, with the modes of `plan` step by step."""
    processor = ReferenceProcessor(adapter, grid)
    for attn in adapter.attention_modules(pipe.transformer):
        attn.set_processor(processor)
    head_dim = pipe.transformer.config.attention_head_dim

    def begin(step: StepPlan) -> None:
        dual = step.mode == "dual"
        processor.weights = method.weights(step, grid, head_dim, torch.device("cpu")) if dual else None

    def next_step(_pipe: DiffusionPipeline, index: int, _timestep: Tensor, _kwargs: dict) -> dict:
        begin(plan[min(index + 1, len(plan) - 1)])
        return {}

    begin(plan[0])
    return latents_of(pipe, callback_on_step_end=next_step)
