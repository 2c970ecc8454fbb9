"""Rates of the collectives of parallel/collectives.py over ranks of this machine, and the layer time that they predict."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch

from engine.planner.timing import EXPOSED, GIGA, waiting_seconds
from parallel import collectives
from parallel.collectives import CollectiveTrace
from parallel.mesh import SeqMesh, build_mesh
from parallel.shards import SequencePlan, length
from tests.ranks import run_ranks

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=600)
MESSAGE_MIB = 16  # of each rank, in all but `reduce`
HEAD_DIM = 64
GRAMS = (2, 1, 12, 128, 128)  # both branches' Gram matrices of a layer of Wan2.1-1.3B on a ring, fp64
# Kinds of messages that the planner names differently.
PLANNER_NAMES = {"reduce": "grams"}


def collective_rates(ranks: int, repeats: int, folder: Path) -> dict[str, float]:
    """GB/s of each kind of collective over so many ranks: what the busiest of them sends over the slowest one's time."""
    [by_rank] = run_ranks(ranks, measure_collectives, [(ranks, repeats)], folder, timeout=TIMEOUT)
    return {
        kind: max(of_rank[kind][0] for of_rank in by_rank)
        / statistics.median(
            max(one_round) for one_round in zip(*(of_rank[kind][1] for of_rank in by_rank), strict=True)
        )
        / GIGA
        for kind in by_rank[0]
    }


def measure_collectives(rank: int, case: tuple[int, int]) -> dict[str, tuple[int, list[float]]]:
    """On every rank: bytes sent in one call, by kind, and seconds of each round."""
    ranks, repeats = case
    mesh = build_mesh(cfg=1, ring=1, ulysses=ranks, device=CPU, timeout=TIMEOUT)
    sent: Counter[str] = Counter()
    trace = CollectiveTrace(label="benchmark", on_bytes=lambda kind, count: sent.update({kind: count}))
    found = {}
    for kind, call in calls(mesh, trace).items():
        call()
        sent.clear()
        call()
        found[kind] = (sent[kind], [timed(call, mesh) for _ in range(repeats)])
    return found


def calls(mesh: SeqMesh, trace: CollectiveTrace) -> dict[str, Callable[[], object]]:
    """One call of every collective that a video uses, by the kind under which it reports its bytes.

    `cfg` is once a step, `gather` once a forward, `broadcast` and `collect` once a video (text and tiles); the others are
    in every layer.
    """
    group, ranks = mesh.ulysses.group, mesh.ulysses.size
    num_tokens = MESSAGE_MIB * 2**18 // (2 * ranks * HEAD_DIM) * 2  # even: half of them are keys, half values
    x = torch.randn(1, num_tokens, ranks, HEAD_DIM)
    tokens, heads = [num_tokens] * ranks, [1] * ranks
    k, v = x.chunk(2, dim=1)
    owned = list(pairwise(accumulate([k.shape[1]] * ranks, initial=0)))
    needed = [(max(start - k.shape[1], 0), min(stop + k.shape[1], owned[-1][1])) for start, stop in owned]
    kv, grams = collectives.pack_keys(k, v), torch.randn(GRAMS, dtype=torch.float64)
    flat = x.flatten()
    common: dict[str, Any] = {"group": group, "trace": trace}

    def ring() -> None:
        for _ in collectives.RingShift(kv, sizes=[len(kv)] * ranks, **common):
            pass

    return {
        "all_to_all": lambda: collectives.tokens_to_heads((x,), token_sizes=tokens, head_sizes=heads, **common),
        "halo": lambda: collectives.exchange_halo(k, v, owned=owned, needed=needed, **common),
        "ring": ring,
        "reduce": lambda: collectives.sum_over_ranks(grams, **common),
        "gather": lambda: collectives.gather_tokens(x, token_sizes=tokens, **common),
        "cfg": lambda: collectives.gather_copies(x, "cfg", **common),
        "broadcast": lambda: collectives.broadcast(x, source=0, **common),
        "collect": lambda: collectives.collect(flat, sizes=[len(flat)] * ranks, target=0, **common),
    }


def timed(call: Callable[[], object], mesh: SeqMesh) -> float:
    """Seconds from when all ranks are ready to when this one is done."""
    trace = CollectiveTrace(label="start", on_bytes=collectives.ignore_bytes)
    collectives.barrier(group=mesh.world.group, device=CPU, trace=trace)
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def predict_seconds(
    plan: SequencePlan, alone: float, sent: Mapping[str, int], rates: Mapping[str, float], *, devices: int
) -> float:
    """Predicted seconds of an attention layer over the ranks of a plan, of which one rank alone takes `alone`.

    The busiest rank's share of queries times heads, on so many devices (cores, or GPUs) for all ranks; and the bytes
    `sent` of each kind at its measured rate in GB/s, as far as the planner's model says that a rank waits for them.
    Where every core computes, the ring's blocks are not hidden.
    """
    compute = alone * max(busiest_share(plan), 1 / min(plan.ranks, devices))
    seconds = dict.fromkeys((*EXPOSED, "ring"), 0.0)
    seconds |= {PLANNER_NAMES.get(kind, kind): count / (rates[kind] * GIGA) for kind, count in sent.items() if count}
    hiding = compute if devices > plan.ranks else 0.0
    return compute + waiting_seconds(seconds, hiding, blocks=plan.ring)


def busiest_share(plan: SequencePlan) -> float:
    """The largest share of queries times heads that a rank has inside attention."""
    return _largest(plan.ring_shards) * _largest(plan.head_shares) / (plan.tokens * plan.heads)


def _largest(spans: Sequence[tuple[int, int]]) -> int:
    return max(map(length, spans))
