"""The interface of xfuser 0.7.0 and yunchang 0.6.4 that parallel/xfuser.py uses, recorded, computed in plain torch on a CPU.

Names, signatures and where the process groups come from are theirs. What is computed is full attention over both groups.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ProcessGroupSingleton:
    """yunchang.globals: None until someone sets them."""

    def __init__(self) -> None:
        self.ULYSSES_PG: Any = None
        self.RING_PG: Any = None


class AttnType(Enum):
    """yunchang.kernels.AttnType, which xfuser.core.long_ctx_attention passes on."""

    AITER = "aiter"
    FA = "fa"
    FA3 = "fa3"
    FLASHINFER = "flashinfer"
    TORCH_MATH = "torch_math"
    TORCH_FLASH = "torch_flash"
    TORCH_EFFICIENT = "torch_efficient"
    TORCH_CUDNN = "torch_cudnn"
    SAGE_AUTO = "sage_auto"
    SAGE_FP16 = "sage_fp16"
    SAGE_FP16_TRITON = "sage_fp16_triton"
    SAGE_FP8 = "sage_fp8"
    SAGE_FP8_SM90 = "sage_fp8_sm90"
    SPARSE_SAGE = "sparse_sage"
    NPU = "npu"


PROCESS_GROUP = ProcessGroupSingleton()


class xFuserLongContextAttention(nn.Module):  # noqa: N801 - its name
    """Reads the groups once, when it is made."""

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        scatter_idx: int = 2,
        gather_idx: int = 1,
        ring_impl_type: str = "basic",
        use_pack_qkv: bool = False,
        use_kv_cache: bool = False,
        use_sync: bool = False,
        attn_type: Any = None,
        attn_processor: Any = None,
        q_descale: Any = None,
        k_descale: Any = None,
        v_descale: Any = None,
    ) -> None:
        super().__init__()
        self.attn_type = AttnType.FA if attn_type is None else attn_type
        self.ulysses_pg, self.ring_pg = PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG
        assert self.ulysses_pg is not None or self.ring_pg is not None, "use set_seq_parallel_pg() first"

    def forward(  # noqa: PLR0913
        self,
        attn: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        joint_tensor_query: Any = None,
        joint_tensor_key: Any = None,
        joint_tensor_value: Any = None,
        dropout_p: float = 0.0,
        softmax_scale: Any = None,
        causal: bool = False,
        window_size: Any = (-1, -1),
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        joint_strategy: str = "none",
    ) -> Tensor:
        """[B, s, N, D] of this rank's tokens, all of them as many, over both groups."""
        assert attn is None and softmax_scale is None and dropout_p == 0.0 and not causal
        k, v = (gather(gather(x, self.ulysses_pg), self.ring_pg) for x in (key, value))
        logits = torch.einsum("bsnd,btnd->bnst", query, k) / query.shape[-1] ** 0.5
        return torch.einsum("bnst,btnd->bsnd", logits.softmax(-1), v)


def gather(x: Tensor, group: Any) -> Tensor:
    """Tokens of all ranks of a group, which have as many each."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=1)


@contextmanager
def installed(*, without: tuple[str, ...] = ()) -> Iterator[None]:
    """The recorded packages in place of whatever is installed, but for those named; flash-attn is one of them."""
    contents: dict[str, dict[str, Any]] = {
        "xfuser": {},
        "xfuser.core": {},
        "xfuser.core.long_ctx_attention": {
            "xFuserLongContextAttention": xFuserLongContextAttention,
            "AttnType": AttnType,
        },
        "yunchang": {},
        "yunchang.globals": {"PROCESS_GROUP": PROCESS_GROUP},
        "flash_attn": {},
    }
    modules: dict[str, ModuleType | None] = {}
    for name, values in contents.items():
        if name.partition(".")[0] in without:
            modules[name] = None
            continue
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(values)
        modules[name] = module
    with mock.patch.dict(sys.modules, modules):
        yield
