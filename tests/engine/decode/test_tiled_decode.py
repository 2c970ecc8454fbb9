"""Tiles over any number of ranks are those of one, and with `decode.tiles diffusers` the VAE's own, bit for bit; one latent frame in memory."""

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from engine.adapters.base import TimeSettings
from engine.adapters.blend import fade_in
from engine.adapters.wan import WAN, _CausalDecoder
from engine.adapters.wan_published import PUBLISHED
from engine.config import DecodeConfig, MethodConfig, ModelConfig, OutputConfig, RunConfig, VideoConfig
from engine.decode import tiles, tiling
from engine.decode.decoder import open_decoder
from engine.decode.live_bytes import LiveBytes
from engine.decode.pieces import stream_decode, to_uint8
from engine.decode.tiles import stream_tiles
from engine.decode.tiling import GIB, check_tiles, choose_mode, make_grid, plan_decode, share_tiles, tile_bytes
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.ranks.layouts import Ranks
from parallel.mesh import Axis, build_mesh
from tests.ranks import PATIENCE, first_ranks, run_ranks
from tests.tiny_pipelines import random_wan, save_random_wan

NUM_RANKS = (1, 2, 3, 4)
FULL = DecodeConfig(mode="tiled", tile_height=16, tile_width=16, stride_height=12, stride_width=12)
TILED = dataclasses.replace(FULL, tiles="diffusers")
EQUAL_TILES = dataclasses.replace(TILED, stride_height=16, stride_width=16)
MUCH_OVERLAP = dataclasses.replace(TILED, tile_width=24, stride_height=4, stride_width=20)


class Case(NamedTuple):
    """A latent video [frames, rows, columns], its tiles, how many there are, and what is broken on purpose."""

    size: tuple[int, int, int]
    tiles: int
    config: DecodeConfig = TILED
    fault: str = ""


CASES = [
    Case((3, 8, 12), 12),
    Case((2, 5, 4), 4),  # cut to 2 rows and 1 column at the border
    Case((1, 9, 3), 3),  # narrower than a tile
    Case((2, 4, 5), 2, EQUAL_TILES),  # no overlap, ranks without tiles
    Case((2, 7, 9), 14, MUCH_OVERLAP),
    Case((2, 4, 4), 1),  # one tile: decoded whole, although the stride is smaller
    Case((3, 8, 12), 12, FULL),
    Case((2, 5, 4), 2, FULL),
    Case((1, 9, 3), 3, FULL),
    Case((2, 4, 5), 2, dataclasses.replace(EQUAL_TILES, tiles="full")),
    Case((2, 7, 9), 8, dataclasses.replace(MUCH_OVERLAP, tiles="full")),  # up to four tiles over one row
]
FAULTS = [
    Case((3, 8, 12), 12, fault="no blend"),
    Case((3, 8, 12), 12, FULL, fault="first tile only"),
    Case((3, 8, 12), 12, FULL, fault="swapped tiles"),
    Case((3, 8, 12), 12, fault="swapped tiles"),
    Case((3, 8, 8), 4, EQUAL_TILES, fault="one cache for all"),
]
NO_FAULT = Case((3, 8, 8), 4, EQUAL_TILES)
ENGINES = (TILED, DecodeConfig())


@functools.cache
def random_vae() -> AutoencoderKLWan:
    return random_wan().vae


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


def tiled_by_hand(vae: AutoencoderKLWan, latents: Tensor, config: DecodeConfig) -> Tensor:
    """Frames [1, 3, T, H, W] of full tiles: each decoded whole, weighed line by line, and divided by the sum of the weights."""

    def ranges(size: int, tile: int, stride: int) -> list[tuple[int, int]]:
        count = 1
        while (size - tile) > (count - 1) * stride:
            count += 1
        gap = max(size - tile, 0)
        return [(gap * i // max(count - 1, 1), gap * i // max(count - 1, 1) + min(tile, size)) for i in range(count)]

    def weight(line: int, start: int, stop: int, size: int) -> float:
        left = math.inf if start == 0 else line + 0.5 - start
        right = math.inf if stop == size else stop - line - 0.5
        return min(left, right, size) ** 2

    rows, columns = latents.shape[-2:]
    frames = torch.zeros(1, 3, 4 * latents.shape[2] - 3, rows * 4, columns * 4, dtype=torch.float64)
    total = torch.zeros(rows * 4, columns * 4, dtype=torch.float64)
    for top, bottom in ranges(rows, config.tile_height // 4, config.stride_height // 4):
        for left, right in ranges(columns, config.tile_width // 4, config.stride_width // 4):
            down = [weight(y, 4 * top, 4 * bottom, 4 * rows) for y in range(4 * top, 4 * bottom)]
            across = [weight(x, 4 * left, 4 * right, 4 * columns) for x in range(4 * left, 4 * right)]
            weights = torch.tensor(down, dtype=torch.float64)[:, None] * torch.tensor(across, dtype=torch.float64)
            tile = torch.cat(list(stream_decode_unclamped(vae, latents[..., top:bottom, left:right])), dim=2)
            frames[..., 4 * top : 4 * bottom, 4 * left : 4 * right] += tile * weights
            total[4 * top : 4 * bottom, 4 * left : 4 * right] += weights
    return (frames / total).clamp(-1.0, 1.0)


def stream_decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Iterator[Tensor]:
    with mock.patch("engine.decode.pieces.clamp", lambda frames: frames):
        yield from stream_decode(vae, latents)


@contextmanager
def broken(fault: str) -> Iterator[None]:
    """Break one thing of the tiled decode."""
    cut, step, caches = tiles.cut_tile, tiles.decode_step, []

    def step_with_one_cache(decoder, latents, cache, *, index, tile):
        caches.append(cache)
        return step(decoder, latents, cache if index == 0 else caches[0], index=index, tile=tile)

    faults = {
        "": (tiles, "cut_tile", cut),
        "first tile only": (
            tiles,
            "lay_over",
            lambda below, tile, share, dim: torch.where(below == 0, tile, below),
        ),
        "no blend": (tiles, "fade_in", lambda *_, **__: None),
        "swapped tiles": (tiles, "cut_tile", lambda latent, grid, i: cut(latent, grid, {0: 1, 1: 0}.get(i, i))),
        "one cache for all": (tiles, "decode_step", step_with_one_cache),
    }
    with mock.patch.object(*faults[fault]):
        yield


def compare(rank: int, case: Case, world: Axis) -> bool | None:
    """Whether rank 0's frames are those of diffusers, or of the tiles by hand; None on the others, which get no frames."""
    vae, latents = random_vae(), draw(case.size)
    plan = plan_decode(case.config, vae, case.size, world=world)
    assert plan.record["tiles"] == sum(plan.record["tiles_by_rank"]) == case.tiles
    assert plan.mode == ("tiled" if case.tiles > 1 else "whole")
    with broken(case.fault):
        parts = list(stream_tiles(vae, latents, plan, world=world))
    assert all(entry is None for entry in vae._feat_map)
    if rank > 0:
        assert parts == []
        return None
    assert [part.shape[2] for part in parts] == [1] + [4] * (case.size[0] - 1)
    frames = torch.cat(parts, dim=2)
    if case.config.tiles == "diffusers":
        return torch.equal(frames, tiled_by_diffusers(vae, latents, case.config))
    return torch.allclose(frames.double(), tiled_by_hand(vae, latents, case.config), rtol=0, atol=2e-6)


class Job(NamedTuple):
    """A case on the first `ranks` ranks, or an engine on all of them."""

    ranks: int
    case: Case | None = None
    config: RunConfig | None = None


def run_job(rank: int, job: Job) -> Any:
    """What `compare` or `decode_by_engine` says; runs on every rank."""
    if job.config is not None:
        return decode_by_engine(job.config)
    world = first_ranks(NUM_RANKS).get(job.ranks)
    return compare(rank, job.case, world) if world is not None else None


def config_of(folder: Path, decode: DecodeConfig) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(folder), device="cpu"),
        video=VideoConfig(num_frames=9, height=32, width=48),
        method=MethodConfig(name="direct", window_frames=3),
        decode=decode,
        output=OutputConfig(progress="off"),
    )


def decode_by_engine(config: RunConfig) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Frames and plan of an engine on all ranks."""
    timeout = PATIENCE
    mesh = build_mesh(cfg=1, ring=1, ulysses=max(NUM_RANKS), device=torch.device("cpu"), timeout=timeout)
    engine = LongVideoEngine(config, Ranks(mesh=mesh))
    assert engine.decoder.decode_plan is None
    frames = list(engine.decode(draw((3, 8, 12))))
    engine.close()
    return frames, engine.decoder.decode_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_random_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory) -> dict[Job, list[Any]]:
    """Results of every job on every rank, from one start of the ranks, which takes most of the time."""
    jobs = [Job(ranks, case) for ranks in NUM_RANKS for case in CASES]
    jobs += [Job(2, case) for case in (*FAULTS, NO_FAULT)]
    jobs += [Job(max(NUM_RANKS), config=config_of(folder, decode)) for decode in ENGINES]
    return dict(zip(jobs, run_ranks(max(NUM_RANKS), run_job, jobs, tmp_path_factory.mktemp("ranks")), strict=True))


@pytest.mark.parametrize("ranks", NUM_RANKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_over_ranks(results, ranks, case):
    assert results[Job(ranks, case)] == [True, None, None, None]


@pytest.mark.parametrize("case", [*FAULTS, NO_FAULT], ids=str)
def test_what_is_broken_is_seen(results, case):
    assert results[Job(2, case)] == [not case.fault, None, None, None]


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


def test_the_engine_decodes_as_configured_and_says_how(results, folder):
    (tiled, tiled_plan), *others = results[Job(max(NUM_RANKS), config=config_of(folder, ENGINES[0]))]
    (whole, whole_plan), *idle = results[Job(max(NUM_RANKS), config=config_of(folder, ENGINES[1]))]
    vae, latents = random_vae(), draw((3, 8, 12))
    by_diffusers = to_uint8(tiled_by_diffusers(vae, latents, TILED))
    by_stream = np.concatenate([to_uint8(frames) for frames in stream_decode(vae, latents)])
    assert np.array_equal(np.concatenate(tiled), by_diffusers)
    assert np.array_equal(np.concatenate(whole), by_stream)
    assert not np.array_equal(by_diffusers, by_stream)
    assert tiled_plan == {"mode": "tiled", "tiles": 12, "tiles_by_rank": [3, 3, 3, 3], "why": "decode.mode is tiled"}
    assert (whole_plan["mode"], whole_plan["tiles_by_rank"]) == ("whole", [1, 0, 0, 0])
    assert others == [([], tiled_plan)] * 3
    assert idle == [([], whole_plan)] * 3


def peak_bytes(world: Axis, num_latents: int, config: DecodeConfig) -> int:
    vae, latents = random_vae(), draw((num_latents, 8, 12))
    plan = plan_decode(config, vae, (num_latents, 8, 12), world=world)
    with LiveBytes() as live:
        for frames in stream_tiles(vae, latents, plan, world=world):
            del frames
    assert live.now == 0  # neither caches nor frames are left
    return live.peak


@pytest.mark.parametrize("config", [TILED, FULL], ids=["diffusers", "full"])
def test_memory_does_not_grow_with_length(alone, config):
    peaks = {num_latents: peak_bytes(alone, num_latents, config) for num_latents in (3, 5, 8)}
    assert len(set(peaks.values())) == 1, peaks


def test_a_tile_has_one_cache_and_a_stopped_stream_leaves_none(alone):
    vae, latents = random_vae(), draw((3, 8, 12))
    plan = plan_decode(TILED, vae, (3, 8, 12), world=alone)
    start = _CausalDecoder.start
    with mock.patch.object(_CausalDecoder, "start", autospec=True, side_effect=start) as made, LiveBytes() as live:
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
        lower_bound = max(sum(sizes) / ranks, *sizes)
        assert max(loads) <= 2 * lower_bound
        if num_tiles < ranks:
            assert loads[0] == 0  # rank 0 blends and writes
    # The frame of Wan2.1 at 480p on 8 ranks: equal numbers of tiles in order would be 2048.
    grid = make_grid(DecodeConfig(tiles="diffusers"), (60, 104), 8)
    sizes = [rows * columns for rows, columns in map(grid.latent_size, range(15))]
    assert max(sum(sizes[tile] for tile in share) for share in share_tiles(sizes, 8)) == 1408


def test_the_estimate_is_what_a_decode_takes(alone):
    vae, latents = random_vae(), draw((4, 12, 12))
    with LiveBytes() as live:
        for frames in stream_decode(vae, latents):
            del frames
    assert sum(tile_bytes(WAN, json.dumps(dict(vae.config)), (4, 12, 12), TimeSettings())) == pytest.approx(
        live.peak, rel=0.1
    )


@pytest.mark.parametrize(
    ("whole", "tiled", "free", "mode", "why"),
    [
        (4, 1, (5, 2), "whole", "exact, and it fits: whole frames need about 4.0 GiB of the 5.0 GiB free on rank 0"),
        (4, 1, (3, 9), "tiled", "whole frames do not fit: .* tiles 1.0 GiB of 3.0 GiB on a rank"),
        (4.02, 1, (3.98, 9), "tiled", "whole frames need about 4.02 GiB of the 3.98 GiB free on rank 0"),
        (4, 4, (3,), "whole", "tiles over so few ranks need no less"),
    ],
)
def test_auto_is_whole_where_it_fits(whole, tiled, free, mode, why):
    got = choose_mode({"whole": whole * GIB, "tiled": tiled * GIB}, free=[x * GIB for x in free])
    assert got[0] == mode
    assert re.search(why, got[1])


def test_auto_weighs_a_real_vae_against_free_memory(alone):
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(PUBLISHED["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]["vae"])
    world = dataclasses.replace(alone, ranks=tuple(range(8)))
    plans = {}
    for gib in (80, 6):
        with mock.patch.object(tiling, "_free_bytes", return_value=[gib * GIB] * 8):
            plans[gib] = plan_decode(DecodeConfig(), vae, (81, 60, 104), world=world)
    assert plans[80].mode == "whole"
    assert plans[6].mode == "tiled"
    assert plans[6].record["tiles_by_rank"] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert "9.1 GiB of the 6.0 GiB" in plans[6].why


def test_impossible_tiles_are_refused(folder):
    with pytest.raises(
        UserError, match=r"stride_width must lie in \[1, decode.tile_width\], got stride 300 and tile 256"
    ):
        DecodeConfig(stride_width=300)
    with pytest.raises(UserError, match=r"stride_height must lie in .* got stride 0"):
        DecodeConfig(stride_height=0)
    spec = WAN.video_spec({}, {})
    with pytest.raises(UserError, match=r"decode.tile_height must be a multiple of the 8 pixels .* got 100; .* 104"):
        check_tiles(DecodeConfig(tile_height=100, stride_height=96), spec)
    with pytest.raises(UserError, match=r"decode.stride_height must be a multiple of the 4 pixels"):
        LongVideoEngine(config_of(folder, dataclasses.replace(TILED, stride_height=6)))


def test_a_mode_that_the_model_lacks_is_refused_before_weights_are_read(folder):
    config = config_of(folder, DecodeConfig(mode="framewise"))
    message = "decode.mode framewise is for decoders that take the whole video at once"
    with (
        mock.patch("engine.engine.load_pipeline", side_effect=AssertionError("weights were read")),
        pytest.raises(UserError, match=message),
    ):
        LongVideoEngine(config)
    with (
        mock.patch("engine.decode.decoder.load_vae_alone", side_effect=AssertionError("weights were read")),
        pytest.raises(UserError, match=message),
        open_decoder(config),
    ):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tiles_on_a_gpu(alone):
    vae = random_wan().vae.to("cuda")
    for case in CASES:
        if case.config.tiles != "diffusers":
            continue
        latents = draw(case.size).cuda()
        plan = plan_decode(case.config, vae, case.size, world=alone)
        frames = torch.cat(list(stream_tiles(vae, latents, plan, world=alone)), dim=2)
        assert torch.equal(frames, tiled_by_diffusers(vae, latents, case.config))
    auto = plan_decode(dataclasses.replace(TILED, mode="auto"), vae, (3, 8, 12), world=alone)
    assert auto.why.startswith("exact, and it fits: ")
