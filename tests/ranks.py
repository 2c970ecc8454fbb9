"""Run a test body on several ranks: processes on this machine, gloo on CPU, a rendezvous file, errors that name their rank."""

import faulthandler
import functools
import multiprocessing
import signal
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from parallel.mesh import Axis

# A server process imports these once and forks every rank from itself: a rank starts in 0.1 s instead of 3.
# torch._dynamo is what a TorchDispatchMode imports on its first call.
PRELOAD = [
    "pytest",
    "torch",
    "torch.distributed.device_mesh",
    "torch._dynamo",
    "tests.ranks",
    "launch.commands.generate",
]
# No test fails because a machine is slow: these only end what hangs, first a collective, then a rank with its stacks, then pytest's limit.
PATIENCE = timedelta(seconds=300)
CASE_SECONDS = 600


def run_ranks(
    num_ranks: int,
    fn: Callable[[int, Any], Any],
    cases: Sequence[Any],
    tmp_path: Path,
    *,
    timeout: timedelta = PATIENCE,
    case_seconds: float = CASE_SECONDS,
) -> list[list[Any]]:
    """Call fn(rank, case) for every case on every rank, in one start; returns results[case][rank].

    `fn` must be importable, cases and results must pickle. The first error of any rank ends all ranks and is raised
    here with the rank, the case and the traceback. Warnings are errors there too. A case of more than `case_seconds`
    is an error as well. The error has a note with the stacks of every rank that was still running: one that hangs is often
    ended because the others lost patience in a collective.
    """
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    job = _Job(num_ranks=num_ranks, fn=fn, cases=cases, folder=folder, timeout=timeout, case_seconds=case_seconds)
    try:
        mp.start_processes(_rank_main, (job,), num_ranks, start_method="forkserver")
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
        for file in sorted(folder.glob("*.stacks")):
            if file.stat().st_size:
                error.add_note(f"{file.name}:\n{file.read_text()}")
        raise
    by_rank = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(num_ranks)]
    return [list(of_case) for of_case in zip(*by_rank, strict=True)]


@dataclass(frozen=True, kw_only=True)
class _Job:
    num_ranks: int
    fn: Callable[[int, Any], Any]
    cases: Sequence[Any]
    folder: Path
    timeout: timedelta
    case_seconds: float


def _rank_main(rank: int, job: _Job) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    stacks = (job.folder / f"rank{rank}.stacks").open("w")
    faulthandler.dump_traceback_later(job.case_seconds, exit=True, file=stacks)
    faulthandler.register(signal.SIGTERM, file=stacks, chain=True)  # how another rank's error ends this one
    rendezvous = f"file://{job.folder / 'rendezvous'}"
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=job.num_ranks, timeout=job.timeout)
    results = []
    try:
        for case in job.cases:
            faulthandler.dump_traceback_later(job.case_seconds, exit=True, file=stacks)
            try:
                results.append(job.fn(rank, case))
            except Exception as error:
                raise AssertionError(f"rank {rank} of {job.num_ranks}, case {case}: {error}") from error
        torch.save(results, job.folder / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@functools.cache
def first_ranks(sizes: tuple[int, ...]) -> dict[int, Axis]:
    """An axis of the first P ranks for each P; every rank makes all of the groups, and belongs to some."""
    rank = dist.get_rank()
    groups = {size: dist.new_group(list(range(size))) for size in sizes}
    return {
        size: Axis(name="world", group=group, ranks=tuple(range(size)), rank=rank)
        for size, group in groups.items()
        if rank < size
    }
