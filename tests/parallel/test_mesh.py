"""Meshes of small worlds: who is where, which groups there are, and what is refused."""

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch import Tensor

from tests.parallel.worlds import small_mesh
from tests.ranks import run_ranks

DEGREES = {
    1: [(1, 1, 1)],
    2: [(1, 1, 2), (1, 2, 1), (2, 1, 1)],
    8: [(2, 2, 2), (1, 4, 2), (1, 1, 8)],
}


def check_mesh(rank: int, degrees: tuple[int, int, int]) -> None:
    cfg, ring, ulysses = degrees
    mesh = small_mesh(cfg=cfg, ring=ring, ulysses=ulysses)
    at = dict(zip(itertools.product(range(cfg), range(ring), range(ulysses)), range(cfg * ring * ulysses), strict=True))
    here = next(place for place, number in at.items() if number == rank)
    assert (mesh.cfg.rank, mesh.ring.rank, mesh.ulysses.rank) == here
    assert mesh.cfg.ranks == tuple(at[c, here[1], here[2]] for c in range(cfg))
    assert mesh.ring.ranks == tuple(at[here[0], r, here[2]] for r in range(ring))
    assert mesh.ulysses.ranks == tuple(at[here[0], here[1], u] for u in range(ulysses))
    assert mesh.sequence.ranks == tuple(at[here[0], r, u] for r in range(ring) for u in range(ulysses))
    assert mesh.sequence.rank == mesh.ring.rank * ulysses + mesh.ulysses.rank
    assert mesh.alone.ranks == (rank,)
    assert mesh.world.ranks == tuple(at.values())
    for axis in (mesh.cfg, mesh.ring, mesh.ulysses, mesh.sequence, mesh.alone, mesh.world):
        assert tuple(dist.get_process_group_ranks(axis.group)) == axis.ranks
        assert (dist.get_rank(axis.group), axis.size) == (axis.rank, len(axis.ranks))
    for name in ("cfg", "ring", "ulysses"):
        assert mesh.device_mesh.get_group(name) is getattr(mesh, name).group
    flat = mesh.on_shards()
    assert (flat.ring, flat.ulysses, flat.sequence) == (mesh.sequence, mesh.alone, mesh.sequence)


@pytest.mark.parametrize("num_ranks", DEGREES)
def test_every_rank_is_where_the_mesh_says(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(num_ranks, check_mesh, DEGREES[num_ranks], tmp_path)


def groups_made(rank: int, degrees: tuple[int, int, int]) -> tuple[list[list[int]], int]:
    """The ranks of every group that this rank makes, and in how many collectives it takes part."""
    made, calls = [], 0
    new_group, all_reduce = dist.new_group, dist.all_reduce

    def record(ranks: list[int], **settings: Any) -> dist.ProcessGroup:
        made.append(ranks)
        return new_group(ranks, **settings)

    def count(x: Tensor, *, group: dist.ProcessGroup) -> None:
        nonlocal calls
        assert dist.get_world_size(group) > 1
        calls += 1
        all_reduce(x, group=group)

    with mock.patch.object(dist, "new_group", record), mock.patch.object(dist, "all_reduce", count):
        small_mesh(cfg=degrees[0], ring=degrees[1], ulysses=degrees[2])
    return made, calls


def test_a_rank_makes_no_other_rank_s_group_of_one_and_uses_its_own_for_nothing(tmp_path: Path) -> None:
    """On NCCL a group that communicates has a communicator, which takes memory of the device and time at the start."""
    [ring, hybrid] = run_ranks(4, groups_made, [(1, 4, 1), (1, 2, 2)], tmp_path)
    for rank in range(4):
        assert ring[rank] == ([[rank], [0, 1, 2, 3]], 3)  # ring, sequence and world meet in one group
        assert hybrid[rank] == ([[rank], [0, 2], [1, 3], [0, 1], [2, 3], [0, 1, 2, 3]], 4)
    [[alone]] = run_ranks(1, groups_made, [(1, 1, 1)], tmp_path)
    assert alone == ([[0]], 0)


def refuse_mesh(rank: int, case: tuple[int, int, int]) -> None:
    cfg, ring, ulysses = case
    with pytest.raises(ValueError, match=rf"cannot arrange 2 ranks as cfg {cfg} x ring {ring} x ulysses {ulysses} = "):
        small_mesh(cfg=cfg, ring=ring, ulysses=ulysses)


def test_degrees_that_do_not_make_the_world_are_refused(tmp_path: Path) -> None:
    run_ranks(2, refuse_mesh, [(2, 2, 1), (1, 1, 1), (-1, -2, 1)], tmp_path)
