"""Dense attention kernels that also return the log-sum-exp of the logits, each with the same signature.

A kernel takes q [B, N, S, D] and k, v [B, N, K, D] (any strides with a contiguous last dimension, K > 0) and returns
out [B, N, S, D] in q's dtype and lse [B, N, S], natural logarithm, fp32 (fp64 for fp64 inputs). The scale is D**-0.5.
The fast ones are torch's own operators, called directly because the public function drops the lse.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from freespec.kernel_names import COMPLEMENTS, DUALS, FA3, NAMES
from freespec.sage import load_sage

Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# freespec.triton_dual.dual: both branches from one call.
DualKernel = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Any]]


def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / sqrt D) v with the logits written out: any device and dtype, memory S x K."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("bnsd,bnkd->bnsk", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
    lse = torch.logsumexp(logits, dim=-1)
    out = torch.einsum("bnsk,bnkd->bnsd", torch.exp(logits - lse[..., None]), v.to(wide))
    return out.to(q.dtype), lse


def cpu_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The CPU flash kernel, which `scaled_dot_product_attention` also takes for these inputs: equal to it bit for bit."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse


def cuda_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention 2 as built into torch: fp16 and bf16, D a multiple of 8."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out, lse


def cuda_cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """cuDNN's fused attention: fp16 and bf16, compute capability 8.0 and up."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, lse.squeeze(-1) if lse.dim() == q.dim() else lse  # torch >= 2.9 keeps a trailing 1


def cuda_efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel: the fast one that takes fp32. Its lse is padded to a multiple of 32 queries."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, lse[..., : q.shape[2]]


KERNELS: dict[str, Kernel] = {
    "plain": plain,
    "cpu_flash": cpu_flash,
    "cuda_flash": cuda_flash,
    "cuda_cudnn": cuda_cudnn,
    "cuda_efficient": cuda_efficient,
}

HALF = (torch.float16, torch.bfloat16)


def load_fa3() -> Kernel:
    """FlashAttention 3 as a kernel; ValueError if the package is not installed."""
    try:
        function = importlib.import_module("flash_attn_interface").flash_attn_func
    except (ImportError, OSError) as error:  # OSError: a library of another CUDA
        raise ValueError(
            f"attention kernel {FA3!r} needs flash-attn 3, the folder hopper/ of github.com/Dao-AILab/flash-attention ({error})"
        ) from error
    return fa3_kernel(function)


@functools.cache  # one kernel for one function: a compiled block is compiled again for another
def fa3_kernel(flash_attn_func: Callable[..., Any]) -> Kernel:
    """Its function, which takes and returns [B, S, N, D], and lse [B, N, S] always or, in newer versions, where asked."""
    asked = "return_attn_probs" in inspect.signature(flash_attn_func).parameters
    settings = {"return_attn_probs": True} if asked else {}

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **settings)[:2]
        return out.transpose(1, 2), lse

    return kernel


def candidates(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """What `auto` may mean on a device: the first serves every one of the kind, and is taken where nothing is measured."""
    if device.type == "cpu":
        return ("cpu_flash",)
    return ("cuda_flash", "cuda_cudnn", FA3) if dtype in HALF else ("cuda_efficient",)


def select_kernel(name: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel called `name`; `auto` is the first of `candidates`, the same on every rank. The engine measures them all.

    Raises ValueError for an unknown name and for a kernel that cannot serve the device or dtype, or is not installed: there is
    no fallback.
    """
    if name == "auto":
        name = candidates(device, dtype)[0]
    if name not in NAMES:
        raise ValueError(f"unknown attention kernel {name!r}; choose one of auto, {', '.join(NAMES)}")
    if name != "plain" and not name.startswith(device.type):
        raise ValueError(f"attention kernel {name!r} does not run on {device.type}; use auto or plain")
    if name in ("cuda_flash", "cuda_cudnn", FA3) and dtype not in HALF:
        raise ValueError(f"attention kernel {name!r} takes fp16 or bf16, not {dtype}; use cuda_efficient or plain")
    if name == "cuda_efficient" and dtype == torch.float64:
        raise ValueError("attention kernel 'cuda_efficient' does not take float64; use plain")
    return load_fa3() if name == FA3 else KERNELS[name]


def select_complement(name: str, device: torch.device, dtype: torch.dtype, *, dual: str) -> Kernel | None:
    """The kernel for the keys outside the windows, where `dual` is how both branches are computed; None is the same kernel.

    Raises ValueError for an unknown name, for a `dual` without a complement of its own, and where SageAttention is missing,
    too old to return the log-sum-exp, or serves neither the device nor the dtype.
    """
    if name == "same":
        return None
    if name not in COMPLEMENTS:
        raise ValueError(f"unknown attention.complement {name!r}; choose one of {', '.join(COMPLEMENTS)}")
    if resolve_dual(dual) != "strided":
        raise ValueError(
            f"attention.complement {name} needs attention.dual strided; {dual} attends to all keys in one call"
        )
    if device.type != "cuda":
        raise ValueError(f"attention.complement {name} does not run on {device.type}; use same")
    if dtype not in HALF:
        raise ValueError(f"attention.complement {name} takes fp16 or bf16, not {dtype}; use same")
    return load_sage()


def resolve_dual(name: str) -> str:
    """What a choice of DUALS or `auto` means: the strided way, until benchmarks/gpu.py has measured Triton to be faster."""
    return "strided" if name == "auto" else name


def select_dual(name: str, device: torch.device, dtype: torch.dtype) -> DualKernel | None:
    """The kernel that computes both branches at once; None is the strided way.

    Raises ValueError for an unknown name, and where Triton is missing or serves neither the device nor the dtype.
    """
    name = resolve_dual(name)
    if name == "strided":
        return None
    if name not in DUALS:
        raise ValueError(f"unknown attention.dual {name!r}; choose one of auto, {', '.join(DUALS)}")
    try:
        triton_dual = importlib.import_module("freespec.triton_dual")
    except ImportError as error:
        raise ValueError(f"attention.dual triton needs the triton package ({error}); use strided") from error
    if not triton_dual.can_run(device):
        raise ValueError(f"attention.dual triton does not run on {device.type}; use strided")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"attention.dual triton takes bf16, fp16 or fp32, not {dtype}; use strided")
    kernel: DualKernel = triton_dual.dual
    return kernel
