"""Both branches for the price of one? Global, local, two calls, dual and masked attention: time, memory, error.

python -m benchmarks.attention
python -m benchmarks.attention --device cuda
"""

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import (
    SHAPES,
    Shape,
    complete,
    environment,
    heads_of,
    parser,
    print_table,
    ratio,
    relative_error,
    round_robin,
    spread,
    write,
)
from freespec.attention import WindowedAttention
from freespec.kernels import select_kernel

# A masked call needs the mask, and on CPU its float copy: 5 bytes per query and key. What needs more goes in parts of the queries.
MASK_LIMIT_BYTES = 2**30
MASK_BYTES = 5
CHECKED_QUERIES = 64
Branches = tuple[Tensor | None, Tensor | None]  # out_local, out_global


def variants(shape: Shape, qkv: tuple[Tensor, Tensor, Tensor], kernel: str) -> dict[str, Callable[[], Branches]]:
    """What is compared: each call returns the branches that it computes."""
    q, k, v = qkv
    layer = WindowedAttention(
        num_frames=shape.num_frames,
        frame_tokens=shape.frame_tokens,
        window_frames=shape.window_frames,
        kernel=select_kernel(kernel, q.device, q.dtype),
    )
    calls: dict[str, Callable[[], Branches]] = {
        "global": lambda: (None, layer.dense(q, k, v)[0]),
        "local": lambda: (layer.local(q, k, v, 0, 0)[0], None),
        "two calls": lambda: (layer.local(q, k, v, 0, 0)[0], layer.dense(q, k, v)[0]),
        "dual": lambda: layer.both(q, k, v),
    }
    parts = torch.arange(shape.num_tokens, device=q.device).split(
        max(MASK_LIMIT_BYTES // MASK_BYTES // shape.num_tokens, 1)
    )
    mask = window_mask(shape, parts[0]) if len(parts) == 1 else None
    calls["masked"] = lambda: (torch.cat([masked(shape, qkv, part, mask) for part in parts], dim=1), None)
    return calls


def masked(shape: Shape, qkv: tuple[Tensor, Tensor, Tensor], queries: Tensor, mask: Tensor | None) -> Tensor:
    """The local branch of these queries with every key outside of their windows masked; the mask is made anew if it is not given."""
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


def inputs(shape: Shape, heads: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k, v [1, S, N, D] on the device."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, shape.num_tokens, heads, shape.head_dim)
    q, k, v = (torch.randn(sizes, generator=generator).to(args.device, getattr(torch, args.dtype)) for _ in range(3))
    return q, k, v


def exact_branches(shape: Shape, qkv: tuple[Tensor, Tensor, Tensor], queries: Tensor) -> Branches:
    """Both branches of these queries in fp64."""
    q, k, v = qkv[0][:, queries].double(), qkv[1].double(), qkv[2].double()
    logits = torch.einsum("bsnd,bknd->bnsk", q, k) / shape.head_dim**0.5
    local = logits.masked_fill(~window_mask(shape, queries), float("-inf"))
    out_local, out_global = (torch.einsum("bnsk,bknd->bsnd", x.softmax(-1), v) for x in (local, logits))
    return out_local, out_global


def peak_memory(call: Callable[[], Branches], device: torch.device) -> tuple[float, Branches]:
    """MiB that one call allocates at its peak, beyond q, k, v and the mask, by the allocator's own count; and its output."""
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
    shape: Shape, qkv: tuple[Tensor, Tensor, Tensor], calls: dict[str, Callable[[], Branches]]
) -> dict[str, dict[str, Any]]:
    """Peak memory of each variant, and relative errors against fp64 on queries spread over the video."""
    queries = torch.linspace(0, shape.num_tokens - 1, CHECKED_QUERIES, device=qkv[0].device).long()
    exact = exact_branches(shape, qkv, queries)
    result: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        peak, out = peak_memory(call, qkv[0].device)
        pairs = [(branch, *x) for branch, *x in zip(("local", "global"), out, exact, strict=True) if x[0] is not None]
        error = {branch: relative_error(actual[:, queries], right) for branch, actual, right in pairs}
        result[name] = {"peak_extra_mib": peak, "error": error}
    return result


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one shape."""
    shape = SHAPES[name]
    heads = heads_of(shape, args)
    qkv = inputs(shape, heads, args)
    calls = variants(shape, qkv, args.kernel)
    checked = memory_and_error(shape, qkv, calls)  # also warms up
    times = round_robin(calls, torch.device(args.device), args.repeats)
    work = tera_operations(shape, heads)
    ratios = {
        f"{over} / {under}": {unit: ratio(times[over][unit], times[under][unit]) for unit in ("wall_s", "cpu_s")}
        for over, under in (("local", "global"), ("two calls", "global"), ("dual", "global"), ("dual", "two calls"))
    }
    rows = {
        variant: {
            **{unit: spread(seconds) for unit, seconds in times[variant].items()},
            "tflops": work[variant] / spread(times[variant]["wall_s"])["median"],
            **checked[variant],
        }
        for variant in calls
    }
    return {
        "shape": name,
        "sizes": str(shape),
        "heads": heads,
        "head_dim": shape.head_dim,
        "output_mib": qkv[0].nbytes / 2**20,
        "variants": rows,
        "ratios": ratios,
    }


def show(result: dict[str, Any]) -> None:
    """One shape as a table."""
    print(f"\n{result['shape']}: {result['sizes']}, {result['heads']} heads x {result['head_dim']}")
    rows = []
    for name, row in result["variants"].items():
        wall = row["wall_s"]
        error = ", ".join(f"{branch} {value:.1e}" for branch, value in row["error"].items())
        rows.append(
            [
                name,
                f"{wall['median'] * 1e3:.1f}",
                f"{wall['min'] * 1e3:.1f}-{wall['max'] * 1e3:.1f}",
                f"{row['cpu_s']['median'] * 1e3:.1f}",
                f"{row['tflops']:.3f}",
                f"{row['peak_extra_mib']:.0f}",
                error,
            ]
        )
    print_table(["variant", "ms", "min-max", "CPU ms", "TFLOP/s", "extra MiB", "error against fp64"], rows)
    for name, value in result["ratios"].items():
        wall, cpu = value["wall_s"], value["cpu_s"]
        print(f"{name}: {wall['median']:.3f} ({wall['min']:.3f}-{wall['max']:.3f}); in CPU time {cpu['median']:.3f}")


def main() -> None:
    """Measure the shapes and write the file."""
    args = complete(parser(__doc__).parse_args())
    where = environment(torch.device(args.device), args.note)
    print(where)
    settings = {"dtype": args.dtype, "kernel": args.kernel, "repeats": args.repeats}
    results: list[dict[str, Any]] = []
    for name in args.shapes:
        results.append(measure(name, args))
        show(results[-1])
        where["load_average_end"] = os.getloadavg()[0]
        path = write(
            args.results, "attention", where, settings, results
        )  # after every shape: a long one may be stopped
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
