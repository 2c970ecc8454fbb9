"""What one rank of 2, 4 and 8 computes of a layer, on one device and without the others: Ulysses' and ring's shares."""

from collections.abc import Callable
from typing import Any

from benchmarks.measure import Shape, round_robin, spread
from benchmarks.sections.bench import Bench
from benchmarks.sections.layer import QKV, inputs, windowed
from freespec.attention import WindowedAttention, merge_into
from freespec.kernels import select_kernel
from parallel.plan import SequencePlan

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
        bench.record(model, measure(bench, shape, windowed(shape, kernel)))


def measure(bench: Bench, shape: Shape, layer: WindowedAttention) -> dict[str, Any]:
    """Seconds of each share, and what it is of the P-th part of the whole: 1 is perfect, before communication."""
    calls: dict[str, Callable[[], Any]] = {}
    for ranks in RANKS:
        if ranks <= shape.heads:
            calls |= ulysses_calls(layer, inputs(bench, shape, -(-shape.heads // ranks)), ranks)
        if ranks > 1:
            calls |= ring_calls(layer, inputs(bench, shape, shape.heads), shape, ranks)
    for call in calls.values():
        call()
    times = {name: spread(row["wall_s"]) for name, row in round_robin(calls, bench.device, bench.repeats).items()}
    rows = {}
    for name, seconds in times.items():
        kind, ranks, mode = name.split()
        whole = times[f"ulysses 1 {mode}"]["median"]
        rows[name] = {"axis": kind, "ranks": int(ranks), "mode": mode, "wall_s": seconds}
        rows[name]["efficiency"] = whole / (int(ranks) * seconds["median"])
    return {"sizes": str(shape), "rows": rows}


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
