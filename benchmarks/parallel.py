"""One attention layer over ranks: bytes sent against the plan's integers, time of each collective, and strong scaling.

python -m benchmarks.parallel

The ranks are processes of this machine over gloo, so times show overhead, not scaling, once there are more ranks than cores; the
bytes are those of any machine. Beside every time stands what is predicted from one rank's time and the rates of the collectives,
both measured in the same run.
"""

import argparse
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import tables
from benchmarks.collectives import TIMEOUT, collective_rates, predict_seconds, timed
from benchmarks.fusion import fuse_call
from benchmarks.measure import CPU, SHAPES, Shape, layer_parser, run
from freespec.kernels import select_kernel
from freespec.methods import Branches
from parallel.attention import TORCH_EXCHANGE, SequenceLayout
from parallel.collectives import CollectiveTrace
from parallel.mesh import build_mesh
from parallel.shards import LayerShape, Mode, SequencePlan, layer_bytes
from tests.ranks import run_ranks

MODES: tuple[Mode, ...] = ("global", "local", "dual")
RANKS = (1, 2, 4, 8)


class Case(NamedTuple):
    """One layout of one layer, to be measured on every rank."""

    shape: str
    heads: int
    ring: int
    ulysses: int
    mode: Mode
    repeats: int
    kernel: str


def layouts(ranks: int) -> list[tuple[int, int]]:
    """(ring, ulysses) whose product is `ranks`."""
    return [(ring, ranks // ring) for ring in range(1, ranks + 1) if ranks % ring == 0]


def layer(layout: SequenceLayout, shape: Shape, kernel: str, qkv: tuple[Tensor, ...], mode: Mode) -> Tensor:
    """One self-attention layer of one rank, fusion included: q, k, v [B, s, N, D] -> [B, s, N, D]."""
    attention = shape.windowed(select_kernel(kernel, CPU, torch.float32))
    local, o_global = layout.branches(*layout.scatter(*qkv), mode, attention)
    if mode == "dual":
        fuse = fuse_call(
            shape,
            Branches(o_local=local, o_global=o_global),
            sum_tokens=layout.reduce,
            share_heads=layout.share_heads,
        )
        return layout.gather(fuse())
    return layout.gather(o_global if local is None else local)


def measure_rank(rank: int, case: Case) -> dict[str, Any]:
    """On every rank: bytes sent by kind, bytes planned, and seconds of each round."""
    shape = SHAPES[case.shape]
    mesh = build_mesh(cfg=1, ring=case.ring, ulysses=case.ulysses, device=CPU, timeout=TIMEOUT)
    plan = SequencePlan(tokens=shape.num_tokens, heads=case.heads, ring=case.ring, ulysses=case.ulysses)
    sent: Counter[str] = Counter()
    trace = CollectiveTrace(label="benchmark", on_bytes=lambda kind, count: sent.update({kind: count}))
    layout = SequenceLayout(mesh=mesh, plan=plan, exchange=TORCH_EXCHANGE, trace=trace)
    start, stop = layout.shard
    draw = torch.Generator().manual_seed(rank)
    qkv = tuple(torch.randn(1, stop - start, case.heads, shape.head_dim, generator=draw) for _ in range(3))
    layer(layout, shape, case.kernel, qkv, case.mode)
    one_layer = dict(sent)
    seconds = [timed(lambda: layer(layout, shape, case.kernel, qkv, case.mode), mesh) for _ in range(case.repeats)]
    weight = LayerShape(batch=1, head_dim=shape.head_dim, itemsize=4)
    halo = shape.windowed(select_kernel(case.kernel, CPU, torch.float32)).halo
    planned = layer_bytes(plan, rank, case.mode, shape=weight, halo=halo)
    return {"sent": one_layer, "planned": planned, "seconds": seconds}


def measure(args: argparse.Namespace, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every shape, number of ranks and layout, on processes of this machine, beside its prediction."""
    rates = settings["gb_per_second"]
    with tempfile.TemporaryDirectory() as folder:
        for ranks in [ranks for ranks in args.ranks if ranks > 1]:
            rates[str(ranks)] = collective_rates(ranks, args.repeats, Path(folder))
        for name in args.shapes:
            heads, alone = args.heads or SHAPES[name].cpu_heads, {}
            for ranks in args.ranks:
                cases = [
                    Case(name, heads, *degrees, mode, args.repeats, args.kernel)
                    for degrees in layouts(ranks)
                    for mode in MODES
                ]
                outcome = run_ranks(ranks, measure_rank, cases, Path(folder), timeout=TIMEOUT)
                for case, by_rank in zip(cases, outcome, strict=True):
                    row = summarise(case, by_rank)
                    if ranks == 1:
                        alone[case.mode] = row["ms"]
                    yield row | compare(row, alone, rates.get(str(ranks), {}), settings["devices"])


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


def compare(
    row: Mapping[str, Any], alone: Mapping[str, float], rates: Mapping[str, float], devices: int
) -> dict[str, float | None]:
    """Speedup over one rank, predicted time, and measured / predicted; None if one rank was not measured."""
    if row["mode"] not in alone:
        return {"speedup": None, "predicted_ms": None, "measured_over_predicted": None}
    one, shape = alone[row["mode"]], SHAPES[row["shape"]]
    plan = SequencePlan(tokens=shape.num_tokens, heads=row["heads"], ring=row["ring"], ulysses=row["ulysses"])
    predicted = 1e3 * predict_seconds(plan, one / 1e3, row["bytes"] if rates else {}, rates, devices=devices)
    return {"speedup": one / row["ms"], "predicted_ms": predicted, "measured_over_predicted": row["ms"] / predicted}


def main() -> None:
    """Measure, print and write."""
    command = layer_parser(__doc__)
    command.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    args = command.parse_args()
    settings: dict[str, Any] = {"gb_per_second": {}, "devices": len(os.sched_getaffinity(0))}
    settings["shapes"] = {name: asdict(SHAPES[name]) for name in args.shapes}
    run("parallel", args, measure(args, settings), tables.parallel, settings)


if __name__ == "__main__":
    main()
