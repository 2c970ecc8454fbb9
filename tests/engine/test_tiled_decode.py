"""Tiles over any number of ranks are the VAE's own `tiled_decode` on one, bit for bit, with one latent frame in memory."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from engine import decode_plan, tiled_decode
from engine.adapters.wan_published import PUBLISHED
from engine.apply import Ranks
from engine.config import DecodeConfig, MethodConfig, ModelConfig, OutputConfig, RunConfig, VideoConfig
from engine.decode import empty_cache, stream_decode, to_uint8
from engine.decode_plan import GIB, check_tiles, choose_mode, make_grid, plan_decode, share_tiles, tile_bytes
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.group_of_one import GROUP_OF_ONE
from engine.load import load_pipeline
from engine.planner.live_bytes import LiveBytes
from engine.tiled_decode import fade_in, stream_tiles
from parallel.mesh import Axis, SeqMesh, build_mesh
from tests.ranks import run_ranks
from tests.tiny_pipelines import random_wan, save_random_wan

SCALE = 4  # pixels per latent of the random VAE
TILED = DecodeConfig(mode="tiled", tile_height=16, tile_width=16, stride_height=12, stride_width=12)


class Case(NamedTuple):
    """A latent video [frames, rows, columns], its tiles, how many there are, and what is broken on purpose."""

    size: tuple[int, int, int]
    tiles: int
    config: DecodeConfig = TILED
    fault: str = ""


CASES = [
    Case((3, 8, 12), 12),
    Case((1, 8, 12), 12),
    Case((2, 5, 4), 4),  # cut to 2 rows and 1 column at the border
    Case((3, 9, 3), 3),  # narrower than a tile
    Case(
        (2, 4, 5), 2, dataclasses.replace(TILED, stride_height=16, stride_width=16)
    ),  # no overlap, ranks without tiles
    Case((2, 7, 9), 14, dataclasses.replace(TILED, tile_width=24, stride_height=4, stride_width=20)),  # much overlap
    Case((3, 4, 4), 1),  # one tile: decoded whole, although the stride is smaller
]
EQUAL_TILES = dataclasses.replace(TILED, stride_height=16, stride_width=16)
FAULTS = [
    Case((3, 8, 12), 12, fault="no blend"),
    Case((3, 8, 12), 12, fault="swapped tiles"),
    Case((3, 8, 8), 4, EQUAL_TILES, fault="one cache for all"),
]


@functools.cache
def random_vae() -> AutoencoderKLWan:
    return random_wan().vae


@functools.cache
def mesh_of_all(ranks: int) -> SeqMesh:
    return build_mesh(cfg=1, ring=1, ulysses=ranks, device=torch.device("cpu"), timeout=timedelta(seconds=60))


def draw(size: tuple[int, int, int], channels: int = 4) -> Tensor:
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def tiled_by_diffusers(vae: AutoencoderKLWan, latents: Tensor, config: DecodeConfig) -> Tensor:
    """Frames [1, 3, T, H, W] of the VAE's own `tiled_decode`, as WanPipeline calls it."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(latents)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(latents)
    vae.enable_tiling(config.tile_height, config.tile_width, config.stride_height, config.stride_width)
    whole = vae.decode(latents / inverse_std + mean).sample
    vae.disable_tiling()
    return whole


@contextmanager
def broken(fault: str) -> Iterator[None]:
    """Break one thing of the tiled decode."""
    cut, step, caches = tiled_decode.cut_tile, tiled_decode.decode_step, []

    def step_with_one_cache(vae, latent, cache, *, first):
        caches.append(cache)
        return step(vae, latent, cache if first else caches[0], first=first)

    faults = {
        "": (tiled_decode, "cut_tile", cut),
        "no blend": (tiled_decode, "fade_in", lambda *_, **__: None),
        "swapped tiles": (tiled_decode, "cut_tile", lambda latent, grid, i: cut(latent, grid, {0: 1, 1: 0}.get(i, i))),
        "one cache for all": (tiled_decode, "decode_step", step_with_one_cache),
    }
    with mock.patch.object(*faults[fault]):
        yield


def compare(rank: int, case: Case, world: Axis) -> bool | None:
    """Whether rank 0's frames are those of diffusers; None on the others, which get no frames."""
    vae, latents = random_vae(), draw(case.size)
    plan = plan_decode(case.config, vae, case.size[1:], world=world)
    assert plan.record["tiles"] == sum(plan.record["tiles_by_rank"]) == case.tiles
    assert plan.mode == ("tiled" if case.tiles > 1 else "whole")
    with broken(case.fault):
        parts = list(stream_tiles(vae, latents, plan, world=world))
    assert all(entry is None for entry in vae._feat_map)
    if rank > 0:
        assert parts == []
        return None
    assert [part.shape[2] for part in parts] == [1] + [4] * (case.size[0] - 1)
    return torch.equal(torch.cat(parts, dim=2), tiled_by_diffusers(vae, latents, case.config))


def compare_on_ranks(rank: int, case: Case) -> bool | None:
    return compare(rank, case, mesh_of_all(torch.distributed.get_world_size()).world)


@pytest.fixture
def alone() -> Iterator[Axis]:
    yield GROUP_OF_ONE.acquire().world
    GROUP_OF_ONE.release()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_on_one_rank(alone, case):
    assert compare(0, case, alone)


@pytest.mark.parametrize("ranks", [3, 4])
def test_tiles_over_ranks(ranks, tmp_path):
    for case, by_rank in zip(CASES, run_ranks(ranks, compare_on_ranks, CASES, tmp_path), strict=True):
        assert by_rank == [True, *[None] * (ranks - 1)], case


def test_tiles_over_two_ranks_and_what_is_broken_is_seen(tmp_path):
    cases = [*CASES, *FAULTS, Case((3, 8, 8), 4, EQUAL_TILES)]
    for case, by_rank in zip(cases, run_ranks(2, compare_on_ranks, cases, tmp_path), strict=True):
        assert by_rank == [not case.fault, None], case


@pytest.mark.parametrize("dim", [-2, -1])
def test_fading_all_lines_at_once_is_fading_line_by_line(dim):
    vae = random_vae()
    by_line = {-2: vae.blend_v, -1: vae.blend_h}[dim]
    for extent in range(70):
        before, tile = draw((2, 64, 64)), draw((2, 64, 64)).flip(dim)
        tile = tile.narrow(dim, 0, 40) if extent % 2 else tile  # cut at the border
        expected = by_line(before, tile.clone(), extent)
        fade_in(tile, before, extent=extent, dim=dim)
        assert torch.equal(tile, expected), extent


def config_of(folder: str, decode: DecodeConfig) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=folder, device="cpu"),
        video=VideoConfig(num_frames=9, height=32, width=48),
        method=MethodConfig(name="direct", window_frames=3),
        decode=decode,
        output=OutputConfig(progress="off"),
    )


def decode_by_engine(rank: int, case: tuple[str, DecodeConfig]) -> tuple[list[np.ndarray], dict]:
    """Frames and plan of an engine on all ranks."""
    mesh = mesh_of_all(torch.distributed.get_world_size())
    with mock.patch("engine.engine.load_pipeline", functools.cache(load_pipeline)):
        engine = LongVideoEngine(config_of(*case), Ranks(mesh=mesh))
    frames = list(engine.decode(draw((3, 8, 12))))
    engine.close()
    return frames, engine.decode_plan


def test_the_engine_decodes_as_configured_and_says_how(tmp_path):
    folder = str(save_random_wan(tmp_path / "wan"))
    cases = [(folder, TILED), (folder, DecodeConfig())]
    [(tiled, plan), (none, other_plan)], [(whole, whole_plan), (nothing, _)] = run_ranks(
        2, decode_by_engine, cases, tmp_path
    )
    assert none == nothing == []
    vae, latents = random_vae(), draw((3, 8, 12))
    by_diffusers = to_uint8(tiled_by_diffusers(vae, latents, TILED))
    by_stream = np.concatenate([to_uint8(frames) for frames in stream_decode(vae, latents)])
    assert np.array_equal(np.concatenate(tiled), by_diffusers)
    assert np.array_equal(np.concatenate(whole), by_stream)
    assert not np.array_equal(by_diffusers, by_stream)
    assert plan == {"mode": "tiled", "tiles": 12, "tiles_by_rank": [6, 6], "why": "decode.mode is tiled"}
    assert plan == other_plan
    assert whole_plan["mode"] == "whole"
    assert whole_plan["tiles_by_rank"] == [1, 0]


def peak_bytes(world: Axis, num_latents: int) -> int:
    vae, latents = random_vae(), draw((num_latents, 8, 12))
    plan = plan_decode(TILED, vae, (8, 12), world=world)
    with LiveBytes() as live:
        for frames in stream_tiles(vae, latents, plan, world=world):
            del frames
    assert live.now == 0  # neither caches nor frames are left
    return live.peak


def test_memory_does_not_grow_with_length(alone):
    peaks = {num_latents: peak_bytes(alone, num_latents) for num_latents in (3, 5, 8)}
    assert len(set(peaks.values())) == 1, peaks


def test_a_tile_has_one_cache_and_a_stopped_stream_leaves_none(alone):
    vae, latents = random_vae(), draw((3, 8, 12))
    plan = plan_decode(TILED, vae, (8, 12), world=alone)
    with mock.patch.object(tiled_decode, "empty_cache", mock.Mock(wraps=empty_cache)) as made, LiveBytes() as live:
        stream = stream_tiles(vae, latents, plan, world=alone)
        next(stream)
        assert made.call_count == 12
        assert live.now > 0
        stream.close()
        assert live.now == 0
    assert all(entry is None for entry in vae._feat_map)
    assert compare(0, CASES[0], alone)


@pytest.mark.parametrize("num_tiles", [1, 2, 5, 6])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_tiles_are_shared_evenly(num_tiles, ranks):
    for sizes in itertools.product((16, 8, 3), repeat=num_tiles):
        shares = share_tiles(sizes, ranks)
        assert sorted(tile for share in shares for tile in share) == list(range(num_tiles))
        loads = [sum(sizes[tile] for tile in share) for share in shares]
        lower_bound = max(sum(sizes) / ranks, max(sizes))
        assert max(loads) <= 2 * lower_bound
        if num_tiles < ranks:
            assert loads[0] == 0  # rank 0 blends and writes
    # The frame of Wan2.1 at 480p on 8 ranks: equal numbers of tiles in order would be 2048.
    grid = make_grid(DecodeConfig(), (60, 104), 8)
    sizes = [rows * columns for rows, columns in map(grid.latent_size, range(15))]
    assert max(sum(sizes[tile] for tile in share) for share in share_tiles(sizes, 8)) == 1408


def test_the_estimate_is_what_a_decode_takes(alone):
    vae, latents = random_vae(), draw((4, 12, 12))
    with LiveBytes() as live:
        for frames in stream_decode(vae, latents):
            del frames
    assert sum(tile_bytes(json.dumps(dict(vae.config)), 12, 12)) == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize(
    ("whole", "tiled", "free", "mode", "why"),
    [
        (4, 1, (5, 2), "whole", "exact, and it fits: whole frames need about 4.0 GiB of the 5.0 GiB free on rank 0"),
        (4, 1, (3, 9), "tiled", "whole frames do not fit: .* tiles 1.0 GiB of 3.0 GiB on a rank"),
        (4, 4, (3,), "whole", "tiles over so few ranks need no less"),
    ],
)
def test_auto_is_whole_where_it_fits(whole, tiled, free, mode, why):
    got = choose_mode(whole * GIB, tiled * GIB, free=[x * GIB for x in free])
    assert got[0] == mode
    assert re.search(why, got[1])


def test_auto_weighs_a_real_vae_against_free_memory(alone):
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(PUBLISHED["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]["vae"])
    world = dataclasses.replace(alone, ranks=tuple(range(8)))
    plans = {}
    for gib in (80, 6):
        with mock.patch.object(decode_plan, "_free_bytes", return_value=[gib * GIB] * 8):
            plans[gib] = plan_decode(DecodeConfig(), vae, (60, 104), world=world)
    assert plans[80].mode == "whole"
    assert plans[6].mode == "tiled"
    assert plans[6].record["tiles_by_rank"] == [1, 2, 2, 2, 2, 2, 2, 2]
    assert "9.0 GiB of the 6.0 GiB" in plans[6].why


def test_impossible_tiles_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"stride_width must lie in \[1, decode.tile_width\], got stride 300 and tile 256"
    ):
        DecodeConfig(stride_width=300)
    with pytest.raises(UserError, match="stride_height must lie in .* got stride 0"):
        DecodeConfig(stride_height=0)
    with pytest.raises(UserError, match="decode.tile_height must be a multiple of the 8 pixels .* got 100; .* 104"):
        check_tiles(DecodeConfig(tile_height=100, stride_height=96), 8)
    folder = str(save_random_wan(tmp_path / "wan"))
    with pytest.raises(UserError, match="decode.stride_height must be a multiple of the 4 pixels"):
        LongVideoEngine(config_of(folder, dataclasses.replace(TILED, stride_height=6)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tiles_on_a_gpu(alone):
    vae = random_wan().vae.to("cuda")
    for case in CASES:
        latents = draw(case.size).cuda()
        plan = plan_decode(case.config, vae, case.size[1:], world=alone)
        frames = torch.cat(list(stream_tiles(vae, latents, plan, world=alone)), dim=2)
        assert torch.equal(frames, tiled_by_diffusers(vae, latents, case.config))
    auto = plan_decode(dataclasses.replace(TILED, mode="auto"), vae, (8, 12), world=alone)
    assert auto.why.startswith("exact, and it fits: ")
