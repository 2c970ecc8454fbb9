"""Errors of tiled decodes of the trained embedded models, at the border and inside."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.adapters import ADAPTERS, LTX, WAN
from engine.adapters.blend import cover, lay_over, overlap_share
from engine.config import DecodeConfig
from engine.decode.pieces import stream_decode
from engine.decode.tiles import stream_tiles
from engine.decode.tiling import make_grid, plan_decode
from parallel.mesh import Axis
from tiny.world import render, sample_scene

REPOSITORY = Path(__file__).resolve().parents[3]
BORDER = 8  # pixels, or frames
FAMILIES = {"wan": WAN, "ltx": LTX}
TILES = {
    "wan": {"tile_height": 40, "tile_width": 32, "stride_height": 28, "stride_width": 24},
    "ltx": {"tile_height": 48, "tile_width": 40, "stride_height": 32, "stride_width": 24},
}
# Height and width in pixels, odd numbers of latents among them, and frames.
SIZES = {"wan": [(64, 60, 9), (60, 52, 9)], "ltx": [(64, 64, 33), (56, 64, 37)]}
CASES = [(family, size) for family, sizes in SIZES.items() for size in sizes]


@functools.cache
def trained_vae(family: str) -> Any:
    folder = REPOSITORY / "tiny" / family / "vae"
    return FAMILIES[family].vae_class.from_pretrained(folder, use_safetensors=True).eval()


@torch.no_grad()
def encode(family: str, height: int, width: int, num_frames: int, *, clip_seed: int = 0) -> Tensor:
    """Normalised latents [1, z, F, h, w] of a clip of the embedded world."""
    vae = trained_vae(family)
    clip = render(sample_scene(np.random.default_rng(clip_seed)), num_frames)[:, :height, :width]
    video = torch.from_numpy(clip.copy()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    latents = vae.encode(video).latent_dist.mode()
    numbers = (
        (vae.latents_mean, vae.latents_std) if family == "ltx" else (vae.config.latents_mean, vae.config.latents_std)
    )
    mean, std = (torch.as_tensor(values).view(1, -1, 1, 1, 1) for values in numbers)
    return (latents - mean) / std


def decode(family: str, latents: Tensor, config: DecodeConfig, world: Axis) -> Tensor:
    vae = trained_vae(family)
    plan = plan_decode(config, vae, tuple(latents.shape[2:]), world=world)
    assert plan.mode == config.mode
    stream = (
        stream_tiles(vae, latents, plan, world=world)
        if plan.mode == "tiled"
        else stream_decode(vae, latents, plan.time)
    )
    return torch.cat(list(stream), dim=2)


def levels(tiled: Tensor, whole: Tensor) -> Tensor:
    """Mean error in grey levels, of 255, for each frame, row and column: [T, H, W]."""
    return (tiled - whole).abs().mul(127.5)[0].mean(dim=0)


def groups(error: Tensor, dim: int) -> list[float]:
    """Mean error of each `BORDER` lines along a dimension, the last ones last."""
    others = tuple(other for other in range(3) if other != dim)
    lines = error.mean(dim=others).flip(0)
    return [float(part.mean()) for part in lines.split(BORDER)][::-1]


@pytest.mark.parametrize(("family", "size"), CASES, ids=str)
def test_no_border_is_worse_than_the_inside(alone, family, size):
    """Rows, columns, and for LTX-Video frames; the negative control is that diffusers' tiles are worse there, and everywhere."""
    config = DecodeConfig(mode="tiled", tile_frames=16, stride_frames=8, **TILES[family])
    errors: dict[str, list[Tensor]] = {"full": [], "diffusers": []}
    for clip_seed in range(3):
        latents = encode(family, *size, clip_seed=clip_seed)
        whole = decode(family, latents, DecodeConfig(mode="whole"), alone)
        for tiles, found in errors.items():
            found.append(levels(decode(family, latents, dataclasses.replace(config, tiles=tiles), alone), whole))
    full, other = (torch.stack(found).mean(0) for found in errors.values())
    assert full.mean() < 0.7 * other.mean()
    for dim in (0, 1, 2) if family == "ltx" else (1, 2):
        *inside, last = groups(full, dim)
        assert last <= max(inside), (dim, inside, last)
        assert last < groups(other, dim)[-1]


def test_frames_of_later_chunks_are_not_late(alone):
    """At the native size of the embedded LTX-Video, whose whole decode is the truth: chunks alone, no spatial tiles."""
    latents = encode("ltx", 64, 64, 61)
    whole = decode("ltx", latents, DecodeConfig(mode="whole"), alone)
    config = DecodeConfig(mode="framewise", tile_frames=32, stride_frames=24)
    full = levels(decode("ltx", latents, config, alone), whole).mean(dim=(1, 2))
    late = levels(decode("ltx", latents, dataclasses.replace(config, tiles="diffusers"), alone), whole).mean(dim=(1, 2))
    assert full.max() < 0.5
    assert late[-BORDER:].mean() > 20 * full[-BORDER:].mean()


@pytest.mark.parametrize("piece", [2, 5, 16])
def test_full_pieces_cover_everything_evenly(piece):
    for stride in range(1, piece + 1):
        for size in range(1, 70):
            ranges = cover(size, piece, stride, "full")
            assert ranges[0][0] == 0
            assert ranges[-1][1] == size
            assert {stop - start for start, stop in ranges} == {min(piece, size)}
            steps = [b[0] - a[0] for a, b in itertools.pairwise(ranges)]
            assert all(0 < step <= stride for step in steps)
            assert max(steps, default=0) - min(steps, default=0) <= 1
            assert (len(ranges) - 2) * stride + piece < size or len(ranges) == 1  # one fewer would leave a gap


def test_the_published_sizes_have_no_redundant_or_narrow_tile():
    wan, ltx = DecodeConfig(), DecodeConfig(tile_height=512, tile_width=512, stride_height=448, stride_width=448)
    grid = make_grid(wan, (60, 104), 8)
    assert (grid.rows, grid.columns) == (((0, 32), (14, 46), (28, 60)), ((0, 32), (24, 56), (48, 80), (72, 104)))
    grid = make_grid(ltx, (15, 22), 32)
    assert (grid.rows, grid.columns) == (((0, 15),), ((0, 16), (6, 22)))
    grid = make_grid(dataclasses.replace(wan, tiles="diffusers"), (60, 104), 8)
    assert grid.columns[-2:] == ((72, 104), (96, 104))


@pytest.mark.parametrize(
    "ranges", [((0, 32), (14, 46), (28, 60)), ((0, 5), (1, 6), (2, 7), (3, 8)), ((0, 4), (4, 8))], ids=str
)
def test_shares_are_weights_that_sum_to_one_without_a_step(ranges):
    size = ranges[-1][1]
    weights = torch.zeros(len(ranges), size, dtype=torch.float64)
    for index, (start, stop) in enumerate(ranges):
        share = overlap_share(ranges, index)
        assert share.dtype == torch.float64
        assert share.shape == (stop - start,)
        weights[:, start:stop] *= 1 - share
        weights[index, start:stop] += share
    assert torch.allclose(weights.sum(0), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-15)
    assert weights.min() >= 0
    overlap = min(before[1] - after[0] for before, after in itertools.pairwise(ranges))
    assert weights.diff(dim=1).abs().max() <= (2.5 / overlap if overlap else 1)  # of the S-curve, the steepest line


def test_equal_tiles_give_exactly_their_value():
    value = torch.full((1, 3, 1, 4, 11), 0.1234567)
    assert torch.equal(lay_over(value, value, torch.linspace(0, 1, 11, dtype=torch.float64), dim=-1), value)


def test_every_model_is_here():
    assert {adapter.vae_class for adapter in ADAPTERS} == {adapter.vae_class for adapter in FAMILIES.values()}
