"""One self-attention layer of a method on one device, and attention written out for the twins."""

from collections.abc import Callable

import torch
from torch import Tensor

from freespec.attention import WindowedAttention, table_of
from freespec.kernels import plain
from freespec.methods import Branches, FreeSpec, Grid, Layer, Method, StepPlan
from freespec.methods.freespec import FusionWeights

QKV = tuple[Tensor, Tensor, Tensor]


def draw_qkv(grid: Grid, *, batch: int = 2, heads: int = 3, dim: int = 4, seed: int = 0) -> QKV:
    """Normal q, k, v [B, S, N, D] fp64 whose frames are related, so that components over time differ in size."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, batch, grid.frames, grid.frame_tokens, heads, dim)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = 0.6 * x + x.cumsum(2) / 2
    q, k, v = x.flatten(2, 3).unbind(0)
    return q, k, v


def run_layer(method: Method, grid: Grid, qkv: QKV, step: StepPlan) -> Tensor:
    """The layer's output [B, S, N, D] as the engine computes it, with the plain kernel."""
    q, k, v = qkv
    attention = WindowedAttention(
        num_frames=grid.frames,
        frame_tokens=grid.frame_tokens,
        window_frames=grid.window_frames,
        kernel=plain,
        rest_kernel=method.rest_kernel,
    )
    if step.mode == "frames":
        sets = method.frame_sets(step, grid)
        branches = Branches(sets=(attention.frames(q, k, v, table_of(frames)) for frames in sets))
    elif step.mode == "dual":
        local, o_global = attention.both(q, k, v)
        branches = Branches(o_local=local, o_global=o_global)
    else:
        fused = step.mode == "views_global"
        o_global = attention.dense(q * method.query_scale(grid), k, v)[0] if fused else None
        branches = Branches(o_global=o_global, views=attention.views(q, k, v, method.view_starts(grid)))
    weights = method.weights(step, grid, q.shape[-1], q.device)
    return method.fuse(branches, weights, Layer(grid=grid, sum_tokens=lambda x: x, sum_heads=lambda x: x))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """softmax(scale q kᵀ / sqrt D) v, written out: [B, S, N, D]."""
    logits = scale * torch.einsum("bsnd,btnd->bnst", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnst,btnd->bsnd", logits.softmax(-1), v)


def fuse_spectra(
    method: FreeSpec,
    o_local: Tensor,
    o_global: Tensor,
    weights: FusionWeights,
    sum_tokens: Callable[[Tensor], Tensor] = lambda grams: grams,
) -> Tensor:
    """FreeSpec's fusion of two branches [B, s, N, D], which looks at no grid and sums nothing over heads."""
    grid = Grid(frames=o_local.shape[1], rows=1, columns=1, window_frames=1)
    layer = Layer(grid=grid, sum_tokens=sum_tokens, sum_heads=lambda x: x)
    return method.fuse(Branches(o_local=o_local, o_global=o_global), weights, layer)
