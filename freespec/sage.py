"""SageAttention as a kernel of freespec.kernels: products of queries and keys in int8. An optional package, GPUs only.

It subtracts the mean key before it quantises, which leaves the output unchanged and shifts every logit of a query by
q · mean(k) / sqrt D. Version 2 adds that to the log-sum-exp that it returns, so that parts can be merged: with z' the
log-sum-exp of the smoothed logits, z = z' + q · mean(k) / sqrt D, natural logarithm.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Keys that are quantised at a time. Windows of a video are overlapping views, whose copies would not overlap:
# all of a layer's at once would be dozens of times the layer's keys.
KEYS_AT_ONCE = 1 << 17
MOST_CHANNELS = 128  # of a head; fewer are padded inside


def load_sage() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The installed SageAttention as a kernel; ValueError if there is none that returns the log-sum-exp."""
    try:
        function = importlib.import_module("sageattention").sageattn
    except (ImportError, OSError) as error:  # OSError: a library of another CUDA
        raise ValueError(f"attention.complement sage needs the package sageattention ({error}); use same") from error
    # Version 1, the only one on the package index, ignores the argument, and subtracts the mean from its caller's keys.
    if "return_lse" not in inspect.signature(function).parameters:
        raise ValueError(
            "attention.complement sage needs sageattention 2 or newer, which returns the log-sum-exp, and the installed one "
            "does not; build it from github.com/thu-ml/SageAttention, or use same"
        )
    return sage_kernel(function)


@functools.cache  # one kernel for one function: a compiled block is compiled again for another
def sage_kernel(sageattn: Callable[..., Any]) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """SageAttention's function as a kernel: q [B, N, S, D], k, v [B, N, K, D] -> out [B, N, S, D], lse [B, N, S] fp32.

    Raises ValueError for heads of more than 128 channels.
    """

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if q.shape[-1] > MOST_CHANNELS:
            raise ValueError(
                f"attention.complement sage takes heads of at most {MOST_CHANNELS} channels, got {q.shape[-1]}; use same"
            )
        entries = max(1, KEYS_AT_ONCE // k.shape[2])
        pieces = zip(*(x.split(entries) for x in (q, k, v)), strict=True)
        parts = [sageattn(*piece, tensor_layout="HND", is_causal=False, return_lse=True) for piece in pieces]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs), torch.cat(lses)

    return kernel
