"""Optional packages compared: xDiT's hybrid attention for `direct`, SageAttention for a dual step's complement.

Both sides of a comparison run in the same rounds of one process, or of one group of processes where there are several GPUs.
A package that is not installed or does not run here is recorded as not available.
"""

import json
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.measure import Shape, ratio, relative_error, round_robin, spread
from benchmarks.sections.bench import UNSUPPORTED, Bench
from engine.errors import first_line
from engine.ranks.group_of_one import GROUP_OF_ONE
from freespec.kernels import select_complement, select_kernel
from parallel.attention import TORCH_EXCHANGE, HybridAttention, SequenceLayout
from parallel.collectives import CollectiveTrace, ignore_bytes
from parallel.mesh import SeqMesh, build_mesh
from parallel.shards import SequencePlan
from parallel.xfuser import check_xfuser, xfuser_attention

KERNEL = "cuda_flash"  # torch's FlashAttention, which both sides have
TIMEOUT = timedelta(seconds=60)
COMPARED = "one self-attention layer; whole steps of Wan2.1-1.3B with xfuser are among the steps"


def run(bench: Bench) -> None:
    """Both models' layers: xfuser on this GPU, then on all GPUs, then the quantised complement."""
    bench.record("compared", COMPARED)
    for name, shape in bench.shapes.items():
        bench.record(f"xfuser, {name}", on_one(bench, shape))
        gpus = torch.cuda.device_count() if bench.device.type == "cuda" else 1
        if gpus > 1 and bench.has_time(20):
            bench.record(f"xfuser on {gpus} GPUs, {name}", on_all(bench, shape, gpus))
        bench.record(f"sage, {name}", complement(bench, shape))


def not_available(why: str) -> dict[str, str]:
    """The result in place of figures."""
    return {"not available": why}


def on_one(bench: Bench, shape: Shape) -> dict[str, Any]:
    """One layer of `direct` by ours and by xfuser in this process."""
    mesh = GROUP_OF_ONE.acquire()
    try:
        plan = SequencePlan(tokens=shape.num_tokens, heads=shape.heads, ring=1, ulysses=1)
        check_xfuser(plan, device_type=bench.device.type, kernel=KERNEL)
        return compare(bench, shape, mesh, xfuser_attention(mesh, kernel=KERNEL), kernel=KERNEL)
    except UNSUPPORTED as error:
        return not_available(first_line(error))
    finally:
        GROUP_OF_ONE.release()


def compare(bench: Bench, shape: Shape, mesh: SeqMesh, hybrid: HybridAttention, *, kernel: str) -> dict[str, Any]:
    """Seconds of both, their ratio, and the difference of their outputs, on the ranks of a mesh."""
    plan = SequencePlan(tokens=shape.num_tokens, heads=shape.heads, ring=mesh.ring.size, ulysses=mesh.ulysses.size)
    trace = CollectiveTrace(label="benchmark", on_bytes=ignore_bytes)
    layout = SequenceLayout(mesh=mesh, plan=plan, exchange=TORCH_EXCHANGE, trace=trace)
    q, k, v = (layout.shard_tokens(x, dim=1).contiguous() for x in shape.draw(bench.device, bench.dtype))
    attention = shape.windowed(select_kernel(kernel, bench.device, bench.dtype))
    calls = {
        "ours": lambda: layout.gather(layout.branches(*layout.scatter(q, k, v), "global", attention)[1]),
        "xfuser": lambda: hybrid(q, k, v, layout=layout),
    }
    degrees = {"ring": mesh.ring.size, "ulysses": mesh.ulysses.size}
    return {"degrees": degrees, "kernel": kernel, **side_by_side(bench, calls)}


def side_by_side(bench: Bench, calls: dict[str, Callable[[], Tensor]]) -> dict[str, Any]:
    """Seconds of our call and of the other, their ratio, and the difference of their outputs."""
    ours, other = calls
    outs = {name: call() for name, call in calls.items()}
    times = {name: row["wall_s"] for name, row in round_robin(calls, bench.device, bench.repeats).items()}
    return {
        **{name: {"wall_s": spread(seconds)} for name, seconds in times.items()},
        f"{other} / {ours}": ratio(times[other], times[ours]),
        "relative difference": relative_error(outs[other], outs[ours]),
    }


def on_all(bench: Bench, shape: Shape, gpus: int) -> dict[str, Any]:
    """The same over all GPUs of this machine, ulysses as far as the heads divide; what rank 0 measured."""
    ulysses = max(degree for degree in range(1, gpus + 1) if gpus % degree == 0 and shape.heads % degree == 0)
    plan = SequencePlan(tokens=shape.num_tokens, heads=shape.heads, ring=gpus // ulysses, ulysses=ulysses)
    with tempfile.TemporaryDirectory() as folder:
        try:
            check_xfuser(plan, device_type=bench.device.type, kernel=KERNEL)
            mp.spawn(_rank, (bench, shape, plan, folder), nprocs=gpus)
        except (*UNSUPPORTED, mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            return not_available(first_line(error))
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
    return found


def _rank(rank: int, bench: Bench, shape: Shape, plan: SequencePlan, folder: str) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("nccl", store, rank=rank, world_size=plan.ranks, timeout=TIMEOUT)
    mesh = build_mesh(cfg=1, ring=plan.ring, ulysses=plan.ulysses, device=device, timeout=TIMEOUT)
    bench.device = device
    found = compare(bench, shape, mesh, xfuser_attention(mesh, kernel=KERNEL), kernel=KERNEL)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def complement(bench: Bench, shape: Shape) -> dict[str, Any]:
    """A dual step with the keys outside the windows in int8 against one in the dtype of the rest."""
    name = bench.best_kernel()
    try:
        rest = select_complement("sage", bench.device, bench.dtype, dual="strided")
        qkv = shape.draw(bench.device, bench.dtype)
        plain = shape.windowed(select_kernel(name, bench.device, bench.dtype))
        mixed = shape.windowed(plain.kernel, rest_kernel=rest)
        calls = {"same": lambda: plain.both(*qkv)[1], "sage": lambda: mixed.both(*qkv)[1]}
        return {"kernel": name, **side_by_side(bench, calls)}
    except UNSUPPORTED as error:
        bench.empty_cache()
        return not_available(first_line(error))
