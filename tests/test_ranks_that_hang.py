"""The tests' own ranks: one that hangs is ended, and the error has its stacks."""

import time
from datetime import timedelta

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.ranks import run_ranks


def hang(rank: int, others_wait: bool) -> None:
    """Rank 1 sleeps, and rank 0 is done or waits for it."""
    if rank == 1:
        time.sleep(600)
    if others_wait:
        dist.barrier()


@pytest.mark.parametrize(
    ("others_wait", "timeout", "case_seconds", "error"),
    [(False, 200, 15, mp.ProcessExitedException), (True, 15, 200, mp.ProcessRaisedException)],
)
def test_a_rank_that_hangs_is_ended_with_its_stacks(tmp_path, others_wait, timeout, case_seconds, error):
    with pytest.raises(error) as caught:
        run_ranks(2, hang, [others_wait], tmp_path, timeout=timedelta(seconds=timeout), case_seconds=case_seconds)
    assert any(note.startswith("rank1.stacks") and " in hang" in note for note in caught.value.__notes__)
