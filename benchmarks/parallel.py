"""One attention layer over ranks: bytes sent against the plan's integers, time of each collective, and strong scaling.

python -m benchmarks.parallel

On a CPU the ranks are processes of this machine over gloo, so times show overhead, not scaling, once there are more ranks
than cores; the bytes are those of any machine. With `--device cuda` one GPU computes what one rank of P would, without
communication: the measured half of a prediction for P GPUs.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import SHAPES, Shape, complete, environment, heads_of, parser, print_table, write
from freespec.attention import WindowedAttention
from freespec.kernels import select_kernel
from freespec.methods import Branches, FreeSpec, Grid, Layer, StepPlan
from parallel import collectives
from parallel.attention import TORCH_EXCHANGE, SequenceLayout
from parallel.collectives import Trace
from parallel.mesh import build_mesh
from parallel.plan import LayerShape, Mode, SequencePlan, layer_bytes
from tests.ranks import run_ranks

MODES: tuple[Mode, ...] = ("global", "local", "dual")
RANKS = (1, 2, 4, 8)
TIMEOUT = timedelta(seconds=600)
MESSAGE_MIB = 16


class Case(NamedTuple):
    """One layout of one layer, to be measured on every rank."""

    shape: str
    heads: int
    ring: int
    ulysses: int
    mode: Mode
    repeats: int


def layouts(ranks: int) -> list[tuple[int, int]]:
    """(ring, ulysses) whose product is `ranks`."""
    return [(ring, ranks // ring) for ring in range(1, ranks + 1) if ranks % ring == 0]


def attention_of(shape: Shape, device: torch.device, dtype: torch.dtype, kernel: str) -> WindowedAttention:
    """The geometry of a shape with a kernel for this device."""
    return WindowedAttention(
        num_frames=shape.num_frames,
        frame_tokens=shape.frame_tokens,
        window_frames=shape.window_frames,
        kernel=select_kernel(kernel, device, dtype),
    )


def layer(layout: SequenceLayout, attention: WindowedAttention, qkv: tuple[Tensor, ...], mode: Mode) -> Tensor:
    """One self-attention layer of one rank, fusion included: q, k, v [B, s, N, D] -> [B, s, N, D]."""
    local, wide = layout.branches(*layout.scatter(*qkv), mode, attention)
    if mode == "dual":
        return layout.gather(fuse(Branches(local=local, wide=wide), attention, layout.reduce))
    return layout.gather(wide if local is None else local)


def fuse(branches: Branches, attention: WindowedAttention, sum_tokens: Callable[[Tensor], Tensor]) -> Tensor:
    """FreeSpec's fusion of both branches, which asks for no rows and columns."""
    grid = Grid(
        frames=attention.num_frames, rows=1, columns=attention.frame_tokens, window_frames=attention.window_frames
    )
    method, like = FreeSpec(), branches.local
    weights = method.weights(StepPlan(mode="dual", progress=0.3), grid, like.shape[-1], like.device)
    return method.fuse(branches, weights, Layer(grid=grid, sum_tokens=sum_tokens, sum_heads=lambda total: total))


def measure_rank(rank: int, case: Case) -> dict[str, Any]:
    """Runs on every rank: bytes that this rank sent by kind, the plan's integers, and seconds of each round."""
    shape = SHAPES[case.shape]
    device = torch.device("cpu")
    mesh = build_mesh(cfg=1, ring=case.ring, ulysses=case.ulysses, device=device, timeout=TIMEOUT)
    plan = SequencePlan(tokens=shape.num_tokens, heads=case.heads, ring=case.ring, ulysses=case.ulysses)
    sent: Counter[str] = Counter()
    trace = Trace(label="benchmark", on_bytes=lambda kind, count: sent.update({kind: count}))
    layout = SequenceLayout(mesh=mesh, plan=plan, exchange=TORCH_EXCHANGE, trace=trace)
    attention = attention_of(shape, device, torch.float32, "auto")
    start, stop = layout.shard
    draw = torch.Generator().manual_seed(rank)
    qkv = tuple(torch.randn(1, stop - start, case.heads, shape.head_dim, generator=draw) for _ in range(3))
    layer(layout, attention, qkv, case.mode)
    one_layer = dict(sent)
    seconds = [timed(lambda: layer(layout, attention, qkv, case.mode), mesh) for _ in range(case.repeats)]
    weight = LayerShape(batch=1, head_dim=shape.head_dim, itemsize=4)
    planned = layer_bytes(plan, rank, case.mode, shape=weight, halo=attention.halo)
    return {"sent": one_layer, "planned": planned, "seconds": seconds}


def measure_collectives(rank: int, ranks: int) -> dict[str, float]:
    """GB/s that a rank sends in each kind of collective, for a message of MESSAGE_MIB."""
    mesh = build_mesh(cfg=1, ring=1, ulysses=ranks, device=torch.device("cpu"), timeout=TIMEOUT)
    sent: Counter[str] = Counter()
    trace = Trace(label="benchmark", on_bytes=lambda kind, count: sent.update({kind: count}))
    group = mesh.ulysses.group
    x = torch.randn(1, MESSAGE_MIB * 2**18 // (8 * 64), 8, 64)
    tokens, heads = [x.shape[1]] * ranks, [8 // ranks] * ranks
    kv = collectives.pack_keys(x, x)

    def ring() -> None:
        for _ in collectives.RingShift(kv, sizes=tokens, group=group, trace=trace):
            pass

    calls: dict[str, Callable[[], object]] = {
        "all_to_all": lambda: collectives.tokens_to_heads(
            (x,), token_sizes=tokens, head_sizes=heads, group=group, trace=trace
        ),
        "gather": lambda: collectives.gather_tokens(x, token_sizes=tokens, group=group, trace=trace),
        "ring": ring,
    }
    rates = {}
    for name, call in calls.items():
        call()
        sent.clear()
        seconds = timed(call, mesh)
        rates[name] = sent[name] / seconds / 1e9
    return rates


def timed(call: Callable[[], object], mesh: Any) -> float:
    """Seconds from when all ranks are ready to when this one is done."""
    collectives.meet(
        group=mesh.world.group,
        device=torch.device("cpu"),
        trace=Trace(label="start", on_bytes=collectives.ignore_bytes),
    )
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def on_ranks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every shape, number of ranks and layout, on processes of this machine."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.shapes:
            heads = heads_of(SHAPES[name], args)
            for ranks in args.ranks:
                cases = [
                    Case(name, heads, *degrees, mode, args.repeats) for degrees in layouts(ranks) for mode in MODES
                ]
                outcome = run_ranks(ranks, measure_rank, cases, Path(folder), timeout=TIMEOUT)
                results += [summarise(case, by_rank) for case, by_rank in zip(cases, outcome, strict=True)]
    return results


def summarise(case: Case, by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """One layout: what the busiest rank sent, whether every rank sent what was planned, and the slowest rank's time."""
    kinds = sorted({kind for one in by_rank for kind in one["planned"]})
    exact = all(one["sent"].get(kind, 0) == one["planned"][kind] for one in by_rank for kind in kinds)
    rounds = zip(*(one["seconds"] for one in by_rank), strict=True)
    return {
        **case._asdict(),
        "ranks": case.ring * case.ulysses,
        "bytes": {kind: max(one["sent"].get(kind, 0) for one in by_rank) for kind in kinds},
        "bytes_as_planned": exact,
        "ms": statistics.median(max(one_round) for one_round in rounds) * 1e3,
    }


def on_one_gpu(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What one rank of P computes of a layer under Ulysses (N / P heads, all tokens), on the device, without the others."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    results = []
    for name in args.shapes:
        shape = SHAPES[name]
        attention = attention_of(shape, device, dtype, args.kernel)
        for ranks in args.ranks:
            heads = -(-heads_of(shape, args) // ranks)
            q, k, v = torch.randn(3, 1, shape.num_tokens, heads, shape.head_dim, device=device, dtype=dtype)
            for mode in MODES:
                seconds = [gpu_seconds(mode, attention, (q, k, v)) for _ in range(args.repeats + 1)][1:]
                row = {"shape": name, "heads": heads, "ring": 1, "ulysses": ranks, "mode": mode, "ranks": ranks}
                results.append(row | {"ms": statistics.median(seconds) * 1e3})
    return results


def gpu_seconds(mode: Mode, attention: WindowedAttention, qkv: tuple[Tensor, Tensor, Tensor]) -> float:
    """Device seconds of one layer's attention, and fusion in a dual step."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    if mode == "dual":
        local, wide = attention.both(*qkv)
        fuse(Branches(local=local, wide=wide), attention, lambda total: total)
    elif mode == "local":
        attention.local(*qkv, 0, 0)
    else:
        attention.dense(*qkv)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def main() -> None:
    """Measure, print and write."""
    command = parser(__doc__.partition("\n")[0])
    command.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    args = complete(command.parse_args())
    device = torch.device(args.device)
    where = environment(device, args.note)
    rates: dict[str, Any] = {}
    if device.type == "cuda":
        results = on_one_gpu(args)
    else:
        results = on_ranks(args)
        with tempfile.TemporaryDirectory() as folder:
            for ranks in [ranks for ranks in args.ranks if ranks > 1 and 8 % ranks == 0]:
                [by_rank] = run_ranks(ranks, measure_collectives, [ranks], Path(folder), timeout=TIMEOUT)
                rates[str(ranks)] = {name: min(rate[name] for rate in by_rank) for name in by_rank[0]}
    alone = {(row["shape"], row["mode"]): row["ms"] for row in results if row["ranks"] == 1}
    for row in results:
        row["speedup"] = alone[row["shape"], row["mode"]] / row["ms"] if (row["shape"], row["mode"]) in alone else None
    show(results, rates)
    where["load_average_end"] = os.getloadavg()[0]
    settings = {"dtype": args.dtype, "kernel": args.kernel, "repeats": args.repeats, "gb_per_second": rates}
    settings["shapes"] = {name: asdict(SHAPES[name]) for name in args.shapes}
    print(f"wrote {write(args.results, 'parallel', where, settings, results)}")


def show(results: list[dict[str, Any]], rates: dict[str, Any]) -> None:
    """The table on the terminal."""
    rows = [
        [
            f"{row['shape']} {row['mode']}",
            str(row["ranks"]),
            f"{row['ring']} x {row['ulysses']}",
            f"{row['ms']:.1f}",
            f"{row['speedup']:.2f}" if row["speedup"] else "",
            " ".join(f"{kind} {count}" for kind, count in row.get("bytes", {}).items() if count),
            {True: "yes", False: "NO", None: ""}[row.get("bytes_as_planned")],
        ]
        for row in results
    ]
    print_table(["layer", "ranks", "ring x ulysses", "ms", "speedup", "bytes of the busiest rank", "as planned"], rows)
    for ranks, by_name in rates.items():
        print(f"{ranks} ranks, GB/s: " + ", ".join(f"{name} {rate:.2f}" for name, rate in by_name.items()))


if __name__ == "__main__":
    main()
