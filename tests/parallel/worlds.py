"""What the bodies that run on ranks share: meshes of small worlds, seeded tensors, bytes counted at torch.distributed."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import ALL_GATHER, CollectiveTrace
from parallel.mesh import SeqMesh, build_mesh
from tests.ranks import PATIENCE

CPU = torch.device("cpu")


def small_mesh(*, cfg: int = 1, ring: int = 1, ulysses: int = 1, timeout: timedelta = PATIENCE) -> SeqMesh:
    """A mesh on CPU."""
    return build_mesh(cfg=cfg, ring=ring, ulysses=ulysses, device=CPU, timeout=timeout)


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same random tensor on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@dataclass
class ByteCount:
    """An observer: bytes sent by kind, as the collectives report them."""

    sent: Counter[str] = field(default_factory=Counter)

    def __call__(self, kind: str, num_bytes: int) -> None:
        self.sent[kind] += num_bytes

    def trace(self, label: str = "test") -> CollectiveTrace:
        return CollectiveTrace(label=label, on_bytes=self)


@contextmanager
def bytes_at_torch() -> Iterator[Counter[str]]:
    """Bytes handed to torch.distributed for other ranks, by function, whatever the collectives report."""
    sent: Counter[str] = Counter()
    all_to_all, all_gather, batch = dist.all_to_all_single, getattr(dist, ALL_GATHER), dist.batch_isend_irecv
    broadcast = dist.broadcast

    def count_all_to_all(
        out: Tensor, x: Tensor, out_splits: Any, in_splits: Sequence[int], *, group: Any, async_op: bool
    ) -> Any:
        others = sum(in_splits) - in_splits[dist.get_rank(group)]
        sent["all_to_all_single"] += others * x.element_size()
        return all_to_all(out, x, out_splits, in_splits, group=group, async_op=async_op)

    def count_all_gather(out: Tensor, x: Tensor, *, group: Any) -> Any:
        sent["all_gather"] += x.nbytes * (dist.get_world_size(group) - 1)
        return all_gather(out, x, group=group)

    def count_batch(ops: list[dist.P2POp]) -> Any:
        sent["batch_isend_irecv"] += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return batch(ops)

    def count_broadcast(x: Tensor, *, group: Any, group_src: int) -> Any:
        others = dist.get_world_size(group) - 1
        sent["broadcast"] += x.nbytes * others if dist.get_rank(group) == group_src else 0
        return broadcast(x, group=group, group_src=group_src)

    with (
        mock.patch.object(dist, "broadcast", count_broadcast),
        mock.patch.object(dist, "all_to_all_single", count_all_to_all),
        mock.patch.object(dist, ALL_GATHER, count_all_gather),
        mock.patch.object(dist, "batch_isend_irecv", count_batch),
    ):
        yield sent
