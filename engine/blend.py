"""Seams: a tile or a chunk that fades in over the one before."""

import torch
from torch import Tensor


def fade_in(tile: Tensor, before: Tensor, *, extent: int, dim: int) -> None:
    """tile[y] = before[y - extent] (1 - y / extent) + tile[y] y / extent for its first `extent` lines, in place.

    `dim` is -3 for frames, -2 for rows, -1 for columns. The bits are those of a VAE's blend_t, blend_v and blend_h, which take
    line after line: the factors are rounded once, from float64, and each product before the sum.
    """
    extent = min(tile.shape[dim], before.shape[dim], extent)
    begin = tile.narrow(dim, 0, extent)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    shape = (extent,) + (1,) * (-dim - 1)
    share = (torch.arange(extent, dtype=torch.float64, device=tile.device) / max(extent, 1)).view(shape)
    begin.copy_(end * (1 - share).to(tile.dtype) + begin * share.to(tile.dtype))
