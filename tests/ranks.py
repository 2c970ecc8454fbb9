"""Run a test body on several ranks: processes on this machine, gloo on CPU, a rendezvous file, errors that name their rank."""

import multiprocessing
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A server process imports these once and forks every rank from itself: a rank starts in 0.1 s instead of 3.
PRELOAD = ["torch", "torch.distributed.device_mesh", "tests.ranks"]


def run_ranks(
    num_ranks: int,
    fn: Callable[[int, Any], Any],
    cases: Sequence[Any],
    tmp_path: Path,
    *,
    timeout: timedelta = timedelta(seconds=60),
) -> list[list[Any]]:
    """Call fn(rank, case) for every case on every rank, in one start; returns results[case][rank].

    `fn` must be importable, cases and results must pickle. The first error of any rank ends all ranks and is raised
    here with the rank, the case and the traceback. Warnings are errors there too.
    """
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    mp.start_processes(_rank_main, (num_ranks, fn, cases, folder, timeout), num_ranks, start_method="forkserver")
    by_rank = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(num_ranks)]
    return [list(of_case) for of_case in zip(*by_rank, strict=True)]


def _rank_main(
    rank: int, num_ranks: int, fn: Callable[[int, Any], Any], cases: Sequence[Any], folder: Path, timeout: timedelta
) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=num_ranks, timeout=timeout)
    results = []
    try:
        for case in cases:
            try:
                results.append(fn(rank, case))
            except Exception as error:
                raise AssertionError(f"rank {rank} of {num_ranks}, case {case}: {error}") from error
        torch.save(results, folder / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()
