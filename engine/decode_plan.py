"""Who decodes which piece of a frame: the whole frame on rank 0, or overlapping tiles over all ranks; integers, and why."""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan

from engine.config import DecodeConfig
from engine.decode import decode_step, empty_cache, make_ready
from engine.errors import UserError
from engine.planner.live_bytes import LiveBytes
from parallel.collectives import Trace, gather_copies, ignore_bytes
from parallel.mesh import Axis
from parallel.plan import Range, length

GIB = 2**30
# Tensors are counted exactly. This is for what is not: workspaces of convolutions, fragments, blending (a guess until it
# is measured on a GPU).
_UNCOUNTED = 1.25


@dataclass(frozen=True, kw_only=True, slots=True)
class TileGrid:
    """Overlapping tiles of a latent frame, numbered row by row; the last of a row or column may be cut by the border.

    Attributes:
        rows: latent rows of each row of tiles.
        columns: latent columns of each column of tiles.
        stride: pixels (height, width) of a tile that are its own.
        blend: pixels (height, width) at the beginning of a tile that fade in over the end of the one before.
        scale: pixels per latent row or column.
    """

    rows: tuple[Range, ...]
    columns: tuple[Range, ...]
    stride: tuple[int, int]
    blend: tuple[int, int]
    scale: int

    @property
    def tiles(self) -> tuple[tuple[Range, Range], ...]:
        """Latent rows and columns of every tile."""
        return tuple((rows, columns) for rows in self.rows for columns in self.columns)

    def latent_size(self, tile: int) -> tuple[int, int]:
        """Latent rows and columns of a tile, as numbers."""
        rows, columns = self.tiles[tile]
        return length(rows), length(columns)

    def pixels(self, tile: int) -> tuple[int, int]:
        """Height and width of a tile."""
        rows, columns = self.latent_size(tile)
        return rows * self.scale, columns * self.scale


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodePlan:
    """How the frames of one video are decoded; the same on every rank.

    Attributes:
        mode: `whole` is the exact decode on rank 0, of one tile; `tiled` is over all ranks.
        grid: the tiles.
        shares: the tiles of each rank.
        why: the reason for the mode.
    """

    mode: Literal["whole", "tiled"]
    grid: TileGrid
    shares: tuple[tuple[int, ...], ...]
    why: str

    @property
    def record(self) -> dict[str, Any]:
        """What the record of a run says of it: mode, number of tiles, of tiles on each rank, and why."""
        return {
            "mode": self.mode,
            "tiles": len(self.grid.tiles),
            "tiles_by_rank": [len(share) for share in self.shares],
            "why": self.why,
        }


def check_tiles(config: DecodeConfig, scale: int) -> None:
    """Raise UserError for tiles that the VAE, with `scale` pixels per latent, cannot cut."""
    for name in ("tile_height", "tile_width", "stride_height", "stride_width"):
        pixels = getattr(config, name)
        if pixels % scale:
            raise UserError(
                f"decode.{name} must be a multiple of the {scale} pixels of a latent, got {pixels}; "
                f"the next one is {pixels // scale * scale + scale}"
            )


def make_grid(config: DecodeConfig, size: tuple[int, int], scale: int) -> TileGrid:
    """The tiles that `vae.tiled_decode` cuts from a latent frame of `size` rows and columns.

    A frame that is no larger than a tile is one tile, although a stride may be smaller: it is not tiled.
    """
    tile = config.tile_height // scale, config.tile_width // scale
    stride = config.stride_height // scale, config.stride_width // scale
    if size[0] <= tile[0] and size[1] <= tile[1]:
        return whole_frame(size, scale)
    rows, columns = (
        tuple((start, min(start + tile[dim], size[dim])) for start in range(0, size[dim], stride[dim]))
        for dim in (0, 1)
    )
    blend = config.tile_height - config.stride_height, config.tile_width - config.stride_width
    return TileGrid(
        rows=rows, columns=columns, stride=(config.stride_height, config.stride_width), blend=blend, scale=scale
    )


def whole_frame(size: tuple[int, int], scale: int) -> TileGrid:
    """A latent frame of `size` rows and columns as the only tile."""
    rows, columns = size
    return TileGrid(
        rows=((0, rows),), columns=((0, columns),), stride=(rows * scale, columns * scale), blend=(0, 0), scale=scale
    )


def share_tiles(sizes: Sequence[int], num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """The tiles of each rank, in order: the largest tile that is left goes to the rank that has the least.

    Tiles at the border are smaller, so equal numbers of them would be unequal work. Among equals the last rank comes
    first: rank 0 blends and writes the video as well.
    """
    loads = [0] * num_ranks
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for tile in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        rank = min(reversed(range(num_ranks)), key=loads.__getitem__)
        shares[rank].append(tile)
        loads[rank] += sizes[tile]
    return tuple(tuple(sorted(share)) for share in shares)


def plan_decode(config: DecodeConfig, vae: AutoencoderKLWan, size: tuple[int, int], *, world: Axis) -> DecodePlan:
    """The plan for latent frames of `size` rows and columns; every rank of `world` calls this alike.

    Only `auto` on CUDA communicates: each rank's free memory.
    """
    scale = vae.config.scale_factor_spatial
    whole, grid = whole_frame(size, scale), make_grid(config, size, scale)
    on_first = ((0,), *[()] * (world.size - 1))
    shares = share_tiles(
        [rows * columns for rows, columns in map(grid.latent_size, range(len(grid.tiles)))], world.size
    )
    if grid == whole:
        mode, why = "whole", "a frame is no larger than a tile"
    elif config.mode != "auto":
        mode, why = config.mode, f"decode.mode is {config.mode}"
    elif (free := _free_bytes(vae, world)) is None:
        mode, why = "whole", "exact, and the memory of a CPU is no bound"
    else:
        needs = [max(_peaks(vae, cut, shared)) for cut, shared in ((whole, on_first), (grid, shares))]
        mode, why = choose_mode(*needs, free=free)
    if mode == "whole":
        return DecodePlan(mode="whole", grid=whole, shares=on_first, why=why)
    return DecodePlan(mode="tiled", grid=grid, shares=shares, why=why)


def choose_mode(whole: int, tiled: int, *, free: Sequence[int]) -> tuple[Literal["whole", "tiled"], str]:
    """The mode of `auto`, and why, from the bytes that each needs on its busiest rank and the free bytes of each rank.

    Whole frames are decoded on rank 0 alone, so its memory decides.
    """
    numbers = (
        f"whole frames need about {whole / GIB:.1f} GiB of the {free[0] / GIB:.1f} GiB free on rank 0, "
        f"tiles {tiled / GIB:.1f} GiB of {min(free) / GIB:.1f} GiB on a rank"
    )
    if whole <= free[0]:
        return "whole", f"exact, and it fits: {numbers}"
    if tiled < whole:
        return "tiled", f"whole frames do not fit: {numbers}"
    return "whole", f"it may not fit, but tiles over so few ranks need no less: {numbers}"


def _free_bytes(vae: AutoencoderKLWan, world: Axis) -> list[int] | None:
    """Bytes that torch can still have on each rank's GPU; None on a CPU."""
    make_ready(vae)  # offload makes room for the VAE
    if vae.device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(vae.device) - torch.cuda.memory_allocated(vae.device)
    mine = torch.tensor([torch.cuda.mem_get_info(vae.device)[0] + unused], device=vae.device)
    trace = Trace(label="decode, free memory", on_bytes=ignore_bytes)
    return [int(free) for free in gather_copies(mine, "agreement", group=world.group, trace=trace)]


def _peaks(vae: AutoencoderKLWan, grid: TileGrid, shares: Sequence[Sequence[int]]) -> Iterator[int]:
    """Bytes of each rank while it decodes its tiles: the caches of all of them, and the work on the largest."""
    config = json.dumps(dict(vae.config), sort_keys=True)
    for share in shares:
        parts = [tile_bytes(config, *grid.latent_size(tile)) for tile in share]
        work, cache = max((work for work, _ in parts), default=0), sum(cache for _, cache in parts)
        yield int(_UNCOUNTED * (work + cache))


@functools.cache
def tile_bytes(config: str, rows: int, columns: int) -> tuple[int, int]:
    """Bytes of tensors while a tile of latent `rows` and `columns` is decoded by the VAE of a JSON `config`.

    The first number is the work on one latent frame, which passes, the second the causal cache, which stays. The decoder
    runs on the meta device, where tensors have sizes only; from the third latent frame on its peak is constant.
    """
    with torch.device("meta"):
        twin = AutoencoderKLWan.from_config(json.loads(config)).eval()
    cache = empty_cache(twin)
    with torch.no_grad(), LiveBytes() as live:
        for index in range(3):
            latent = torch.empty(1, twin.config.z_dim, 1, rows, columns, device="meta")
            decode_step(twin, latent, cache, first=index == 0)
    kept = sum(entry.nbytes for entry in cache if isinstance(entry, torch.Tensor))
    return live.peak - kept, kept
