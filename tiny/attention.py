"""Attention as two matrix products, for training on a CPU.

torch's fused kernel keeps memory small, which short clips do not need; its backward pass in bfloat16 takes twice the time of both products.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **others: Any,
) -> Tensor:
    """softmax(scale q k') v for q, k, v [B, N, S, D]; a float mask is added, a bool mask selects the keys.

    The scale is 1 / sqrt(D) unless given: T5 gives 1. Unsupported arguments raise ValueError.
    """
    if dropout_p or is_causal or any(others.values()):
        raise ValueError(f"dropout {dropout_p}, causal {is_causal} and {others} are not served")
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype is torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


@contextmanager
def cpu_attention(device: torch.device) -> Iterator[None]:
    """On a CPU, replace `scaled_dot_product_attention` by `plain_attention`; elsewhere do nothing."""
    stock = functional.scaled_dot_product_attention
    if device.type == "cpu":
        functional.scaled_dot_product_attention = plain_attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = stock
