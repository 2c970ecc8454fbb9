"""One attention layer over ranks: bytes sent against the plan's integers, time of each collective, and strong scaling.

python -m benchmarks.parallel

On a CPU the ranks are processes of this machine over gloo, so times show overhead, not scaling, once there are more ranks
than cores; the bytes are those of any machine. Beside every time stands what is predicted from one rank's time and the
rates of the collectives, both measured in the same run. With `--device cuda` one GPU computes what one rank of P would,
without communication; with the bytes that such a rank would send, and the bandwidth of the links that configs/gpus states,
that gives the predicted time and efficiency of P GPUs.
"""

import argparse
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.collectives import CPU, PLANNER_NAMES, TIMEOUT, collective_rates, predict_seconds, timed
from benchmarks.measure import SHAPES, Shape, complete, environment, heads_of, parser, print_table, write
from engine.planner.gpu import FOLDER, GpuSpec, read_gpu
from engine.planner.timing import EXPOSED, link_rate, waiting_seconds
from engine.ranks.arrange import match_gpu
from freespec.attention import WindowedAttention
from freespec.kernels import select_kernel
from freespec.methods import Branches, FreeSpec, Grid, Layer, StepPlan
from parallel.attention import TORCH_EXCHANGE, SequenceLayout
from parallel.collectives import CollectiveTrace
from parallel.mesh import build_mesh
from parallel.shards import LayerShape, Mode, SequencePlan, layer_bytes, layer_bytes_by_rank
from tests.ranks import run_ranks

MODES: tuple[Mode, ...] = ("global", "local", "dual")
RANKS = (1, 2, 4, 8)
COMPARED = {"predicted_ms": ".1f", "measured_over_predicted": ".2f", "speedup": ".2f"}  # keys of a row, and their form


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
    local, o_global = layout.branches(*layout.scatter(*qkv), mode, attention)
    if mode == "dual":
        return layout.gather(fuse(Branches(o_local=local, o_global=o_global), attention, layout.reduce))
    return layout.gather(o_global if local is None else local)


def fuse(branches: Branches, attention: WindowedAttention, sum_tokens: Callable[[Tensor], Tensor]) -> Tensor:
    """FreeSpec's fusion of both branches, which asks for no rows and columns."""
    grid = Grid(
        frames=attention.num_frames, rows=1, columns=attention.frame_tokens, window_frames=attention.window_frames
    )
    method, like = FreeSpec(), branches.o_local
    weights = method.weights(StepPlan(mode="dual", progress=0.3), grid, like.shape[-1], like.device)
    return method.fuse(branches, weights, Layer(grid=grid, sum_tokens=sum_tokens, sum_heads=lambda total: total))


def measure_rank(rank: int, case: Case) -> dict[str, Any]:
    """Runs on every rank: bytes that this rank sent by kind, the plan's integers, and seconds of each round."""
    shape = SHAPES[case.shape]
    mesh = build_mesh(cfg=1, ring=case.ring, ulysses=case.ulysses, device=CPU, timeout=TIMEOUT)
    plan = SequencePlan(tokens=shape.num_tokens, heads=case.heads, ring=case.ring, ulysses=case.ulysses)
    sent: Counter[str] = Counter()
    trace = CollectiveTrace(label="benchmark", on_bytes=lambda kind, count: sent.update({kind: count}))
    layout = SequenceLayout(mesh=mesh, plan=plan, exchange=TORCH_EXCHANGE, trace=trace)
    attention = attention_of(shape, CPU, torch.float32, "auto")
    start, stop = layout.shard
    draw = torch.Generator().manual_seed(rank)
    qkv = tuple(torch.randn(1, stop - start, case.heads, shape.head_dim, generator=draw) for _ in range(3))
    layer(layout, attention, qkv, case.mode)
    one_layer = dict(sent)
    seconds = [timed(lambda: layer(layout, attention, qkv, case.mode), mesh) for _ in range(case.repeats)]
    weight = LayerShape(batch=1, head_dim=shape.head_dim, itemsize=4)
    planned = layer_bytes(plan, rank, case.mode, shape=weight, halo=attention.halo)
    return {"sent": one_layer, "planned": planned, "seconds": seconds}


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
        "of_heads": case.heads,
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
            of_heads = heads_of(shape, args)
            heads = -(-of_heads // ranks)
            q, k, v = torch.randn(3, 1, shape.num_tokens, heads, shape.head_dim, device=device, dtype=dtype)
            for mode in MODES:
                seconds = [gpu_seconds(mode, attention, (q, k, v)) for _ in range(args.repeats + 1)][1:]
                row = {"shape": name, "heads": heads, "of_heads": of_heads, "ring": 1, "ulysses": ranks, "mode": mode}
                row |= {"ranks": ranks, "ms": statistics.median(seconds) * 1e3}
                plan = SequencePlan(tokens=shape.num_tokens, heads=of_heads, ring=1, ulysses=ranks)
                weight = LayerShape(batch=1, head_dim=shape.head_dim, itemsize=dtype.itemsize)
                by_rank = layer_bytes_by_rank(plan, mode, shape=weight, halo=attention.halo)
                results.append(row | {"bytes": {kind: max(one[kind] for one in by_rank) for kind in by_rank[0]}})
    return results


def find_links(name: str | None, device: torch.device) -> GpuSpec | None:
    """The description of the GPU whose links are assumed: the one that is named, or this device's; None if there is none."""
    if name is None:
        name = match_gpu(torch.cuda.get_device_name(device), [path.stem for path in sorted(FOLDER.glob("*.json"))])
    return None if name is None else read_gpu(name)


def predict_with_links(results: list[dict[str, Any]], gpu: GpuSpec) -> None:
    """Put beside each row of one GPU what as many as its ranks would take, and their efficiency; None without a row of one.

    Its measured compute is the busiest rank's, and its messages go at the bandwidth that the GPU's description states.
    """
    alone = {(row["shape"], row["mode"]): row["ms"] for row in results if row["ranks"] == 1}
    for row in results:
        rate = link_rate(row["ranks"], gpu, world=row["ranks"])
        seconds = dict.fromkeys((*EXPOSED, "ring"), 0.0)
        seconds |= {PLANNER_NAMES.get(kind, kind): count / rate for kind, count in row["bytes"].items()}
        row["with_links_ms"] = row["ms"] + 1e3 * waiting_seconds(seconds, row["ms"] / 1e3, blocks=row["ring"])
        one = alone.get((row["shape"], row["mode"]))
        row["efficiency"] = None if one is None else one / (row["ranks"] * row["with_links_ms"])


def gpu_seconds(mode: Mode, attention: WindowedAttention, qkv: tuple[Tensor, Tensor, Tensor]) -> float:
    """Device seconds of one layer's attention, and fusion in a dual step."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    if mode == "dual":
        local, o_global = attention.both(*qkv)
        fuse(Branches(o_local=local, o_global=o_global), attention, lambda total: total)
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
    command.add_argument(
        "--gpu", help="one of configs/gpus, or a JSON file, whose links are assumed; else the device's"
    )
    args = complete(command.parse_args())
    device = torch.device(args.device)
    where = environment(device, args.note)
    rates: dict[str, dict[str, float]] = {}
    links = None
    if device.type == "cuda":
        links = find_links(args.gpu, device)
        results, devices = on_one_gpu(args), max(args.ranks)  # as if every rank had one
        if links is not None:
            predict_with_links(results, links)
    else:
        results, devices = on_ranks(args), len(os.sched_getaffinity(0))
        with tempfile.TemporaryDirectory() as folder:
            for ranks in [ranks for ranks in args.ranks if ranks > 1]:
                rates[str(ranks)] = collective_rates(ranks, args.repeats, Path(folder))
    compare(results, rates, devices)
    show(results, rates)
    where["load_average_end"] = os.getloadavg()[0]
    settings = {"dtype": args.dtype, "kernel": args.kernel, "repeats": args.repeats, "gb_per_second": rates}
    settings["devices"] = devices
    if links is not None:
        stated = {"intra_node_gb_s": links.intra_node_gb_s, "link_fraction": links.link_fraction}
        settings["links"] = {"gpu": links.name, **stated}
    settings["shapes"] = {name: asdict(SHAPES[name]) for name in args.shapes}
    print(f"wrote {write(args.results, 'parallel', where, settings, results)}")


def compare(results: list[dict[str, Any]], rates: dict[str, dict[str, float]], devices: int) -> None:
    """Put beside each time how often it goes into one rank's, what is predicted, and measured / predicted.

    None where one rank was not measured.
    """
    alone = {(row["shape"], row["mode"]): row["ms"] for row in results if row["ranks"] == 1}
    for row in results:
        row |= {"speedup": None, "predicted_ms": None, "measured_over_predicted": None}
        if (row["shape"], row["mode"]) not in alone:
            continue
        one = alone[row["shape"], row["mode"]]
        plan = SequencePlan(
            tokens=SHAPES[row["shape"]].num_tokens, heads=row["of_heads"], ring=row["ring"], ulysses=row["ulysses"]
        )
        of_ranks = rates.get(str(row["ranks"]), {})
        sent = row["bytes"] if of_ranks else {}  # one GPU has sent nothing of what its rank would
        predicted = 1e3 * predict_seconds(plan, one / 1e3, sent, of_ranks, devices=devices)
        row["speedup"] = one / row["ms"]
        row |= {"predicted_ms": predicted, "measured_over_predicted": row["ms"] / predicted}


def show(results: list[dict[str, Any]], rates: dict[str, Any]) -> None:
    """The table on the terminal."""
    rows = [
        [
            f"{row['shape']} {row['mode']}",
            str(row["ranks"]),
            f"{row['ring']} x {row['ulysses']}",
            f"{row['ms']:.1f}",
            *(f"{row[key]:{form}}" if row[key] else "" for key, form in COMPARED.items()),
            " ".join(f"{kind} {count}" for kind, count in row.get("bytes", {}).items() if count),
            {True: "yes", False: "NO", None: ""}[row.get("bytes_as_planned")],
        ]
        for row in results
    ]
    header = ["layer", "ranks", "ring x ulysses", "ms", "predicted ms", "measured / predicted", "speedup"]
    print_table([*header, "bytes of the busiest rank", "as planned"], rows)
    for ranks, by_name in rates.items():
        print(f"{ranks} ranks, GB/s: " + ", ".join(f"{name} {rate:.2f}" for name, rate in by_name.items()))


if __name__ == "__main__":
    main()
