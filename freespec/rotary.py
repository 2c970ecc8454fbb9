"""Rotary tables with one temporal frequency replaced; `freespec.riflex` says by which."""

import torch
from torch import Tensor


def with_frequency(
    tables: tuple[Tensor, Tensor], frequency: float, *, columns: slice, frame_tokens: int
) -> tuple[Tensor, Tensor]:
    """Rotary tables (cos, sin) [..., S, 1, D] with cos and sin of frame · frequency in these columns; new tensors."""
    cos, sin = (table.clone() for table in tables)
    frame = torch.arange(cos.shape[-3], device=cos.device) // frame_tokens
    angle = (frame.double() * frequency)[:, None, None]
    cos[..., columns] = angle.cos().to(cos.dtype)
    sin[..., columns] = angle.sin().to(sin.dtype)
    return cos, sin
