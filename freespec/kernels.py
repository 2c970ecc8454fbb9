"""Dense attention kernels that also return the log-sum-exp of the logits, each with the same signature.

A kernel takes q [B, N, S, D] and k, v [B, N, K, D] (any strides with a contiguous last dimension, K > 0) and returns
out [B, N, S, D] in q's dtype and lse [B, N, S], natural logarithm, fp32 (fp64 for fp64 inputs). The scale is D**-0.5.
The fast ones are torch's own operators, called directly because the public function drops the lse.
"""

import functools
import importlib
import inspect
import weakref
from collections.abc import Callable, Mapping
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
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("bnsd,bnkd->bnsk", q.to(compute_dtype), k.to(compute_dtype)) * q.shape[-1] ** -0.5
    lse = torch.logsumexp(logits, dim=-1)
    # Not exp(logits - lse): an error of lse, which grows with the logits, is in the whole row.
    out = torch.einsum("bnsk,bnkd->bnsd", logits.softmax(-1), v.to(compute_dtype))
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


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """out [B, N, S, D] of torch's public function, which diffusers calls: the backend is torch's choice, or the caller's context's."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


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


# Kernels that an operator may be asked for, by `key_of`; they are dropped once nothing else refers to them.
_BY_KEY: "weakref.WeakValueDictionary[str, Kernel]" = weakref.WeakValueDictionary(KERNELS)


def key_of(kernel: Kernel) -> str:
    """A key for `kernel_at` in this process, since torch's operators take no functions."""
    key = getattr(kernel, "__name__", type(kernel).__name__)
    if _BY_KEY.get(key) is not kernel:
        key = f"{key} {id(kernel)}"
        _BY_KEY[key] = kernel
    return key


def kernel_at(key: str) -> Kernel:
    """The kernel of a key."""
    return _BY_KEY[key]


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
    """Wrap its function, which takes and returns [B, S, N, D], and lse [B, N, S] always or, in newer versions, if asked."""
    asked = "return_attn_probs" in inspect.signature(flash_attn_func).parameters
    settings = {"return_attn_probs": True} if asked else {}

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **settings)[:2]
        return out.transpose(1, 2), lse

    return kernel


# torch's own order (sdp_utils.cpp, check_prefer_cudnn_attention): cuDNN before FlashAttention on these compute capabilities.
CUDNN_FIRST = ((9, 0), (10, 0))
# 9.15.1, as cudnnGetVersion has it since cuDNN 9: major * 10000 + minor * 100 + patch. Older ones read out of bounds where 128 does
# not divide a length, and lengths here are frames x tokens of a frame.
CUDNN_SINCE = 91501
# Share of the first candidate's time below which another one is taken: near a tie, processes of a batch would choose by chance.
DECISIVE = 0.9


def cuda_candidates(capability: tuple[int, int], cudnn: int | None, *, half: bool = True) -> tuple[str, ...]:
    """Candidates of `auto` on a GPU of this compute capability, in torch's order.

    `cudnn` is the version as `torch.backends.cudnn.version()` gives it; None is no cuDNN. `half` is for fp16 and bf16.
    """
    if capability < (8, 0) or not half:
        return ("cuda_efficient",)
    with_cudnn = cudnn is not None and cudnn >= CUDNN_SINCE
    if with_cudnn and capability in CUDNN_FIRST:
        return ("cuda_cudnn", "cuda_flash", FA3)
    return ("cuda_flash", "cuda_cudnn", FA3) if with_cudnn else ("cuda_flash", FA3)


def preferred(seconds: Mapping[str, float]) -> str:
    """Choose from measured or predicted seconds, in the order of candidates: the first, or one that is clearly faster."""
    first, fastest = next(iter(seconds)), min(seconds, key=lambda name: seconds[name])
    return fastest if seconds[fastest] <= DECISIVE * seconds[first] else first


def candidates(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Candidates of `auto` on a device of this process; the first is used where nothing is measured."""
    if device.type == "cpu":
        return ("cpu_flash",)
    if device.type != "cuda":
        raise ValueError(f"attention kernel 'auto' does not run on {device.type}; use plain")
    if dtype not in HALF:  # the same on every GPU, so none is asked
        return cuda_candidates((8, 0), None, half=False)
    return cuda_candidates(torch.cuda.get_device_capability(device), cudnn_version())


def cudnn_version() -> int | None:
    """cuDNN's version in this process; None without it, or where torch is built for another vendor's library."""
    return torch.backends.cudnn.version() if torch.version.cuda else None


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
    if name == "cuda_cudnn" and (cudnn_version() or 0) < CUDNN_SINCE:
        raise ValueError(
            f"attention kernel 'cuda_cudnn' needs cuDNN 9.15.1 or newer (version {CUDNN_SINCE}), this is {cudnn_version()}: "
            "older ones read out of bounds; use cuda_flash"
        )
    return load_fa3() if name == FA3 else KERNELS[name]


def select_complement(name: str, device: torch.device, dtype: torch.dtype, *, dual: str) -> Kernel | None:
    """The kernel for the keys outside the windows, where `dual` is how both branches are computed; None is the same kernel.

    Raises ValueError for an unknown name, for a `dual` that takes no complement, and where SageAttention is missing,
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
    """Resolve a choice of DUALS or `auto`: strided, until benchmarks/gpu.py has measured Triton to be faster."""
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
