"""SageAttention's interface, recorded from version 2.2 (sageattention/core.py), computed in plain torch on any device.

The signature, the layouts and the returned log-sum-exp (natural, of the unsmoothed logits) are those of the package; a
query block of 128 and a key block of 64 have one int8 scale each, as in its kernels. `exact` leaves the rounding out, so
that everything else can be compared in fp64.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

QUERY_BLOCK, KEY_BLOCK = 128, 64


def _version_2(*, rounds: bool) -> Callable[..., Any]:
    def sageattn(  # noqa: PLR0917 - the package's own
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        sm_scale: float | None = None,
        return_lse: bool = False,
        **kwargs: Any,
    ) -> Any:
        assert tensor_layout == "HND" and not is_causal and sm_scale is None and not kwargs
        return _attend(q, k, v, return_lse, rounds=rounds)

    return sageattn


sageattn = _version_2(rounds=True)
"""softmax(q k' / sqrt D) v with k' = k - mean(k), q and k' rounded to int8 in blocks."""

exact = _version_2(rounds=False)
"""The same without rounding."""


def uncorrected(*qkv: Tensor, **settings: Any) -> Any:
    """A mistake: the log-sum-exp of the smoothed logits, as kernels return it that were not made for merging."""
    out, lse = exact(*qkv, **settings)
    q, k, _ = qkv
    return out, lse - (q @ k.mean(2, keepdim=True).transpose(-1, -2)).squeeze(-1) * q.shape[-1] ** -0.5


def version_1(  # noqa: PLR0917 - the package's own
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **kwargs: Any,
) -> Tensor:
    """Version 1.0.6, all that the package index has: `return_lse` disappears among the other arguments."""
    k -= k.mean(dim=2, keepdim=True)
    return _attend(q, k, v, False, rounds=True)


def _attend(q: Tensor, k: Tensor, v: Tensor, return_lse: bool, *, rounds: bool) -> Any:
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    mean, scale = k.mean(dim=2, keepdim=True), q.shape[-1] ** -0.5
    correction = (q @ mean.transpose(-1, -2)).squeeze(-1).to(compute_dtype) * scale
    left, right = (q * scale).to(compute_dtype), (k - mean).to(compute_dtype)
    if rounds:
        left, right = _round_blocks(left, QUERY_BLOCK), _round_blocks(right, KEY_BLOCK)
    logits = left @ right.transpose(-1, -2)
    lse = logits.logsumexp(-1)
    out = (torch.exp(logits - lse[..., None]) @ v.to(compute_dtype)).to(q.dtype)
    return (out, lse + correction) if return_lse else out


def _round_blocks(x: Tensor, size: int) -> Tensor:
    """Each block of rows with one scale, on the 255 numbers of int8."""
    steps = [part.abs().amax((-2, -1), keepdim=True).clamp_min(1e-12) / 127 for part in x.split(size, dim=2)]
    parts = zip(x.split(size, dim=2), steps, strict=True)
    return torch.cat([(part / step).round() * step for part, step in parts], dim=2)
