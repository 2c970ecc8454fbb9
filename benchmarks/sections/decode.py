"""Wan's VAE decode: streamed frame by frame, in tiles, and diffusers' whole clip, seconds per latent frame and memory."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.sections.bench import Bench
from benchmarks.sections.model import make_vae
from engine.adapters.base import TimeSettings
from engine.config import DecodeConfig
from engine.decode.pieces import stream_decode
from engine.decode.tiles import stream_tiles
from engine.decode.tiling import DecodePlan, make_grid
from engine.ranks.group_of_one import GROUP_OF_ONE

NUM_LATENTS = 9  # of 81: memory is bounded from the third on, and so is the time of each


def run(bench: Bench) -> None:
    """Each way on the same latents; the first call of each is not counted."""
    vae = make_vae(bench)
    shape = (1, 16, 3, 4, 6) if bench.small else (1, 16, NUM_LATENTS, 60, 104)
    latents = torch.randn(shape, device=bench.device)
    mesh = GROUP_OF_ONE.acquire()
    config = (
        DecodeConfig(tile_height=32, tile_width=32, stride_height=24, stride_width=24)
        if bench.small
        else DecodeConfig()
    )
    grid = make_grid(config, (shape[3], shape[4]), 8)
    plan = DecodePlan(
        mode="tiled", grid=grid, shares=(tuple(range(len(grid.tiles))),), time=TimeSettings(), why="benchmark"
    )

    def consume(frames: Any) -> None:
        for _ in frames:
            pass

    ways: dict[str, Callable[[Any], None]] = {
        "streamed": lambda x: consume(stream_decode(vae, x)),
        "tiled": lambda x: consume(stream_tiles(vae, x, plan, world=mesh.world)),
        "vae.decode of the whole": lambda x: whole(vae, x),
    }
    for name, way in ways.items():
        way(latents[:, :, :2])
        bench.empty_cache()
        measured = bench.seconds_and_peak(lambda way=way: way(latents))
        measured["seconds_per_latent_frame"] = measured["seconds"] / shape[2]
        bench.record(name, measured | {"latent_frames": shape[2], "tiles": len(grid.tiles) if name == "tiled" else 1})
    GROUP_OF_ONE.release()


@torch.no_grad()
def whole(vae: Any, latents: torch.Tensor) -> None:
    """What diffusers does: all frames in memory."""
    vae.decode(latents, return_dict=False)
