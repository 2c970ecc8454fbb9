"""xDiT's hybrid attention (xFuserLongContextAttention) in place of scatter, global branch and gather, for comparison.

Even shards and even heads only, and only on CUDA: xfuser raises at import without an accelerator. An optional extra.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from parallel.attention import SequenceLayout
from parallel.collectives import watch
from parallel.mesh import SeqMesh
from parallel.shards import SequencePlan, length, refuse_uneven

# attention.kernel -> its AttnType. `auto` is xfuser's own default, the flash-attn package; the others are torch's operators.
TYPES = {"auto": "FA", "cuda_flash": "TORCH_FLASH", "cuda_cudnn": "TORCH_CUDNN", "cuda_efficient": "TORCH_EFFICIENT"}
# Those whose log-sum-exp a ring can be merged by: for cuDNN's yunchang 0.6 returns zeros, and for the memory-efficient kernel
# rows that are padded to a multiple of 32. Parts merged with either would be silently wrong.
RING_TYPES = ("FA", "TORCH_FLASH")


@dataclass(frozen=True, kw_only=True, slots=True)
class XfuserAttention:
    """Full attention over a mesh by `layer`, a ready xFuserLongContextAttention."""

    layer: Callable[..., Tensor]

    def __call__(self, q_BsND: Tensor, k_BsND: Tensor, v_BsND: Tensor, *, layout: SequenceLayout) -> Tensor:
        """q, k, v [B, s, N, D] of this rank's tokens -> out [B, s, N, D]: every query sees every key of the sequence.

        Raises ValueError for uneven shards or heads, which the layer would truncate silently.
        """
        _refuse_uneven(layout.plan)
        with watch("hybrid attention (xfuser)", group=layout.mesh.sequence.group, trace=layout.trace):
            out = self.layer(None, q_BsND, k_BsND, v_BsND, dropout_p=0.0, causal=False)
        ulysses, ring = layout.mesh.ulysses.size, layout.mesh.ring.size
        if ulysses > 1:  # q, k, v to heads, and out to tokens
            layout.trace.on_bytes("all_to_all", 4 * q_BsND.nbytes // ulysses * (ulysses - 1))
        if ring > 1:
            layout.trace.on_bytes("ring", 2 * q_BsND.nbytes * (ring - 1))
        return out


def check_xfuser(plan: SequencePlan, *, device_type: str, kernel: str) -> None:
    """Raise ValueError or ImportError for unsupported settings before any rank has loaded or sent anything.

    `kernel` is the setting attention.kernel.
    """
    if device_type != "cuda":
        raise ValueError(f"xfuser runs on CUDA only, and the device is {device_type}; use the torch provider")
    refuse_xfuser_plan(plan, kernel=kernel)
    for package in ("xfuser", "yunchang"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"it needs the package {package}, which is not installed: pip install '.[xfuser]'")
    if TYPES[kernel] == "FA" and importlib.util.find_spec("flash_attn") is None:
        raise ImportError(
            "with attention.kernel auto it needs the package flash-attn; install it, or choose cuda_flash"
        )


def refuse_xfuser_plan(plan: SequencePlan, *, kernel: str) -> None:
    """Raise ValueError for shares and kernels that xfuser cannot serve on any machine."""
    _refuse_uneven(plan)
    if kernel not in TYPES:
        raise ValueError(f"attention.kernel {kernel} has no counterpart in xfuser; choose one of {', '.join(TYPES)}")
    if plan.ring > 1 and TYPES[kernel] not in RING_TYPES:
        raise ValueError(
            f"with attention.kernel {kernel} xfuser has no log-sum-exp to merge the parts of a ring of {plan.ring} by; use "
            "parallel.ring 1, or attention.kernel cuda_flash"
        )


def xfuser_attention(mesh: SeqMesh, *, kernel: str) -> XfuserAttention:
    """xfuser's attention on the ring and ulysses groups of a mesh. Every rank calls this, after `check_xfuser`.

    Its groups are module globals of yunchang, which the layer reads when it is made. Raises ImportError for
    incompatible versions of the two: xfuser 0.5 to 0.7 import names that yunchang 0.6.4 lacks.
    """
    try:
        groups: Any = importlib.import_module("yunchang.globals").PROCESS_GROUP
        groups.ULYSSES_PG, groups.RING_PG = mesh.ulysses.group, mesh.ring.group
        attention: Any = importlib.import_module("xfuser.core.long_ctx_attention")
        layer = attention.xFuserLongContextAttention(attn_type=attention.AttnType[TYPES[kernel]])
    except (ImportError, AttributeError, KeyError, NotImplementedError) as error:  # the last without an accelerator
        raise ImportError(
            f"cannot load xfuser's attention ({error}); xfuser 0.4.5 needs yunchang 0.6.4, later versions a newer yunchang"
        ) from error
    return XfuserAttention(layer=layer)


def _refuse_uneven(plan: SequencePlan) -> None:
    refuse_uneven("xfuser", [length(shard) for shard in plan.shards], [length(share) for share in plan.head_shares])
