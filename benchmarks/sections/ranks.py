"""The share of a layer that one rank of 2, 4 and 8 computes, on one device without the others: Ulysses and ring."""

from collections.abc import Callable
from typing import Any

from benchmarks.fusion import falling_branches, fuse_call
from benchmarks.measure import QKV, Shape, spread
from benchmarks.sections.bench import Bench, ShapeRun
from freespec.attention import WindowedAttention, merge_into
from freespec.kernels import select_kernel
from parallel.shards import SequencePlan, length

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
        measure(RankRun(bench=bench, name=model, shape=shape), shape.windowed(kernel))


class RankRun(ShapeRun):
    """The shares of one model's layer."""

    def found(self) -> dict[str, Any]:
        """A row for each share that was timed; its part of the whole once that is: 1 is perfect, before communication."""
        rows: dict[str, Any] = {}
        for name, seconds in self.times.items():
            axis, ranks, mode = name.split()
            median, whole = spread(seconds)["median"], self.times.get(f"ulysses 1 {mode}")
            row = {"axis": axis, "ranks": int(ranks), "mode": mode, "wall_s": spread(seconds), **self.checked[name]}
            if whole:
                row["efficiency"] = spread(whole)["median"] / (int(ranks) * median)
            if mode != "fusion":  # which is bound by memory and latency
                row["tflops"] = operations(self.shape, axis, int(ranks), mode) / median
            rows[name] = row
        return {"sizes": str(self.shape), "rows": rows}


def measure(run: RankRun, layer: WindowedAttention) -> None:
    """Each share's seconds, rate and memory."""
    bench, shape = run.bench, run.shape
    calls: dict[str, Callable[[], Any]] = {}
    for ranks in RANKS:
        if ranks <= shape.heads:
            calls |= ulysses_calls(layer, shape.draw(bench.device, bench.dtype, -(-shape.heads // ranks)), ranks)
        if ranks > 1:
            calls |= ring_calls(layer, shape.draw(bench.device, bench.dtype), shape, ranks)
    bench.choose_solver(shape)
    for name, (tokens, heads) in fusion_shares(shape).items():
        branches = falling_branches(shape, bench.device, bench.dtype, heads=heads, tokens=tokens)
        calls[name] = fuse_call(shape, branches)  # without the sum of Grams over ranks
    bench.rounds({name: call for name, call in calls.items() if run.check(name, call, run.peak)}, run.add_time)


def operations(shape: Shape, kind: str, ranks: int, mode: str) -> float:
    """Multiply-adds x 2 of attention in a share, in 10^12: 4 S K D per head, of the window's keys alone if local."""
    heads, queries = -(-shape.heads // ranks), shape.num_tokens
    if kind == "ring":
        heads, queries = shape.heads, length(ring_shard(shape, ranks))
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
            shares[f"ring {ranks} fusion"] = length(ring_shard(shape, ranks)), shape.heads
    return shares


def ulysses_calls(layer: WindowedAttention, qkv: QKV, ranks: int) -> dict[str, Callable[[], Any]]:
    """All tokens, the largest share of the heads."""
    return {
        f"ulysses {ranks} global": lambda: layer.dense(*qkv),
        f"ulysses {ranks} local": lambda: layer.local(*qkv, 0, 0),
        f"ulysses {ranks} dual": lambda: layer.both(*qkv),
    }


def ring_calls(layer: WindowedAttention, qkv: QKV, shape: Shape, ranks: int) -> dict[str, Callable[[], Any]]:
    """All heads, the tokens of a rank in the middle: its halo, then the ring's blocks, as in parallel/."""
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
