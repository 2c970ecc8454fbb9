"""Plan which rank decodes what: whole frames on rank 0, or overlapping tiles over all ranks; integers, and the reason."""

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from engine.adapters import ModelAdapter, VideoSpec, adapter_of
from engine.adapters.base import DecodeMode, TimeSettings
from engine.adapters.blend import cover
from engine.config import DecodeConfig
from engine.decode.live_bytes import LiveBytes
from engine.decode.pieces import clamp, decode_step, make_ready, open_decoder
from engine.errors import UserError
from engine.shown import apart
from parallel.collectives import gather_copies
from parallel.mesh import Axis
from parallel.shards import Range, length

GIB = 2**30
# Margin over the exactly counted tensors: workspaces of convolutions, fragmentation, blending (not measured on a GPU yet).
_UNCOUNTED = 1.25
# Chunks after which a decode has reached its peak.
_SHOWN_CHUNKS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class TileGrid:
    """Overlapping tiles of a latent frame, numbered row by row.

    Attributes:
        rows: latent rows of each row of tiles.
        columns: latent columns of each column of tiles.
        scale: pixels per latent row or column.
        diffusers: for tiles that are blended as in diffusers, the stride and the blended extent in pixels (height, width).
    """

    rows: tuple[Range, ...]
    columns: tuple[Range, ...]
    scale: int
    diffusers: tuple[tuple[int, int], tuple[int, int]] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frame in pixels."""
        return self.rows[-1][1] * self.scale, self.columns[-1][1] * self.scale

    def in_pixels(self, latents: Range) -> Range:
        """A range of latent rows or columns as one of pixels."""
        return latents[0] * self.scale, latents[1] * self.scale

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
    """The decode of one video; the same on every rank.

    Attributes:
        mode: `whole` is the exact decode on rank 0, of one tile; `framewise` a few latent frames at a time, on rank 0;
            `tiled` is over all ranks, and where the model has `framewise`, also a few at a time.
        grid: the tiles.
        shares: the tiles of each rank.
        time: how the decode goes through time.
        why: the reason for the mode.
    """

    mode: DecodeMode
    grid: TileGrid
    shares: tuple[tuple[int, ...], ...]
    time: TimeSettings
    why: str

    @property
    def record(self) -> dict[str, Any]:
        """The entry of the record: mode, number of tiles, tiles on each rank, reason, and settings of time."""
        return {
            "mode": self.mode,
            "tiles": len(self.grid.tiles),
            "tiles_by_rank": [len(share) for share in self.shares],
            "why": self.why,
        } | self.time.record


def check_tiles(config: DecodeConfig, spec: VideoSpec) -> None:
    """Raise UserError for a mode that the model's decoder lacks, and for tile sizes that the VAE does not support.

    Called before weights are read; `plan_decode` runs once the video is denoised.
    """
    if config.mode == "framewise" and not spec.cuts_time:
        raise UserError(
            "decode.mode framewise is for decoders that take the whole video at once, and this model's decodes frame by "
            "frame anyway; choose auto, whole or tiled"
        )
    pixels, frames = "pixels of a latent", "frames of a latent"
    names = dict.fromkeys(("tile_height", "tile_width", "stride_height", "stride_width"), (spec.spatial_factor, pixels))
    if spec.cuts_time:
        names |= dict.fromkeys(("tile_frames", "stride_frames"), (spec.temporal_factor, frames))
    for name, (factor, what) in names.items():
        value = getattr(config, name)
        if value % factor:
            raise UserError(
                f"decode.{name} must be a multiple of the {factor} {what}, got {value}; "
                f"the next one is {value // factor * factor + factor}"
            )


def make_grid(config: DecodeConfig, size: tuple[int, int], scale: int) -> TileGrid:
    """The tiles of a latent frame of `size` rows and columns: those of `blend.cover` in each direction.

    A frame that is no larger than a tile is one tile, although a stride may be smaller: it is not tiled.
    """
    tile = config.tile_height // scale, config.tile_width // scale
    stride = config.stride_height // scale, config.stride_width // scale
    if size[0] <= tile[0] and size[1] <= tile[1]:
        return whole_frame(size, scale)
    rows, columns = (cover(size[dim], tile[dim], stride[dim], config.tiles) for dim in (0, 1))
    if config.tiles == "full":
        return TileGrid(rows=rows, columns=columns, scale=scale)
    blend = config.tile_height - config.stride_height, config.tile_width - config.stride_width
    strides = config.stride_height, config.stride_width
    return TileGrid(rows=rows, columns=columns, scale=scale, diffusers=(strides, blend))


def whole_frame(size: tuple[int, int], scale: int) -> TileGrid:
    """A latent frame of `size` rows and columns as one tile."""
    rows, columns = size
    return TileGrid(rows=((0, rows),), columns=((0, columns),), scale=scale)


def share_tiles(sizes: Sequence[int], num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """Assign tiles to ranks, in order: the largest remaining tile goes to the rank with the least work.

    Tiles of `decode.tiles diffusers` are smaller at the border, so equal counts would be unequal work. Ties go to the last
    rank, since rank 0 also blends and writes the video.
    """
    loads = [0] * num_ranks
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for tile in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        rank = min(reversed(range(num_ranks)), key=loads.__getitem__)
        shares[rank].append(tile)
        loads[rank] += sizes[tile]
    return tuple(tuple(sorted(share)) for share in shares)


@dataclass(frozen=True, kw_only=True)
class _Way:
    """One way to decode a video: its tiles, their ranks, and its chunks of time."""

    grid: TileGrid
    shares: tuple[tuple[int, ...], ...]
    time: TimeSettings


def plan_decode(
    config: DecodeConfig, vae: Any, size: tuple[int, int, int], *, world: Axis, seed: int = 0
) -> DecodePlan:
    """Plan the decode of latents of `size` frames, rows and columns; every rank of `world` calls this alike.

    `seed` is for decoders that take noise. Only `auto` communicates: each rank's free memory, where memory is a bound.
    """
    adapter = adapter_of(vae)
    if config.mode not in ("auto", *adapter.decode_modes):
        raise UserError(
            f"decode.mode {config.mode} is not for {adapter.name}; choose auto, {', '.join(adapter.decode_modes)}"
        )
    ways = _possible_ways(config, vae, size, world_size=world.size, seed=seed)
    mode, why = _choose(config, vae, ways, world=world, num_latents=size[0])
    way = ways[mode]
    return DecodePlan(mode=mode, grid=way.grid, shares=way.shares, time=way.time, why=why)


def _possible_ways(
    config: DecodeConfig, vae: Any, size: tuple[int, int, int], *, world_size: int, seed: int
) -> dict[DecodeMode, _Way]:
    """The model's distinct ways to decode this video, the most exact first."""
    adapter, num_latents = adapter_of(vae), size[0]
    scale = adapter.spatial_factor(vae.config)
    whole, grid = whole_frame(size[1:], scale), make_grid(config, size[1:], scale)
    on_first = ((0,), *[()] * (world_size - 1))
    areas = [rows * columns for rows, columns in map(grid.latent_size, range(len(grid.tiles)))]
    ways: dict[DecodeMode, _Way] = {}
    for mode in adapter.decode_modes:
        time = adapter.time_settings(vae.config, mode, config, num_latents=num_latents, seed=seed)
        if mode == "tiled" and grid != whole:
            ways[mode] = _Way(grid=grid, shares=share_tiles(areas, world_size), time=time)
        elif mode == "whole" or (mode == "framewise" and time.chunk is not None):
            ways[mode] = _Way(grid=whole, shares=on_first, time=time)
    return ways


_SMALL = {"framewise": "the video is no longer than a chunk", "tiled": "a frame is no larger than a tile"}


def _choose(
    config: DecodeConfig, vae: Any, ways: Mapping[DecodeMode, _Way], *, world: Axis, num_latents: int
) -> tuple[DecodeMode, str]:
    """Choose one of the ways, with the reason."""
    adapter = adapter_of(vae)
    if len(ways) == 1:
        return "whole", " and ".join(_SMALL[mode] for mode in adapter.decode_modes if mode != "whole")
    if config.mode in ways:
        return config.mode, f"decode.mode is {config.mode}"  # type: ignore[return-value]
    if config.mode != "auto":
        left = "framewise" if "framewise" in ways else "whole"
        return left, f"decode.mode is {config.mode}, but {_SMALL[config.mode]}"  # type: ignore[return-value]
    free = _free_bytes(vae, world)
    if free is None:
        return "whole", "exact, and the memory of a CPU is no bound"
    needs = {mode: max(_peaks(vae, way, num_latents)) for mode, way in ways.items()}
    return choose_mode(needs, free=free)


_WORDS = {"whole": "whole frames", "framewise": "whole frames, a few at a time,", "tiled": "tiles"}


def choose_mode(needs: Mapping[DecodeMode, int], *, free: Sequence[int]) -> tuple[DecodeMode, str]:
    """Choose the mode of `auto`, with the reason: the first whose busiest rank has the bytes that it `needs` free.

    Whole frames are decoded on rank 0 alone, so its memory decides. If none fits, the mode that needs least is chosen.
    """
    room = {mode: min(free) if mode == "tiled" else free[0] for mode in needs}
    first, *others = needs
    shown = {mode: apart(needs[mode], room[mode]) for mode in needs}
    numbers = f"{_WORDS[first]} need about {shown[first][0]} GiB of the {shown[first][1]} GiB free on rank 0" + "".join(
        f", {_WORDS[mode]} {shown[mode][0]} GiB of {shown[mode][1]} GiB on a rank" for mode in others
    )
    fitting = next((mode for mode in needs if needs[mode] <= room[mode]), None)
    if fitting == first:
        return first, f"exact, and it fits: {numbers}"
    chosen = min(needs, key=needs.__getitem__) if fitting is None else fitting  # on ties the most exact
    if chosen == first:
        return first, f"it may not fit, but tiles over so few ranks need no less: {numbers}"
    return chosen, f"{_WORDS[first]} do not fit: {numbers}"


def _free_bytes(vae: Any, world: Axis) -> list[int] | None:
    """Bytes that torch can still allocate on each rank's GPU, or a process on each rank's CPU.

    None on a CPU if the memory of the exact decode does not grow with the video.
    """
    make_ready(vae)  # offload frees memory for the VAE
    if vae.device.type == "cuda":
        unused = torch.cuda.memory_reserved(vae.device) - torch.cuda.memory_allocated(vae.device)
        free = torch.cuda.mem_get_info(vae.device)[0] + unused
    elif adapter_of(vae).exact_decode_is_bounded:
        return None
    else:
        free = _free_host_bytes()
    trace = world.trace("decode, free memory")
    mine = torch.tensor([free], device=vae.device)
    return [int(free) for free in gather_copies(mine, "agreement", group=world.group, trace=trace)]


def _free_host_bytes() -> int:
    """Available memory on Linux, or free pages elsewhere."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _peaks(vae: Any, way: _Way, num_latents: int) -> Iterator[int]:
    """Peak bytes of each rank while it decodes its tiles: all their states, and the work on the largest."""
    # Without the name of the checkpoint, which may be a Path and not JSON.
    config = json.dumps({key: value for key, value in vae.config.items() if not key.startswith("_")}, sort_keys=True)
    latents = torch.empty(1, 1, num_latents, 1, 1, device="meta")
    # Later chunks add nothing; without them, videos of many lengths share one trace, which takes seconds.
    if way.time.chunk is not None:
        stride, chunk = way.time.chunk
        shown = min(num_latents, chunk + (_SHOWN_CHUNKS - 1) * stride)
    else:
        shown = open_decoder(vae, latents, replace(way.time, noise_scale=0.0)).chunks[:_SHOWN_CHUNKS][-1][1]
    for share in way.shares:
        sizes = [way.grid.latent_size(tile) for tile in share]
        parts = [tile_bytes(adapter_of(vae), config, (shown, *size), way.time) for size in sizes]
        work, kept = max((work for work, _ in parts), default=0), sum(kept for _, kept in parts)
        yield int(_UNCOUNTED * (work + kept))


def tiled_share(
    config: DecodeConfig, vae: Any, size: tuple[int, int, int], *, world_size: int
) -> tuple[int, float] | None:
    """The cost of tiled decoding on the busiest of so many ranks: bytes without weights, and its share of a frame's work.

    `size` is frames, rows and columns of the latents; tiles overlap, so the share of a single rank is more than 1. None if the
    model has no tiles, or a frame is no larger than one. `vae` may be on the meta device.
    """
    way = _possible_ways(config, vae, size, world_size=world_size, seed=0).get("tiled")
    if way is None:
        return None
    areas = (sum(prod(way.grid.latent_size(tile)) for tile in share) for share in way.shares)
    return max(_peaks(vae, way, size[0])), max(areas) / (size[1] * size[2])


@functools.cache
def tile_bytes(adapter: ModelAdapter, config: str, size: tuple[int, int, int], time: TimeSettings) -> tuple[int, int]:
    """Bytes of tensors while a tile of latent `size` (frames, rows, columns) is decoded by the VAE of a JSON `config`.

    Returns the temporary bytes of one chunk, and the bytes of the tile's state. The decoder runs on the meta device, where
    tensors have no data; from the third chunk on its peak is constant. UserError if the configured decoder does not run.
    """
    try:
        return _traced_bytes(adapter, config, size, time)
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the VAE's configuration describes no decoder of {adapter.name} that runs ({error})"
        ) from error


def _traced_bytes(
    adapter: ModelAdapter, config: str, size: tuple[int, int, int], time: TimeSettings
) -> tuple[int, int]:
    with torch.device("meta"):
        twin = adapter.build("vae", json.loads(config)).eval()
        latents = torch.empty(1, adapter.latent_channels(twin.config), *size)
    decoder = open_decoder(twin, latents, replace(time, noise_scale=0.0))
    state = decoder.start()
    with torch.no_grad(), LiveBytes() as live:
        pieces = (
            decode_step(decoder, decoder.latents(index), state, index=index)
            for index in range(min(_SHOWN_CHUNKS, len(decoder.chunks)))
        )
        for _ in map(clamp, decoder.join(pieces)):
            pass
    kept = sum(entry.nbytes for entry in state or () if isinstance(entry, torch.Tensor))
    return live.peak - kept, kept
