"""Each collective against slicing the whole tensor, bit for bit, with uneven and empty shares; and seen to fail when broken."""

import itertools
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel import collectives, shards
from parallel.collectives import ALL_GATHER, CollectiveError
from tests.parallel.masked import MaskedKernels
from tests.parallel.worlds import ByteCount, bytes_at_torch, seeded, small_mesh
from tests.ranks import run_ranks

WORLDS = (1, 2, 3, 4, 8)
SOON = timedelta(seconds=15)  # ranks that have just met are not so far apart


@dataclass(frozen=True)
class Case:
    """Whole tensors [batch, tokens, heads, 2] to move around."""

    tokens: int
    heads: int
    batch: int = 1
    dtype: torch.dtype = torch.float64


CASES = [
    Case(tokens=24, heads=8),  # even on every world but 3
    Case(tokens=13, heads=5, batch=2),
    Case(tokens=7, heads=12, dtype=torch.bfloat16),
    Case(tokens=2, heads=3),  # ranks without tokens
    Case(tokens=9, heads=1, batch=2, dtype=torch.bfloat16),  # ranks without heads
    Case(tokens=1, heads=1),
]


@dataclass
class World:
    """One group, what this rank owns in a case, and the observer of what it sends."""

    group: dist.ProcessGroup
    case: Case
    count: ByteCount

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def tokens(self) -> tuple[shards.Range, ...]:
        return shards.split_ranges(self.case.tokens, self.size)

    @property
    def heads(self) -> tuple[shards.Range, ...]:
        return shards.split_ranges(self.case.heads, self.size)

    @property
    def token_sizes(self) -> list[int]:
        return [shards.length(span) for span in self.tokens]

    @property
    def head_sizes(self) -> list[int]:
        return [shards.length(span) for span in self.heads]

    def whole(self, seed: int) -> Tensor:
        return seeded(self.case.batch, self.case.tokens, self.case.heads, 2, seed=seed, dtype=self.case.dtype)

    def my_tokens(self, x: Tensor) -> Tensor:
        return x[:, slice(*self.tokens[self.rank])]

    def my_heads(self, x: Tensor) -> Tensor:
        return x[:, :, slice(*self.heads[self.rank])]


def worlds(cases: list[Case]) -> list[World]:
    group = small_mesh(ring=dist.get_world_size(dist.group.WORLD)).ring.group
    return [World(group=group, case=case, count=ByteCount()) for case in cases]


def all_to_all_round_trip(world: World) -> bool:
    wholes = [world.whole(seed) for seed in range(3)]
    sizes = {"token_sizes": world.token_sizes, "head_sizes": world.head_sizes}
    link = {"group": world.group, "trace": world.count.trace()}
    inner = collectives.tokens_to_heads([world.my_tokens(x) for x in wholes], **sizes, **link)
    there = all(torch.equal(got, world.my_heads(x)) for got, x in zip(inner, wholes, strict=True))
    back = [collectives.heads_to_tokens(x, **sizes, **link) for x in inner]
    return there and all(torch.equal(got, world.my_tokens(x)) for got, x in zip(back, wholes, strict=True))


def started_early(world: World) -> bool:
    """One tensor on its way while another goes there and back."""
    first, other = world.whole(0), world.whole(1)
    sizes = {"token_sizes": world.token_sizes, "head_sizes": world.head_sizes}
    link = {"group": world.group, "trace": world.count.trace()}
    wait = collectives.start_tokens_to_heads(world.my_tokens(first), **sizes, **link)
    (between,) = collectives.tokens_to_heads([world.my_tokens(other)], **sizes, **link)
    back = collectives.heads_to_tokens(between, **sizes, **link)
    return torch.equal(wait(), world.my_heads(first)) and torch.equal(back, world.my_tokens(other))


def gather(world: World) -> bool:
    whole = world.whole(0)
    mine = world.my_tokens(whole)
    link = {"group": world.group, "trace": world.count.trace()}
    return torch.equal(collectives.gather_tokens(mine, token_sizes=world.token_sizes, **link), whole)


def copies(world: World) -> bool:
    mine = world.whole(world.rank).transpose(1, 2)
    got = collectives.gather_copies(mine, "cfg", group=world.group, trace=world.count.trace())
    return [torch.equal(x, world.whole(rank).transpose(1, 2)) for rank, x in enumerate(got)] == [True] * world.size


def broadcast(world: World) -> bool:
    right = True
    for source in range(world.size):
        mine = world.whole(world.rank)
        got = collectives.broadcast(mine, source=source, group=world.group, trace=world.count.trace())
        right = right and torch.equal(got, world.whole(source))
    return right


def collecting(world: World) -> bool:
    parts = [world.whole(0)[:, slice(*span)].flatten() for span in world.tokens]
    sizes = [part.numel() for part in parts]
    right = True
    for target in range(world.size):
        got = collectives.collect(
            parts[world.rank], sizes=sizes, target=target, group=world.group, trace=world.count.trace()
        )
        expected = parts if world.rank == target else []
        right = right and [torch.equal(*pair) for pair in zip(got, expected, strict=True)] == [True] * len(expected)
    return right


def ordered_sum(world: World) -> bool:
    parts = [world.whole(rank) for rank in range(world.size)]
    expected = parts[0]
    for part in parts[1:]:
        expected = expected + part
    got = collectives.sum_over_ranks(parts[world.rank], group=world.group, trace=world.count.trace())
    return torch.equal(got, expected)


def halo(world: World) -> bool:
    k, v = world.whole(0), world.whole(1)
    right = True
    for window in (1, 2, 5, world.case.tokens):
        kernels = MaskedKernels(frames=world.case.tokens, frame_tokens=1, window=window)
        needed = shards.halo_needs(world.tokens, kernels.halo, world.case.tokens)
        kv = collectives.exchange_halo(
            world.my_tokens(k),
            world.my_tokens(v),
            owned=world.tokens,
            needed=needed,
            group=world.group,
            trace=world.count.trace(),
        )
        got_k, got_v = collectives.unpack_keys(kv)
        span = slice(*needed[world.rank])
        right = right and torch.equal(got_k, k[:, span]) and torch.equal(got_v, v[:, span])
    return right


def ring(world: World) -> bool:
    k, v = world.whole(0), world.whole(1)
    own = collectives.pack_keys(world.my_tokens(k), world.my_tokens(v))
    shift = collectives.RingShift(own, sizes=world.token_sizes, group=world.group, trace=world.count.trace())
    owners, right = [], True
    for owner, kv in shift:
        owners.append(owner)
        got_k, got_v = collectives.unpack_keys(kv)
        span = slice(*world.tokens[owner])
        right = right and torch.equal(got_k, k[:, span]) and torch.equal(got_v, v[:, span])
    return right and tuple(owners) == shards.ring_order(world.rank, world.size)


Movement = Callable[[World], bool]
MOVEMENTS: list[Movement] = [
    all_to_all_round_trip,
    started_early,
    gather,
    copies,
    broadcast,
    collecting,
    ordered_sum,
    halo,
    ring,
]


def check_movements(rank: int, cases: list[Case]) -> None:
    for world, move in itertools.product(worlds(cases), MOVEMENTS):
        with bytes_at_torch() as sent:
            world.count.sent.clear()
            assert move(world), f"{move.__name__} of {world.case}"
            assert world.count.sent.total() == sent.total(), f"bytes of {move.__name__}: {world.count.sent}, {sent}"


@pytest.mark.parametrize("num_ranks", WORLDS)
def test_data_arrives_bit_for_bit_and_is_counted(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(num_ranks, check_movements, [CASES], tmp_path)


def sums_differ_between_ranks(rank: int, dtype: torch.dtype) -> Tensor:
    """Values whose sum depends on the order of addition."""
    world = worlds([Case(tokens=50, heads=3, dtype=dtype)])[0]
    mine = world.whole(world.rank) * 10.0 ** (4 * world.rank)
    return collectives.sum_over_ranks(mine, group=world.group, trace=world.count.trace())


def test_a_sum_has_the_same_bits_on_every_rank(tmp_path: Path) -> None:
    for sums in run_ranks(4, sums_differ_between_ranks, [torch.float32, torch.float64], tmp_path):
        assert all(torch.equal(sums[0], other) for other in sums[1:])


# Negative controls: each breaks one collective below the tests' eyes, and the comparison above must notice.


def skip_all_to_all(out: Tensor, x: Tensor, *splits: object, **_: object) -> SimpleNamespace:
    out.copy_(x)
    return SimpleNamespace(wait=lambda: None)


def shift_by_one_token(out: Tensor, x: Tensor, *, group: dist.ProcessGroup) -> None:
    getattr(dist.distributed_c10d, ALL_GATHER)(out, x.roll(1, dims=-3), group=group)


def forget_the_others(out: Tensor, x: Tensor, *, group: dist.ProcessGroup) -> None:
    out.zero_()
    out.view(-1, *x.shape)[dist.get_rank(group)].copy_(x)


def keep_to_oneself(x: Tensor, **_: object) -> None:
    """Neither send nor receive."""


def drop_a_row(ops: list[dist.P2POp]) -> list[dist.Work]:
    """Clear the first token of each message that is sent."""
    for op in ops:
        if op.op is dist.isend:
            op.tensor = op.tensor.clone()
            op.tensor[0] = 0
    return dist.distributed_c10d.batch_isend_irecv(ops)


CONTROLS: list[tuple[Movement, str, Callable[..., object]]] = [
    (all_to_all_round_trip, "all_to_all_single", skip_all_to_all),
    (started_early, "all_to_all_single", skip_all_to_all),
    (gather, ALL_GATHER, shift_by_one_token),
    (copies, ALL_GATHER, shift_by_one_token),
    (broadcast, "broadcast", keep_to_oneself),
    (collecting, "batch_isend_irecv", drop_a_row),
    (ordered_sum, ALL_GATHER, forget_the_others),
    (halo, "batch_isend_irecv", drop_a_row),
    (ring, "batch_isend_irecv", drop_a_row),
]


def break_movements(rank: int, case: Case) -> list[bool]:
    world = worlds([case])[0]
    results = []
    for move, name, broken in CONTROLS:
        with mock.patch.object(dist, name, broken):
            results.append(move(world))
    return results


def test_broken_collectives_are_noticed(tmp_path: Path) -> None:
    (by_rank,) = run_ranks(2, break_movements, [Case(tokens=24, heads=8)], tmp_path)
    for (move, _, broken), results in zip(CONTROLS, zip(*by_rank, strict=True), strict=True):
        assert not any(results), f"{broken.__name__} passed as {move.__name__}"


def fail_alone(rank: int, how: str) -> str | None:
    """Rank 0 calls a collective that rank 1 does not join, because it is busy elsewhere or dead."""
    dist.barrier(dist.group.WORLD)
    mesh = small_mesh(ring=2, timeout=SOON)
    if rank == 1:
        if how == "dead":
            os._exit(0)  # as if killed, but an exit code of 0, or the launcher of the test would end rank 0 too
        dist.barrier(dist.group.WORLD)
        return None
    trace = ByteCount().trace("step 3 layer 7")
    x = torch.ones(1, 2, 1, 1)
    calls: dict[str, Callable[[], object]] = {
        "late": lambda: collectives.sum_over_ranks(x, group=mesh.ring.group, trace=trace),
        "dead": lambda: next(
            collectives.RingShift(collectives.pack_keys(x, x), sizes=[2, 2], group=mesh.ring.group, trace=trace)
        ),
    }
    with pytest.raises(CollectiveError, match=r"rank 0, step 3 layer 7: .* among ranks \[0, 1\] failed: ") as caught:
        calls[how]()
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.rank, error.label, str(error)) == (0, "step 3 layer 7", str(caught.value))
    if how == "late":
        # The timeout of the mesh, not that of the world.
        assert f"{SOON.total_seconds() * 1000:.0f}ms" in str(error), error
        dist.barrier(dist.group.WORLD)
    return error.operation


def test_a_late_peer_raises_one_error_that_names_rank_label_and_operation(tmp_path: Path) -> None:
    assert run_ranks(2, fail_alone, ["late"], tmp_path) == [["all-gather (reduce)", None]]


def test_a_dead_peer_raises_the_same_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="rank1"):  # rank 0 got through its checks, rank 1 has no result
        run_ranks(2, fail_alone, ["dead"], tmp_path)


def miss_the_start(rank: int, case: None) -> None:
    if rank == 0:
        with pytest.raises(CollectiveError, match="rank 0, start, ring axis: meeting among ranks"):
            small_mesh(ring=2, timeout=SOON)
    else:
        with mock.patch("parallel.mesh.barrier", lambda **_: None):
            small_mesh(ring=2, timeout=SOON)
    dist.barrier(dist.group.WORLD)


def test_a_peer_missing_at_the_start_is_named(tmp_path: Path) -> None:
    run_ranks(2, miss_the_start, [None], tmp_path)
