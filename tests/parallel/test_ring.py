"""What a rank holds while the ring turns, when transfers start, and how many parts round: the ring beyond its result."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel import shards
from parallel.attention import TORCH_EXCHANGE, SequenceLayout
from parallel.shards import SequencePlan
from tests.parallel.masked import MaskedKernels
from tests.parallel.memory import LiveBytes
from tests.parallel.worlds import ByteCount, seeded, small_mesh
from tests.ranks import run_ranks

HEADS, HEAD_DIM = 2, 16
SLACK = 512  # bytes of the numbers that the kernels below return


@dataclass(frozen=True)
class WeightlessKernels(MaskedKernels):
    """Kernels whose results take no memory, so that what is left is what the layout itself holds."""

    log: list[str] = field(default_factory=list)

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.log.append("attend")
        return q.new_zeros(1).expand(q.shape), q.new_zeros(1).expand(q.shape[:3])

    def local(self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int) -> tuple[Tensor, Tensor]:
        return self.dense(q, k, v)

    def rest(self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int) -> tuple[Tensor, Tensor]:
        return self.dense(q, k, v)

    def dual(
        self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int, *, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return self.local(q, k, v, q_start, k_start), self.rest(q, k, v, q_start, k_start)

    def merge_into(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        """Nothing: what is merged here takes no memory."""


def make_layout(tokens: int, ring: int) -> SequenceLayout:
    return SequenceLayout(
        mesh=small_mesh(ring=ring),
        plan=SequencePlan(tokens=tokens, heads=HEADS, ring=ring, ulysses=1),
        exchange=TORCH_EXCHANGE,
        trace=ByteCount().trace(),
    )


def own_shards(layout: SequenceLayout, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    whole = seeded(3, 1, layout.plan.tokens, HEADS, HEAD_DIM, dtype=dtype)
    return [layout.shard_tokens(x, dim=1).contiguous() for x in whole]


def check_memory(rank: int, frames: int) -> None:
    """Beyond the q, k, v handed in: the halo, and two buffers of the largest block; nothing grows with the ring."""
    ring = dist.get_world_size(dist.group.WORLD)
    layout, kernels = make_layout(frames, ring), WeightlessKernels(frames=frames, frame_tokens=1, window=5)
    q, k, v = own_shards(layout)
    halo = shards.length(kernels.halo(*layout.ring_shard))
    block = max(shards.length(span) for span in layout.plan.ring_shards)
    own = shards.length(layout.ring_shard)
    expected: dict[shards.Mode, int] = {
        "local": halo,
        "global": block + max(own, block if ring > 2 else 0),  # own keys, packed, until they are sent
        "dual": halo + min(2, ring - 1) * block,
    }
    for mode, tokens in expected.items():
        with LiveBytes() as live:
            layout.branches(q, k, v, mode, kernels)
        assert 0 <= live.peak - tokens * 2 * HEADS * HEAD_DIM * 8 <= SLACK, f"{mode}, {live.peak} bytes"


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rank_holds_its_halo_and_two_blocks(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(num_ranks, check_memory, [40, 43], tmp_path)


def test_live_bytes_counts_what_is_kept() -> None:
    """The counter itself, on buffers that are kept, freed and viewed."""
    with LiveBytes() as live:
        first = torch.empty(100, dtype=torch.uint8)
        second = torch.empty(100, dtype=torch.uint8)[:50]
        assert (live.peak, live.largest) == (200, 100)
        del second
        third = torch.empty(60, dtype=torch.uint8)
        assert live.peak == 200
        fourth = torch.empty(60, dtype=torch.uint8)
    assert live.peak == first.numel() + third.numel() + fourth.numel() == 220


def record_order(rank: int, mode: shards.Mode) -> list[str]:
    """Transfers started and kernels called, in order."""
    layout, kernels = make_layout(12, 4), WeightlessKernels(frames=12, frame_tokens=1, window=3)
    batch: Callable[..., Any] = dist.batch_isend_irecv

    def log_and_send(ops: list[dist.P2POp]) -> Any:
        kernels.log.append("send")
        return batch(ops)

    with mock.patch.object(dist, "batch_isend_irecv", log_and_send):
        layout.branches(*own_shards(layout), mode, kernels)
    return kernels.log


def test_the_next_transfer_is_under_way_before_a_block_is_attended(tmp_path: Path) -> None:
    for_global, for_dual = run_ranks(4, record_order, ["global", "dual"], tmp_path)
    assert for_global == [["send", "attend"] * 3 + ["attend"]] * 4
    for order in for_dual:
        assert order[:5] == ["send", "send", "attend", "attend", "send"]  # halo, ring; local, rest; ring


def check_rounding(rank: int, dtype: torch.dtype) -> tuple[float, float]:
    """Error of a ring of four, and of the same kernel on the whole sequence, against fp64."""
    layout, kernels = make_layout(48, 4), UpcastKernels(frames=48, frame_tokens=1, window=9)
    o_global = seeded(3, 1, 48, HEADS, HEAD_DIM, dtype=dtype)
    exact, _ = MaskedKernels(frames=48, frame_tokens=1, window=9).dense(*o_global.double())
    one, _ = kernels.dense(*o_global)
    _, ring = layout.branches(*own_shards(layout, dtype), "dual", kernels)
    assert ring is not None
    assert ring.dtype == dtype
    mine = layout.shard_tokens(exact, dim=1)
    return (
        float((ring.double() - mine).square().mean().sqrt()),
        float((layout.shard_tokens(one, dim=1).double() - mine).square().mean().sqrt()),
    )


class UpcastKernels(MaskedKernels):
    """Low-precision kernels: out in the dtype of q, all else in fp32."""

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().dense(q.float(), k.float(), v.float())
        return out.to(q.dtype), lse

    def local(self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int) -> tuple[Tensor, Tensor]:
        out, lse = super().local(q.float(), k.float(), v.float(), q_start, k_start)
        return out.to(q.dtype), lse

    def rest(self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int) -> tuple[Tensor, Tensor]:
        out, lse = super().rest(q.float(), k.float(), v.float(), q_start, k_start)
        return out.to(q.dtype), lse

    def merge_into(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        assert out.dtype == lse.dtype, "what is merged so far was rounded to the dtype of q"
        super().merge_into(out, lse, part.float(), part_lse)


def test_a_ring_in_bf16_errs_at_most_twice_as_much_as_one_device(tmp_path: Path) -> None:
    for by_rank in run_ranks(4, check_rounding, [torch.bfloat16, torch.float32], tmp_path):
        for ring, one in by_rank:
            assert ring <= 2 * one


def refuse(rank: int, case: None) -> None:
    layout = make_layout(12, 2)
    q, k, v = own_shards(layout)
    with pytest.raises(ValueError, match="a plan for ring 1 x ulysses 2 on a mesh of ring 2 x ulysses 1"):
        replace(layout, plan=replace(layout.plan, ring=1, ulysses=2))
    with pytest.raises(ValueError, match=r"q \(1, 5, 2, 16\) is not \[B, 6, 2, D\] of tokens"):
        layout.scatter(q[:, :5], k, v)
    with pytest.raises(ValueError, match=r"dim 1 of \(1, 6, 2, 16\) is not the planned sequence of 12 tokens"):
        layout.shard_tokens(q, dim=1)
    with pytest.raises(ValueError, match=r"the windows cover tokens \(0, 11\) of a sequence planned with 12 tokens"):
        layout.branches(q, k, v, "dual", MaskedKernels(frames=11, frame_tokens=1, window=3))


def test_tensors_and_windows_of_another_plan_are_refused(tmp_path: Path) -> None:
    run_ranks(2, refuse, [None], tmp_path)
