"""Meshes of small worlds: who is where, which groups there are, and what is refused."""

import itertools
from pathlib import Path

import pytest
import torch.distributed as dist

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


def refuse_mesh(rank: int, case: tuple[int, int, int]) -> None:
    cfg, ring, ulysses = case
    with pytest.raises(ValueError, match=rf"cannot arrange 2 ranks as cfg {cfg} x ring {ring} x ulysses {ulysses} = "):
        small_mesh(cfg=cfg, ring=ring, ulysses=ulysses)


def test_degrees_that_do_not_make_the_world_are_refused(tmp_path: Path) -> None:
    run_ranks(2, refuse_mesh, [(2, 2, 1), (1, 1, 1), (-1, -2, 1)], tmp_path)
