"""Decode latents in overlapping tiles, sharded over ranks and streamed; with `decode.tiles diffusers` equal to `vae.tiled_decode`."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.adapters.base import LatentDecoder
from engine.adapters.blend import fade_in, lay_over, overlap_share
from engine.decode.pieces import clamp, decode_step, open_decoder
from engine.decode.tiling import DecodePlan, TileGrid
from parallel.collectives import collect
from parallel.mesh import Axis

COLOURS = 3


def stream_tiles(vae: Any, latents: Tensor, plan: DecodePlan, *, world: Axis) -> Iterator[Tensor]:
    """Decode each chunk of latents [1, z, F, h, w] to frames [1, 3, t, H, W] in [-1, 1], on rank 0; t as in `stream_decode`.

    Every rank of `world` calls this with the same latents and exhausts it; the others decode their tiles, send them and yield
    nothing. All tiles of a rank advance by one chunk together, each with its own state, so memory is bounded by two chunks
    and the states (for Wan: causal caches) of the rank's tiles. A rank that stops early leaves the VAE unchanged, but the
    others wait for it until their group's timeout.
    """
    decoder = open_decoder(vae, latents, plan.time)
    pieces = _whole_frames(decoder, plan, world)
    if world.rank > 0:
        for _ in pieces:
            pass
        return
    yield from map(clamp, decoder.join(pieces))


@torch.no_grad()
def _whole_frames(decoder: LatentDecoder, plan: DecodePlan, world: Axis) -> Iterator[Tensor]:
    """Yield each chunk's frames, not clamped, blended from all tiles, on rank 0; an empty tensor on the others."""
    mine = plan.shares[world.rank]
    states = {tile: decoder.start() for tile in mine}
    for index, (first, _) in enumerate(decoder.chunks):
        chunk = decoder.latents(index)
        pieces = [
            decode_step(decoder, cut_tile(chunk, plan.grid, tile), states[tile], index=index, tile=tile)
            for tile in mine
        ]
        flat = torch.cat([chunk.new_empty(0), *(piece.flatten() for piece in pieces)])
        del pieces
        num_frames = decoder.num_frames(index)
        shapes = [[tile_shape(plan.grid, tile, num_frames) for tile in share] for share in plan.shares]
        sizes = [sum(shape.numel() for shape in of_rank) for of_rank in shapes]
        assert flat.numel() == sizes[world.rank], f"tiles of {flat.numel()} numbers, planned were {sizes[world.rank]}"
        trace = world.trace(f"decode, latent frame {first}")
        parts = collect(flat, sizes=sizes, target=0, group=world.group, trace=trace)
        if world.rank == 0:
            yield blend_tiles(_in_order(parts, shapes, plan.shares), plan.grid)
        else:
            yield flat.new_empty(0)


def cut_tile(latents: Tensor, grid: TileGrid, tile: int) -> Tensor:
    """[1, z, t, h, w] -> this tile's rows and columns of it."""
    rows, columns = grid.tiles[tile]
    return latents[..., slice(*rows), slice(*columns)]


def tile_shape(grid: TileGrid, tile: int, num_frames: int) -> torch.Size:
    """Shape [1, 3, t, H of the tile, W of the tile] of a decoded tile."""
    return torch.Size((1, COLOURS, num_frames, *grid.pixels(tile)))


def blend_tiles(tiles: Sequence[Tensor], grid: TileGrid) -> Tensor:
    """Blend decoded tiles [1, 3, t, H of the tile, W of the tile], which may be changed, to the frame [1, 3, t, H, W]."""
    if grid.diffusers is not None:
        return _blend_as_diffusers(tiles, grid, *grid.diffusers)
    num_columns, (height, width) = len(grid.columns), grid.size
    rows, columns = ([grid.in_pixels(each) for each in ranges] for ranges in (grid.rows, grid.columns))
    frame = tiles[0].new_zeros(*tiles[0].shape[:-2], height, width)
    for i, row in enumerate(rows):
        of_row = tiles[i * num_columns : (i + 1) * num_columns]
        band = frame.new_zeros(*of_row[0].shape[:-1], width)
        for j, (tile, column) in enumerate(zip(of_row, columns, strict=True)):
            below = band[..., slice(*column)]
            below.copy_(lay_over(below, tile, overlap_share(columns, j), dim=-1))
        below = frame[..., slice(*row), :]
        below.copy_(lay_over(below, band, overlap_share(rows, i), dim=-2))
    return frame


def _blend_as_diffusers(
    tiles: Sequence[Tensor], grid: TileGrid, stride: tuple[int, int], blend: tuple[int, int]
) -> Tensor:
    """Fade each tile in over the one above and then the one to its left, both of which are blended already."""
    num_columns = len(grid.columns)
    height, width = stride
    bands = []
    for i in range(len(grid.rows)):
        band = tiles[i * num_columns : (i + 1) * num_columns]
        for j, tile in enumerate(band):
            if i > 0:
                fade_in(tile, tiles[(i - 1) * num_columns + j], extent=blend[0], dim=-2)
            if j > 0:
                fade_in(tile, band[j - 1], extent=blend[1], dim=-1)
        bands.append(torch.cat([tile[..., :height, :width] for tile in band], dim=-1))
    return torch.cat(bands, dim=-2)


def _in_order(
    parts: Sequence[Tensor], shapes: Sequence[Sequence[torch.Size]], shares: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Flat tiles of each rank -> all tiles in their shapes, in order."""
    tiles = {}
    for part, of_rank, share in zip(parts, shapes, shares, strict=True):
        rooms = part.split([shape.numel() for shape in of_rank]) if share else ()
        for tile, room, shape in zip(share, rooms, of_rank, strict=True):
            tiles[tile] = room.view(shape)
    return [tiles[tile] for tile in sorted(tiles)]
