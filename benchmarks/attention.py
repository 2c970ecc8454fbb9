"""Attention of a layer: global, local, two calls, dual and masked; time, memory and error.

python -m benchmarks.attention
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from benchmarks import tables
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
from freespec.kernels import Kernel, select_kernel

# A masked call needs the mask, and on CPU its float copy: 5 bytes per query and key. Larger ones are split over the queries.
MASK_LIMIT_BYTES = 2**30
MASK_BYTES = 5
CHECKED_QUERIES = 64
Branches = tuple[Tensor | None, Tensor | None]  # out_local, out_global
Calls = dict[str, Callable[[], Branches]]


def strided_calls(shape: Shape, qkv: QKV, kernel: Kernel) -> Calls:
    """Each branch alone, both by two calls, and both by one, on strided views; a call returns the branches that it computes."""
    layer = shape.windowed(kernel)
    return {
        "global": lambda: (None, layer.dense(*qkv)[0]),
        "local": lambda: (layer.local(*qkv, 0, 0)[0], None),
        "two calls": lambda: (layer.local(*qkv, 0, 0)[0], layer.dense(*qkv)[0]),
        "dual": lambda: layer.both(*qkv),
    }


def masked_call(shape: Shape, qkv: QKV) -> Callable[[], Branches]:
    """The local branch by a mask over all keys, which is made within the call if it is split."""
    parts = torch.arange(shape.num_tokens).split(max(MASK_LIMIT_BYTES // MASK_BYTES // shape.num_tokens, 1))
    mask = window_mask(shape, parts[0]) if len(parts) == 1 else None
    return lambda: (torch.cat([masked(shape, qkv, part, mask) for part in parts], dim=1), None)


def masked(shape: Shape, qkv: QKV, queries: Tensor, mask: Tensor | None) -> Tensor:
    """The local branch of these queries with every key outside of their windows masked; the mask is made here unless it is given."""
    q, k, v = (x.transpose(1, 2) for x in (qkv[0][:, queries], *qkv[1:]))
    seen = window_mask(shape, queries) if mask is None else mask
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def window_mask(shape: Shape, queries: Tensor) -> Tensor:
    """Which of all keys these queries see in the local branch: [queries, S] bool, by the definition."""
    start = (queries // shape.frame_tokens - shape.window_frames // 2).clamp(0, shape.num_frames - shape.window_frames)
    frame = torch.arange(shape.num_tokens, device=queries.device) // shape.frame_tokens
    return (frame >= start[:, None]) & (frame < start[:, None] + shape.window_frames)


def tera_operations(shape: Shape, heads: int) -> dict[str, float]:
    """Multiply-adds x 2 that each variant executes, in 10^12: 4 S K D per head."""
    whole = 4 * shape.num_tokens**2 * shape.head_dim * heads / 1e12
    window = whole * shape.window_frames / shape.num_frames
    return {"global": whole, "local": window, "two calls": whole + window, "dual": whole, "masked": whole}


def spread_queries(shape: Shape, device: torch.device, most: int = CHECKED_QUERIES) -> Tensor:
    """Queries spread over the video, at which errors are measured."""
    return torch.linspace(0, shape.num_tokens - 1, min(most, shape.num_tokens), device=device).long()


def exact_branches(shape: Shape, qkv: QKV, queries: Tensor) -> Branches:
    """Both branches of these queries in fp64."""
    parts = exact_parts(shape, qkv, queries)
    return parts["local out"], parts["global out"]


def exact_parts(shape: Shape, qkv: QKV, queries: Tensor) -> dict[str, Tensor]:
    """out [1, Q, N, D] and lse [1, Q, N] of both branches in fp64."""
    q, k, v = qkv[0][:, queries].double(), qkv[1].double(), qkv[2].double()
    logits = torch.einsum("bsnd,bknd->bnsk", q, k) / shape.head_dim**0.5
    local = logits.masked_fill(~window_mask(shape, queries), float("-inf"))
    parts = {}
    for branch, seen in (("local", local), ("global", logits)):
        parts[f"{branch} out"] = torch.einsum("bnsk,bknd->bsnd", seen.softmax(-1), v)
        parts[f"{branch} lse"] = seen.logsumexp(-1).transpose(1, 2)
    return parts


def peak_memory(call: Callable[[], Branches], device: torch.device) -> tuple[float, Branches]:
    """MiB that one call allocates at its peak, beyond q, k, v and the mask, by the allocator's count, and its output."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        out = call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20, out
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = call()
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profiler.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda event: event["ts"])
    held = itertools.accumulate(event["args"]["Bytes"] for event in events)
    return max(held, default=0) / 2**20, out


def memory_and_error(
    call: Callable[[], Branches], exact: Sequence[Tensor], queries: Tensor, device: torch.device
) -> dict[str, Any]:
    """Peak memory of a variant, and relative errors against fp64 at these queries."""
    peak, out = peak_memory(call, device)
    pairs = [(branch, *x) for branch, *x in zip(("local", "global"), out, exact, strict=True) if x[0] is not None]
    error = {branch: relative_error(actual[:, queries], right) for branch, actual, right in pairs}
    return {"peak_extra_mib": peak, "error": error}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape."""
    shape = SHAPES[name]
    heads = args.heads or shape.cpu_heads
    qkv = shape.draw(CPU, torch.float32, heads)
    calls = strided_calls(shape, qkv, select_kernel(args.kernel, CPU, torch.float32))
    calls["masked"] = masked_call(shape, qkv)
    queries = spread_queries(shape, CPU)
    exact = exact_branches(shape, qkv, queries)
    checked = {variant: memory_and_error(call, exact, queries, CPU) for variant, call in calls.items()}  # also warms up
    times = round_robin(calls, CPU, args.repeats)
    work = tera_operations(shape, heads)
    found = {
        variant: {"tflops": work[variant] / spread(times[variant]["wall_s"])["median"], **checked[variant]}
        for variant in calls
    }
    pairs = (("local", "global"), ("two calls", "global"), ("dual", "global"), ("dual", "two calls"))
    return layer_result(name, heads, times, variants=found, pairs=pairs) | {"output_mib": qkv[0].nbytes / 2**20}


def main() -> None:
    """Measure the shapes, print and write."""
    args = layer_parser(__doc__).parse_args()
    run("attention", args, (measure(name, args) for name in args.shapes), tables.attention)


if __name__ == "__main__":
    main()
