"""Far keys in a layer: dual attention with all keys, a share, and a number of them, over global attention; time and error.

python -m benchmarks.far
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import tables
from benchmarks.attention import exact_branches, spread_queries, window_mask
from benchmarks.measure import (
    CPU,
    QKV,
    SHAPES,
    Shape,
    layer_parser,
    layer_result,
    relative_error,
    round_robin,
    run,
    spread,
)
from freespec.attention import WindowedAttention
from freespec.far_keys import far_tokens
from freespec.kernels import select_kernel
from freespec.thinning import kept_tokens

FAR = ("1/4", "1/8", 4096)
VARIANTS = ("all", *FAR)


def kept_of(shape: Shape, far: int | str, device: torch.device = CPU) -> Tensor | None:
    """The tokens that a setting keeps of a layer in a step; None for all."""
    sizes = {"num_frames": shape.num_frames, "frame_tokens": shape.frame_tokens, "window_frames": shape.window_frames}
    kept = far_tokens(far, **sizes)
    if kept is None:
        return None
    return kept_tokens(1, shape.frame_tokens, num_frames=shape.num_frames, kept=kept, layers=1, step=0)[0].to(device)


def dual_call(layer: WindowedAttention, qkv: QKV, kept: Tensor | None) -> Callable[[], Tensor]:
    """The global branch of a dual call with the kept tokens outside the windows, gathering them included."""
    q, k, v = qkv

    def call() -> Tensor:
        far = None if kept is None else (k.index_select(1, kept), v.index_select(1, kept))
        return layer.dual(q, k, v, 0, 0, dtype=q.dtype, far=far)[1][0]

    return call


def exact_rows(shape: Shape, qkv: QKV, queries: Tensor, kept: Tensor | None) -> Tensor:
    """Reference of the call for these queries, in fp64 with explicit weights."""
    if kept is None:
        out = exact_branches(shape, qkv, queries)[1]
        assert out is not None
        return out
    q, k, v = qkv[0][:, queries].double(), qkv[1].double(), qkv[2].double()
    weights = torch.zeros(shape.num_tokens, dtype=torch.float64, device=q.device)
    weights[kept] = shape.num_tokens / len(kept)
    weight = torch.where(window_mask(shape, queries), 1.0, weights)
    logits = torch.einsum("bsnd,bknd->bnsk", q, k) / shape.head_dim**0.5 + weight.log()
    return torch.einsum("bnsk,bknd->bsnd", logits.softmax(-1), v)


def share_of_operations(shape: Shape, kept: Tensor | None) -> float:
    """Operations of the dual call over those of the global branch."""
    outside = (shape.num_frames - shape.window_frames) / shape.num_frames
    return 1.0 if kept is None else 1 - outside * (1 - len(kept) / shape.num_tokens)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape."""
    shape = SHAPES[name]
    heads = args.heads or shape.cpu_heads
    qkv, kernel = shape.draw(CPU, torch.float32, heads), select_kernel(args.kernel, CPU, torch.float32)
    kept = {f"dual, {far}": kept_of(shape, far) for far in VARIANTS}
    layer = shape.windowed(kernel)
    calls = {variant: dual_call(layer, qkv, tokens) for variant, tokens in kept.items()}
    queries = spread_queries(shape, CPU)
    error = {
        variant: relative_error(call()[:, queries], exact_rows(shape, qkv, queries, kept[variant]))
        for variant, call in calls.items()
    }  # also warms up
    times = round_robin({"global": lambda: layer.dense(*qkv)[0], **calls}, CPU, args.repeats)
    found = {
        variant: {"operations": share_of_operations(shape, tokens), "error": error[variant]}
        for variant, tokens in kept.items()
    }
    result = layer_result(name, heads, times, variants=found, pairs=[(variant, "global") for variant in calls])
    return result | {"global": {unit: spread(seconds) for unit, seconds in times["global"].items()}}


def main() -> None:
    """Measure the shapes, print and write."""
    args = layer_parser(__doc__).parse_args()
    run("far", args, (measure(name, args) for name in args.shapes), tables.far)


if __name__ == "__main__":
    main()
