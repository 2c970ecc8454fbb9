"""What one rank of 2, 4 and 8 computes of a layer, on one device and without the others: Ulysses' and ring's shares."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.attention import peak_memory
from benchmarks.measure import Shape, spread
from benchmarks.sections.bench import Bench
from benchmarks.sections.layer import PROGRESS, QKV, inputs, windowed
from freespec.attention import WindowedAttention, merge_into
from freespec.kernels import select_kernel
from freespec.methods import Branches, FreeSpec, Layer, StepPlan
from parallel.shards import SequencePlan

RANKS = (1, 2, 4, 8)


def run(bench: Bench) -> None:
    """Both models' layers; the share of one rank is the whole."""
    name = bench.best_kernel()
    bench.record("kernel", name)
    kernel, why = bench.attempt(lambda: select_kernel(name, bench.device, bench.dtype))
    if kernel is None:
        bench.record("kernel", f"auto ({name}: {why})")
        kernel = select_kernel("auto", bench.device, bench.dtype)
    for model, shape in bench.shapes.items():
        measure(bench, model, shape, windowed(shape, kernel))


def measure(bench: Bench, model: str, shape: Shape, layer: WindowedAttention) -> None:
    """Each share's seconds, rate and memory, and what it is of the P-th part of the whole: 1 is perfect, before communication."""
    calls: dict[str, Callable[[], Any]] = {}
    for ranks in RANKS:
        if ranks <= shape.heads:
            calls |= ulysses_calls(layer, inputs(bench, shape, -(-shape.heads // ranks)), ranks)
        if ranks > 1:
            calls |= ring_calls(layer, inputs(bench, shape, shape.heads), shape, ranks)
    bench.choose_solver(shape)
    calls |= {name: fusion_call(bench, shape, *share) for name, share in fusion_shares(shape).items()}
    peaks: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    left_out: dict[str, str] = {}

    def write() -> None:
        bench.record(model, {"sizes": str(shape), "rows": rows(shape, times, peaks), "left_out": left_out})

    def heard(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)
        write()

    for name, call in calls.items():
        peak, why = bench.attempt(lambda call=call: (call(), peak_memory(call, bench.device)[0])[1])
        if peak is None:
            left_out[name] = why
            write()
        else:
            peaks[name] = peak
    bench.rounds({name: calls[name] for name in peaks}, heard)


def rows(shape: Shape, times: dict[str, list[float]], peaks: dict[str, float]) -> dict[str, Any]:
    """A row for each share that was timed; its part of the whole once that is."""
    found: dict[str, Any] = {}
    for name, seconds in times.items():
        kind, ranks, mode = name.split()
        median = spread(seconds)["median"]
        row = {
            "axis": kind,
            "ranks": int(ranks),
            "mode": mode,
            "wall_s": spread(seconds),
            "peak_extra_mib": peaks[name],
        }
        whole = times.get(f"ulysses 1 {mode}")
        if whole:
            row["efficiency"] = spread(whole)["median"] / (int(ranks) * median)
        if mode != "fusion":  # which is bound by memory and latency
            row["tflops"] = operations(shape, kind, int(ranks), mode) / median
        found[name] = row
    return found


def operations(shape: Shape, kind: str, ranks: int, mode: str) -> float:
    """Multiply-adds x 2 of attention in a share, in 10^12: 4 S K D per head, of the window's keys alone if local."""
    heads, queries = shape.heads, shape.num_tokens
    if kind == "ulysses":
        heads = -(-heads // ranks)
    else:
        start, stop = ring_shard(shape, ranks)
        queries = stop - start
    keys = shape.window_frames * shape.frame_tokens if mode == "local" else shape.num_tokens
    return 4 * queries * keys * shape.head_dim * heads / 1e12


def ring_shard(shape: Shape, ranks: int) -> tuple[int, int]:
    """The tokens of a rank in the middle."""
    return SequencePlan(tokens=shape.num_tokens, heads=shape.heads, ring=ranks, ulysses=1).ring_shards[ranks // 2]


def fusion_shares(shape: Shape) -> dict[str, tuple[int, int]]:
    """Tokens and heads that a rank fuses; over a ring every rank decomposes all heads."""
    shares = {}
    for ranks in RANKS:
        if ranks <= shape.heads:
            shares[f"ulysses {ranks} fusion"] = shape.num_tokens, -(-shape.heads // ranks)
        if ranks > 1:
            start, stop = ring_shard(shape, ranks)
            shares[f"ring {ranks} fusion"] = stop - start, shape.heads
    return shares


def fusion_call(bench: Bench, shape: Shape, tokens: int, heads: int) -> Callable[[], Any]:
    """The fusion of a share, without the sum of Grams over ranks."""
    torch.manual_seed(0)
    sizes = (2, 1, tokens, heads, shape.head_dim)
    o_local, o_global = torch.randn(sizes, device=bench.device, dtype=bench.dtype).unbind(0)
    method = FreeSpec()
    weights = method.weights(StepPlan(mode="dual", progress=PROGRESS), shape.grid, shape.head_dim, bench.device)
    layer = Layer(grid=shape.grid, sum_tokens=lambda total: total, sum_heads=lambda total: total)
    return lambda: method.fuse(Branches(o_local=o_local, o_global=o_global), weights, layer)


def ulysses_calls(layer: WindowedAttention, qkv: QKV, ranks: int) -> dict[str, Callable[[], Any]]:
    """All tokens, the largest share of the heads."""
    return {
        f"ulysses {ranks} global": lambda: layer.dense(*qkv),
        f"ulysses {ranks} local": lambda: layer.local(*qkv, 0, 0),
        f"ulysses {ranks} dual": lambda: layer.both(*qkv),
    }


def ring_calls(layer: WindowedAttention, qkv: QKV, shape: Shape, ranks: int) -> dict[str, Callable[[], Any]]:
    """All heads, the tokens of a rank in the middle: its halo, then the blocks that come round, as parallel/ does it."""
    shards = SequencePlan(tokens=shape.num_tokens, heads=shape.heads, ring=ranks, ulysses=1).ring_shards
    start, stop = shards[ranks // 2]
    q, k, v = qkv
    q = q[:, start:stop]
    halo = layer.halo(start, stop)
    near = tuple(x[:, halo[0] : halo[1]] for x in (k, v))
    far = [slice(a, min(b, halo[0])) for a, b in shards if a < halo[0]]
    far += [slice(max(a, halo[1]), b) for a, b in shards if b > halo[1]]

    def whole() -> None:
        out, lse = layer.dense(q, k[:, start:stop], v[:, start:stop])
        out = out.float()
        for a, b in shards:
            if (a, b) != (start, stop):
                merge_into(out, lse, *layer.dense(q, k[:, a:b], v[:, a:b]))

    def dual() -> None:
        _, (out, lse) = layer.dual(q, *near, start, halo[0], dtype=q.float().dtype)
        for rows in far:
            merge_into(out, lse, *layer.dense(q, k[:, rows], v[:, rows]))

    return {
        f"ring {ranks} global": whole,
        f"ring {ranks} local": lambda: layer.local(q, *near, start, halo[0]),
        f"ring {ranks} dual": dual,
    }
