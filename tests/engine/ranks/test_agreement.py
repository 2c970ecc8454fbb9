"""Ranks that agree: one that takes longer than a collective waits, and errors that all of them raise."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from engine.errors import UserError
from engine.ranks.agreement import raise_once_all_end
from engine.ranks.layouts import Ranks
from parallel.mesh import build_mesh
from tests.ranks import run_ranks

TIMEOUT = timedelta(seconds=4)
LATE_SECONDS = 8.0


def load(rank: int, case: tuple[str, str | None]) -> list[str]:
    """Three loads, in which rank 0 takes long once, and rank 1 fails once; what each rank has of them."""
    what, file = case
    mesh = build_mesh(cfg=1, ring=1, ulysses=2, device=torch.device("cpu"), timeout=TIMEOUT)
    ranks = Ranks(mesh=mesh, store=None if file is None else dist.FileStore(file, 2))

    def act(index: int) -> str:
        if (rank, index) == (0, 1):
            time.sleep(LATE_SECONDS)
        if (rank, index) == (1, 2):
            raise UserError("no such file")
        return f"{what} {index}"

    found = [raise_once_all_end(ranks, lambda index=index: act(index), what) for index in range(2)]
    with pytest.raises(UserError) as caught:
        raise_once_all_end(ranks, lambda: act(2), what)
    return [*found, str(caught.value)]


def test_a_rank_may_load_for_longer_than_a_collective_waits(tmp_path: Path) -> None:
    expected = ["weights 0", "weights 1", "rank 1: no such file"]
    [found] = run_ranks(2, load, [("weights", str(tmp_path / "store"))], tmp_path, timeout=TIMEOUT)
    assert found == [expected, expected]


def test_without_a_store_it_may_not(tmp_path: Path) -> None:
    """The negative control: the other rank's collective ends after its timeout."""
    with pytest.raises(mp.ProcessRaisedException, match="rank 1, agreement at start: "):
        run_ranks(2, load, [("weights", None)], tmp_path, timeout=TIMEOUT)
