"""Latents to frames in overlapping tiles, shared over ranks: streamed, and equal to `vae.tiled_decode` on one rank."""

from collections.abc import Iterator, Sequence

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from engine.decode import decode_step, empty_cache, latent_frames
from engine.decode_plan import DecodePlan, TileGrid
from parallel.collectives import Trace, collect, ignore_bytes
from parallel.mesh import Axis


@torch.no_grad()
def stream_tiles(vae: AutoencoderKLWan, latents: Tensor, plan: DecodePlan, *, world: Axis) -> Iterator[Tensor]:
    """Frames [1, 3, t, H, W] in [-1, 1] of each latent frame of [1, z, F, h, w], on rank 0: t = 1, then 4 and 4 again.

    Every rank of `world` calls this with the same latents and runs it to its end; the others decode their tiles, send
    them and yield nothing. All tiles of a rank move on by one latent frame together, each with a causal cache of its own,
    so memory is bounded by one latent frame and the caches of the rank's tiles. Who stops early leaves no trace in the
    VAE, but ranks that do not stop wait for it until their group's timeout.
    """
    mine = plan.shares[world.rank]
    caches = {tile: empty_cache(vae) for tile in mine}
    num_frames = 1
    for index, latent in enumerate(latent_frames(vae, latents)):
        pieces = [decode_step(vae, cut_tile(latent, plan.grid, tile), caches[tile], first=index == 0) for tile in mine]
        flat = torch.cat([latent.new_empty(0), *(piece.flatten() for piece in pieces)])
        del pieces
        shapes = [[tile_shape(vae, plan.grid, tile, num_frames) for tile in share] for share in plan.shares]
        sizes = [sum(shape.numel() for shape in of_rank) for of_rank in shapes]
        assert flat.numel() == sizes[world.rank], f"tiles of {flat.numel()} numbers, planned were {sizes[world.rank]}"
        trace = Trace(label=f"decode, latent frame {index}", on_bytes=ignore_bytes)
        parts = collect(flat, sizes=sizes, target=0, group=world.group, trace=trace)
        if world.rank == 0:
            yield blend_tiles(_in_order(parts, shapes, plan.shares), plan.grid).clamp(-1.0, 1.0)
        num_frames = vae.config.scale_factor_temporal


def cut_tile(latent: Tensor, grid: TileGrid, tile: int) -> Tensor:
    """[1, z, 1, h, w] -> this tile's rows and columns of it."""
    rows, columns = grid.tiles[tile]
    return latent[..., slice(*rows), slice(*columns)]


def tile_shape(vae: AutoencoderKLWan, grid: TileGrid, tile: int, num_frames: int) -> torch.Size:
    """Shape [1, 3, t, H of the tile, W of the tile] of what the decoder makes of a tile."""
    return torch.Size((1, vae.config.out_channels, num_frames, *grid.pixels(tile)))


def blend_tiles(tiles: Sequence[Tensor], grid: TileGrid) -> Tensor:
    """Decoded tiles [1, 3, t, H of the tile, W of the tile], which are changed, to the frame [1, 3, t, H, W].

    A tile fades in over the one above and then over the one to its left, both of which have already done so themselves.
    """
    num_columns = len(grid.columns)
    height, width = grid.stride
    bands = []
    for i in range(len(grid.rows)):
        band = tiles[i * num_columns : (i + 1) * num_columns]
        for j, tile in enumerate(band):
            if i > 0:
                fade_in(tile, tiles[(i - 1) * num_columns + j], extent=grid.blend[0], dim=-2)
            if j > 0:
                fade_in(tile, band[j - 1], extent=grid.blend[1], dim=-1)
        bands.append(torch.cat([tile[..., :height, :width] for tile in band], dim=-1))
    return torch.cat(bands, dim=-2)


def fade_in(tile: Tensor, before: Tensor, *, extent: int, dim: int) -> None:
    """tile[y] = before[y - extent] (1 - y / extent) + tile[y] y / extent for its first `extent` lines, in place.

    The bits are those of the VAE's blend_v and blend_h, which take line after line: the factors are rounded once, from
    float64, and each product before the sum.
    """
    extent = min(tile.shape[dim], before.shape[dim], extent)
    begin = tile.narrow(dim, 0, extent)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    shape = (extent, 1) if dim == -2 else (extent,)
    share = (torch.arange(extent, dtype=torch.float64, device=tile.device) / max(extent, 1)).view(shape)
    begin.copy_(end * (1 - share).to(tile.dtype) + begin * share.to(tile.dtype))


def _in_order(
    parts: Sequence[Tensor], shapes: Sequence[Sequence[torch.Size]], shares: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Flat tiles of each rank -> all tiles in their shapes, in the order of their numbers."""
    tiles = {}
    for part, of_rank, share in zip(parts, shapes, shares, strict=True):
        rooms = part.split([shape.numel() for shape in of_rank]) if share else ()
        for tile, room, shape in zip(share, rooms, of_rank, strict=True):
            tiles[tile] = room.view(shape)
    return [tiles[tile] for tile in sorted(tiles)]
