"""DeepSpeed's Ulysses all-to-all as a provider beside torch's own. Even shards and even heads only; an optional extra.

Also quiet imports of DeepSpeed and the start of its communication layer, which every use needs.
"""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import CollectiveTrace, watch
from parallel.shards import SequencePlan, length, refuse_uneven

WHO = "DeepSpeed's all-to-all"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedExchange:
    """parallel.attention.HeadExchange by deepspeed.sequence.layer, passed in as `layer`."""

    layer: ModuleType

    def tokens_to_heads(
        self,
        tensors: Sequence[Tensor],
        *,
        token_sizes: Sequence[int],
        head_sizes: Sequence[int],
        group: dist.ProcessGroup,
        trace: CollectiveTrace,
    ) -> tuple[Tensor, ...]:
        """Each [B, s, N, D] -> [B, r, n, D]: stacked on the batch, as DeepSpeed exchanges one tensor a call."""
        refuse_uneven(WHO, token_sizes, head_sizes)
        stacked = self._exchange(torch.cat(tuple(tensors)), scatter_dim=2, group=group, trace=trace)
        return stacked.chunk(len(tensors))

    def heads_to_tokens(
        self,
        x_BrnD: Tensor,
        *,
        token_sizes: Sequence[int],
        head_sizes: Sequence[int],
        group: dist.ProcessGroup,
        trace: CollectiveTrace,
    ) -> Tensor:
        """[B, r, n, D] -> [B, s, N, D], the inverse."""
        refuse_uneven(WHO, token_sizes, head_sizes)
        return self._exchange(x_BrnD.contiguous(), scatter_dim=1, group=group, trace=trace)

    def _exchange(self, x: Tensor, *, scatter_dim: int, group: dist.ProcessGroup, trace: CollectiveTrace) -> Tensor:
        """Scatter dim 1 (tokens) or 2 (heads) over the group and gather the other one."""
        size = dist.get_world_size(group)
        with watch("all-to-all (deepspeed)", group=group, trace=trace):
            out = self.layer.single_all_to_all(x, scatter_dim, 3 - scatter_dim, 0, group)
        trace.on_bytes("all_to_all", x.nbytes // size * (size - 1))
        return out


def check_deepspeed(plan: SequencePlan) -> ModuleType:
    """Import DeepSpeed's sequence module before process groups exist.

    Raises ImportError without DeepSpeed, and ValueError for shards or heads of a plan that are not even.
    """
    refuse_deepspeed_plan(plan)
    try:
        return quiet_import("deepspeed.sequence.layer")
    except ImportError as error:
        raise ImportError(f"the deepspeed provider needs the optional package deepspeed: {error}") from error


def refuse_deepspeed_plan(plan: SequencePlan) -> None:
    """Raise ValueError for shards or heads of a plan that are not even."""
    refuse_uneven(WHO, [length(shard) for shard in plan.shards], [length(share) for share in plan.head_shares])


def deepspeed_exchange(plan: SequencePlan) -> DeepSpeedExchange:
    """Load DeepSpeed for a plan that passes `check_deepspeed`. Call it after torch.distributed has been initialised.

    DeepSpeed's own communication layer keeps a module-wide backend; given a running process group it adopts that one.
    """
    layer = check_deepspeed(plan)
    start_communication()
    return DeepSpeedExchange(layer=layer)


def start_communication() -> None:
    """Start DeepSpeed's communication layer on the existing process group.

    On a CPU it would first compile a C++ extension, which takes minutes, for an all-reduce that is not used here.
    """
    comm, ops = quiet_import("deepspeed.comm"), quiet_import("deepspeed.ops")
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # In every forward it uses a name that torch 2.13 has deprecated.
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor. is deprecated", category=FutureWarning)
    if not comm.is_initialized():
        with quiet():
            comm.init_distributed(dist_init_required=False, verbose=False)


def quiet_import(name: str) -> ModuleType:
    """Import a module of DeepSpeed without its messages; ImportError if it is not installed."""
    with quiet():
        return importlib.import_module(name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's messages off stdout, which belongs to the commands."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
