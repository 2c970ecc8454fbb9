"""Placement and blending of overlapping pieces along one dimension, for tiles and for chunks of time."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from parallel.shards import Range

# `full`: pieces of one size that are spread evenly. `diffusers`: pieces at multiples of the stride, the last ones cut, as diffusers has them.
Tiles = Literal["full", "diffusers"]


def cover(size: int, piece: int, stride: int, tiles: Tiles) -> tuple[Range, ...]:
    """Ranges [start, stop) of pieces that cover `size` lines, each at most `stride` after the one before.

    With `full` every piece has `piece` lines, the last one ends at `size`, and no piece can be left out without a step of
    more than `stride`. With `diffusers` the last pieces may be short, or lie inside the ones before.
    """
    if tiles == "diffusers":
        return tuple((start, min(start + piece, size)) for start in range(0, size, stride))
    if size <= piece:
        return ((0, size),)
    steps = -(-(size - piece) // stride)
    starts = [step * (size - piece) // steps for step in range(steps + 1)]
    return tuple((start, start + piece) for start in starts)


def overlap_share(ranges: Sequence[Range], index: int) -> Tensor:
    """Weight [lines] (float64) of piece `index` in each of its lines when it is blended over the pieces before it.

    A piece weighs the square of a line's distance from its nearest inner border, where the VAE lacks context. Laid over one
    another in order, pieces get weights that sum to 1 on every line; where a piece is alone or the first, its share is 1.
    """
    start, stop = ranges[index]
    lines = torch.arange(start, stop, dtype=torch.float64) + 0.5
    weights = [_weight(ranges, other, lines) for other in range(index + 1) if ranges[other][1] > start]
    return weights[-1] / torch.stack(weights).sum(0)


def _weight(ranges: Sequence[Range], index: int, lines: Tensor) -> Tensor:
    (start, stop), last = ranges[index], len(ranges) - 1
    distance = torch.full_like(lines, float(ranges[-1][1]))
    if index > 0:
        distance = torch.minimum(distance, lines - start)
    if index < last:
        distance = torch.minimum(distance, stop - lines)
    return distance.clamp(min=0.0).square()


def lay_over(below: Tensor, piece: Tensor, share: Tensor, *, dim: int) -> Tensor:
    """below (1 - share) + piece share, for `share` [lines] along the negative dimension `dim`; equal values are kept exactly."""
    return torch.lerp(below, piece, share.to(piece).view((-1,) + (1,) * (-dim - 1)))


def fade_in(tile: Tensor, before: Tensor, *, extent: int, dim: int) -> None:
    """tile[y] = before[y - extent] (1 - y / extent) + tile[y] y / extent for its first `extent` lines, in place.

    `dim` is -3 for frames, -2 for rows, -1 for columns. The bits are those of blend_t, blend_v and blend_h of diffusers' VAEs,
    which take line after line: the factors are rounded once, from float64, and each product before the sum.
    """
    extent = min(tile.shape[dim], before.shape[dim], extent)
    begin = tile.narrow(dim, 0, extent)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    shape = (extent,) + (1,) * (-dim - 1)
    share = (torch.arange(extent, dtype=torch.float64, device=tile.device) / max(extent, 1)).view(shape)
    begin.copy_(end * (1 - share).to(tile.dtype) + begin * share.to(tile.dtype))
