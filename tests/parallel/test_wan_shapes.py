"""Wan at 321 frames over 8 ranks, on fake tensors: what a rank allocates in each layout, without computing anything."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel import shards
from parallel.attention import TORCH_EXCHANGE, SequenceLayout
from parallel.shards import LayerShape, SequencePlan
from tests.parallel.memory import LiveBytes
from tests.parallel.worlds import ByteCount, small_mesh

FRAMES, FRAME_TOKENS, WINDOW, HEAD_DIM = 81, 1560, 21, 128
TOKENS = FRAMES * FRAME_TOKENS
RANK = 3  # one with neighbours on both sides


class ShapeKernels:
    """Results of the right shape; windows as in the method."""

    def halo(self, q_start: int, q_stop: int) -> tuple[int, int]:
        if q_start == q_stop:
            return 0, 0
        first, last = (
            min(max(token // FRAME_TOKENS - WINDOW // 2, 0), FRAMES - WINDOW) for token in (q_start, q_stop - 1)
        )
        return first * FRAME_TOKENS, (last + WINDOW) * FRAME_TOKENS

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert k.shape == v.shape
        assert k.shape[2:] == q.shape[2:]
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.dense(q, k, v)[0]

    def far(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.dense(q, k, v)

    def local(self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int) -> tuple[Tensor, Tensor]:
        assert (k_start, k_start + k.shape[1]) == self.halo(q_start, q_start + q.shape[1])
        return self.dense(q, k, v)

    def dual(
        self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int, *, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        out, lse = self.dense(q, k, v)
        return self.local(q, k, v, q_start, k_start), (out.to(dtype), lse)

    def merge_into(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        assert out.shape == part.shape
        assert lse.shape == part_lse.shape


@pytest.fixture
def fake_world() -> Iterator[None]:
    """Rank 3 of 8 on torch's fake backend, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=8)
    yield
    dist.destroy_process_group()


DEGREES = [
    (cfg, ring, 8 // cfg // ring) for cfg in (1, 2) for ring in (1, 2, 4, 8) if 8 // cfg % ring == 0
]  # every layout of 8 ranks


@pytest.mark.usefixtures("fake_world")
@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("heads", [12, 40])
@pytest.mark.parametrize("mode", ["dual", "global", "local"])
def test_a_layer_of_wan_has_the_right_shapes_and_no_whole_sequence_on_a_ring(
    mode: shards.Mode, heads: int, degrees: tuple[int, int, int]
) -> None:
    cfg, ring, ulysses = degrees
    count = ByteCount()
    layout = SequenceLayout(
        mesh=small_mesh(cfg=cfg, ring=ring, ulysses=ulysses),
        plan=SequencePlan(tokens=TOKENS, heads=heads, ring=ring, ulysses=ulysses),
        exchange=TORCH_EXCHANGE,
        trace=count.trace(),
    )
    my_heads = shards.length(layout.plan.head_shares[layout.mesh.ulysses.rank])
    with FakeTensorMode(), LiveBytes() as live:
        x = torch.empty(1, shards.length(layout.shard), heads, HEAD_DIM, dtype=torch.bfloat16)
        inner = layout.scatter(x, x, x)
        assert all(part.shape == (1, shards.length(layout.ring_shard), my_heads, HEAD_DIM) for part in inner)
        branches = layout.branches(*inner, mode, ShapeKernels())
        assert [out is not None for out in branches] == [mode != "global", mode != "local"]
        made = [out for out in branches if out is not None]
        assert all(out.shape == inner[0].shape for out in made)
        if mode == "dual":
            grams = torch.empty(2, 1, my_heads, HEAD_DIM, HEAD_DIM, dtype=torch.float64)
            assert layout.reduce(grams).shape == grams.shape
            assert layout.share_heads(torch.add, *grams).shape == grams.shape[1:]
        assert layout.gather(made[0]).shape == x.shape
    whole_kv = TOKENS * 2 * my_heads * HEAD_DIM * 2
    assert (live.largest >= whole_kv) == (ring == 1)  # the sequence of this rank's keys and values, whole in one tensor
    shape = LayerShape(batch=1, head_dim=HEAD_DIM, itemsize=2)
    rank = layout.mesh.sequence.rank
    planned = shards.layer_bytes(layout.plan, rank, mode, shape=shape, halo=ShapeKernels().halo)
    assert +count.sent == +Counter(planned)
