"""The LTX VAE in chunks of time: bit-equal to diffusers' framewise and tiled decode, on any ranks, in bounded memory."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo
from torch import Tensor

from engine.adapters.base import TimeSettings
from engine.adapters.blend import fade_in
from engine.adapters.ltx import LTX, _ChunkDecoder, layer_noise_seed
from engine.adapters.ltx_published import PUBLISHED
from engine.config import DecodeConfig
from engine.decode import tiles, tiling
from engine.decode.live_bytes import LiveBytes
from engine.decode.pieces import stream_decode
from engine.decode.tiles import stream_tiles
from engine.decode.tiling import GIB, plan_decode, tile_bytes, tiled_share
from engine.errors import UserError
from parallel.mesh import Axis
from tests.ranks import first_ranks, run_ranks
from tests.tiny_pipelines import random_ltx_vae, random_wan

FULL = DecodeConfig(mode="framewise")  # 16 and 8 frames: 3 latent frames at a time, one further each time
FRAMEWISE = dataclasses.replace(FULL, tiles="diffusers")
WIDE = dataclasses.replace(FRAMEWISE, tile_frames=32, stride_frames=24)
APART = dataclasses.replace(FRAMEWISE, tile_frames=16, stride_frames=16)  # nothing is blended
TILES = {"tile_height": 64, "tile_width": 48, "stride_height": 48, "stride_width": 32}
TILED = dataclasses.replace(FRAMEWISE, mode="tiled", **TILES)
NUM_RANKS = (1, 4)


@functools.cache
def vae_of(kind: str) -> AutoencoderKLLTXVideo:
    return random_ltx_vae(conditioned=kind != "0.9.0", inject_noise=kind == "0.9.1")


def draw(size: tuple[int, int, int], channels: int = 4) -> Tensor:
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(5))


def settings_of(vae: AutoencoderKLLTXVideo, config: DecodeConfig, num_latents: int) -> TimeSettings:
    mode = "framewise" if config.mode == "tiled" else config.mode
    return LTX.time_settings(vae.config, mode, config, num_latents=num_latents, seed=3)


@torch.no_grad()
def decoded_by_diffusers(
    vae: AutoencoderKLLTXVideo, latents: Tensor, config: DecodeConfig, *, clamp: bool = True
) -> Tensor:
    """Frames [1, 3, T, H, W] of `vae.decode` with its own tiling, after what LTXPipeline does to the latents before."""
    mean, std = (x.view(1, -1, 1, 1, 1) for x in (vae.latents_mean, vae.latents_std))
    latents, told = latents * std / vae.config.scaling_factor + mean, None
    if vae.config.timestep_conditioning:
        generator = torch.Generator().manual_seed(3)
        _, noise = (torch.randn(latents.shape, generator=generator) for _ in range(2))
        scale = torch.tensor([config.noise_scale])[:, None, None, None, None]
        latents = (1 - scale) * latents + scale * noise
        told = torch.tensor([config.timestep])
    names = [f"{what}_{side}" for what in ("tile", "stride") for side in ("height", "width", "frames")]
    tile_height, tile_width, tile_frames, stride_height, stride_width, stride_frames = (
        getattr(config, n) for n in names
    )
    vae.enable_tiling(tile_height, tile_width, tile_frames, stride_height, stride_width, stride_frames)
    vae.use_tiling = config.mode == "tiled"
    vae.use_framewise_decoding = config.mode != "whole"
    try:
        frames = vae.decode(latents, told).sample
        return frames.clamp(-1.0, 1.0) if clamp else frames
    finally:
        vae.use_tiling = vae.use_framewise_decoding = False


def full_by_hand(vae: AutoencoderKLLTXVideo, latents: Tensor, config: DecodeConfig) -> Tensor:
    """Frames [1, 3, T, H, W] of full chunks: each decoded by itself, its frames weighed one by one at their place in the video."""
    num_latents, size, stride = latents.shape[2], config.tile_frames // 8 + 1, config.stride_frames // 8
    gap = max(num_latents - size, 0)
    steps = -(-gap // stride)
    frames = torch.zeros(1, 3, 8 * num_latents - 7, *(8 * 2 * n for n in latents.shape[3:]), dtype=torch.float64)
    total = torch.zeros(frames.shape[2], dtype=torch.float64)
    for step in range(steps + 1):
        start = gap * step // max(steps, 1)
        stop = min(start + size, num_latents)
        piece = decoded_by_diffusers(vae, latents[:, :, start:stop], DecodeConfig(mode="whole"), clamp=False)
        begin, end = 8 * start + (step > 0), 8 * stop - 7  # of the video's frames
        for frame in range(begin, end):
            before = math.inf if step == 0 else frame + 0.5 - begin
            after = math.inf if step == steps else end - frame - 0.5
            weight = min(before, after, 1000) ** 2
            frames[:, :, frame] += weight * piece[:, :, frame - 8 * start].double()
            total[frame] += weight
    return (frames / total.view(-1, 1, 1)).clamp(-1.0, 1.0)


@pytest.mark.parametrize("tile_frames", [16, 32])
@pytest.mark.parametrize("stride_frames", [8, 16])
def test_full_chunks_lie_where_their_frames_belong(tile_frames, stride_frames):
    vae, config = vae_of("0.9.0"), dataclasses.replace(FULL, tile_frames=tile_frames, stride_frames=stride_frames)
    for num_latents in (1, 3, 4, 5, 6, 8, 9):
        latents = draw((num_latents, 4, 3))
        settings = settings_of(vae, config, num_latents)
        frames = torch.cat(list(stream_decode(vae, latents, settings)), dim=2)
        expected = full_by_hand(vae, latents, config)
        assert torch.allclose(frames.double(), expected, rtol=0, atol=2e-6), num_latents
        if settings.chunk:  # the negative control: diffusers puts later chunks one frame late
            late = decoded_by_diffusers(vae, latents, dataclasses.replace(config, tiles="diffusers"))
            assert not torch.allclose(late.double(), expected, atol=1e-3)
        else:
            assert torch.equal(frames, decoded_by_diffusers(vae, latents, DecodeConfig(mode="whole")))


@pytest.mark.parametrize(
    "config", [DecodeConfig(mode="whole"), FRAMEWISE, WIDE, APART], ids=["whole", "16/8", "32/24", "16/16"]
)
@pytest.mark.parametrize("kind", ["0.9.0", "0.9.5"])
def test_a_stream_is_the_vaes_own_decode(kind, config):
    vae = vae_of(kind)
    for num_latents in (1, 2, 3, 4, 5, 6, 8, 9):
        latents = draw((num_latents, 4, 3))
        settings = settings_of(vae, config, num_latents)
        parts = list(stream_decode(vae, latents, settings))
        assert torch.equal(torch.cat(parts, dim=2), decoded_by_diffusers(vae, latents, config)), num_latents
        assert sum(part.shape[2] for part in parts) == (num_latents - 1) * 8 + 1
        assert settings.chunk or len(parts) == 1


@pytest.mark.parametrize("fault", ["no blend", "last frame kept", "noise of another seed"])
def test_what_is_broken_is_seen(fault):
    vae, latents = vae_of("0.9.5"), draw((6, 4, 3))
    settings, expected = settings_of(vae, FRAMEWISE, 6), decoded_by_diffusers(vae, latents, FRAMEWISE)
    if fault == "noise of another seed":
        settings = dataclasses.replace(settings, seed=4)
    frames = _ChunkDecoder.num_frames
    changed = (lambda self, index: frames(self, index) + 1) if fault == "last frame kept" else frames
    blend = (lambda *_, **__: None) if fault == "no blend" else fade_in
    with mock.patch.object(_ChunkDecoder, "num_frames", changed), mock.patch("engine.adapters.ltx.fade_in", blend):
        ours = torch.cat(list(stream_decode(vae, latents, settings)), dim=2)
    if fault == "last frame kept":  # it is cut off again unless it is blended with
        assert not torch.equal(ours, expected)
    assert not torch.allclose(ours, expected, rtol=1e-3)


def test_framewise_is_not_whole():
    vae, latents = vae_of("0.9.0"), draw((6, 4, 3))
    assert not torch.allclose(*(decoded_by_diffusers(vae, latents, c) for c in (FRAMEWISE, DecodeConfig(mode="whole"))))


def test_noise_inside_the_decoder_follows_from_seed_chunk_and_tile(monkeypatch):
    """The 0.9.1 decoder draws from torch's own generator: seeded alike before each chunk, the VAE makes the same frames."""

    def seed_all(_seed: int) -> None:
        raise AssertionError("this would seed the generators of all GPUs, and leave them so")

    vae, latents = vae_of("0.9.1"), draw((6, 4, 3))
    calls: list[int] = []

    def seed(module: Any, args: Any) -> None:
        torch.manual_seed(layer_noise_seed(3, len(calls), 0))
        calls.append(1)

    hook = vae.decoder.register_forward_pre_hook(seed)
    expected = decoded_by_diffusers(vae, latents, FRAMEWISE)
    hook.remove()
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_all)
    ours = torch.cat(list(stream_decode(vae, latents, settings_of(vae, FRAMEWISE, 6))), dim=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(ours, expected)
    assert not torch.equal(decoded_by_diffusers(vae, latents, FRAMEWISE), expected)  # unseeded


# Tiles over ranks.


class Case(NamedTuple):
    """A VAE, a latent video [frames, rows, columns], its tiles, how many there are, and what is broken on purpose."""

    kind: str
    size: tuple[int, int, int]
    tiles: int
    config: DecodeConfig = TILED
    fault: str = ""


CASES = [
    Case("0.9.0", (5, 5, 7), 8),
    Case("0.9.5", (6, 8, 4), 6),
    Case("0.9.5", (2, 5, 7), 8),  # no longer than a chunk: cut in space only
    Case("0.9.0", (5, 9, 3), 6, dataclasses.replace(TILED, tile_frames=24, stride_frames=16)),
]
FAULTS = [Case("0.9.0", (5, 5, 7), 8, fault="swapped tiles"), Case("0.9.0", (6, 5, 7), 8, fault="no blend")]
NOISY = Case("0.9.1", (3, 5, 7), 8)


@contextmanager
def broken(fault: str) -> Iterator[None]:
    cut = tiles.cut_tile
    faults = {
        "": (tiles, "cut_tile", cut),
        "no blend": (tiles, "fade_in", lambda *_, **__: None),
        "swapped tiles": (tiles, "cut_tile", lambda x, grid, i: cut(x, grid, {0: 1, 1: 0}.get(i, i))),
    }
    with mock.patch.object(*faults[fault]):
        yield


def decode_on_ranks(rank: int, job: tuple[int, Case]) -> Tensor | bool | None:
    """Whether rank 0's frames are those of diffusers, or for a VAE that draws noise the frames; None on other ranks."""
    ranks, case = job
    world = first_ranks(NUM_RANKS).get(ranks)
    if world is None:
        return None
    vae, latents = vae_of(case.kind), draw(case.size)
    plan = plan_decode(case.config, vae, case.size, world=world, seed=3)
    assert plan.mode == "tiled"
    assert plan.record["tiles"] == sum(plan.record["tiles_by_rank"]) == case.tiles
    with broken(case.fault):
        parts = list(stream_tiles(vae, latents, plan, world=world))
    if rank > 0:
        assert parts == []
        return None
    frames = torch.cat(parts, dim=2)
    return frames if case == NOISY else torch.equal(frames, decoded_by_diffusers(vae, latents, case.config))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[int, Case], list[Any]]:
    jobs = [(ranks, case) for ranks in NUM_RANKS for case in (*CASES, NOISY)] + [(4, case) for case in FAULTS]
    return dict(
        zip(jobs, run_ranks(max(NUM_RANKS), decode_on_ranks, jobs, tmp_path_factory.mktemp("ranks")), strict=True)
    )


@pytest.mark.parametrize("ranks", NUM_RANKS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.size}")
def test_tiles_over_ranks(results, ranks, case):
    assert results[ranks, case] == [True, None, None, None]


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.fault)
def test_negative_control_broken_tiles(results, case):
    assert results[4, case] == [False, None, None, None]


def test_noise_inside_the_decoder_is_the_same_on_any_ranks(results):
    first, *others = (results[ranks, NOISY][0] for ranks in NUM_RANKS)
    assert all(torch.equal(frames, first) for frames in others)


# Memory, and which mode is taken.


def peak_bytes(config: DecodeConfig, num_latents: int, alone: Axis) -> int:
    vae, latents = vae_of("0.9.0"), draw((num_latents, 5, 4))
    plan = plan_decode(config, vae, (num_latents, 5, 4), world=alone)
    assert plan.mode == config.mode
    with LiveBytes() as live:
        tiled = plan.mode == "tiled"
        stream = stream_tiles(vae, latents, plan, world=alone) if tiled else stream_decode(vae, latents, plan.time)
        for frames in stream:
            del frames
    assert live.now == 0
    return live.peak


def test_memory_does_not_grow_with_length_unless_whole(alone):
    whole = [peak_bytes(DecodeConfig(mode="whole"), num_latents, alone) for num_latents in (5, 10)]
    assert whole[1] > 1.8 * whole[0]
    for config in (FRAMEWISE, TILED, FULL, dataclasses.replace(TILED, tiles="full")):
        peaks = [peak_bytes(config, num_latents, alone) for num_latents in (5, 10)]
        assert peaks[0] == peaks[1] < whole[1], config.mode


def test_the_estimate_is_what_a_decode_takes(alone):
    vae = vae_of("0.9.0")
    for config in (DecodeConfig(mode="whole"), FRAMEWISE, FULL):
        settings = settings_of(vae, config, 8)
        estimate = sum(tile_bytes(LTX, json.dumps(dict(vae.config)), (8, 5, 4), settings))
        assert estimate == pytest.approx(peak_bytes(config, 8, alone), rel=0.1)


@pytest.mark.parametrize("family", ["ltx", "wan"])
def test_videos_of_many_lengths_are_estimated_from_one_trace(family):
    """Chunks after the third add nothing; a planner that searches for a fitting length asks for dozens."""
    vae, size = (vae_of("0.9.0"), (5, 4)) if family == "ltx" else (random_wan().vae, (40, 24))
    found, traces = {}, {}
    for shown in (1, 3, 7):
        tile_bytes.cache_clear()
        with mock.patch.object(tiling, "_SHOWN_CHUNKS", shown):
            found[shown] = [tiled_share(TILED, vae, (frames, *size), world_size=2) for frames in (5, 7)]
        traces[shown] = tile_bytes.cache_info().misses
    tile_bytes.cache_clear()  # of what is patched
    assert found[3] == found[7] == 2 * found[3][:1]
    assert found[1] != found[3]
    assert traces[7] == 2 * traces[3]


def test_auto_takes_the_most_exact_that_fits(alone):
    with torch.device("meta"):
        vae = AutoencoderKLLTXVideo.from_config(PUBLISHED["Lightricks/LTX-Video"]["vae"])
    world = dataclasses.replace(alone, ranks=tuple(range(8)))
    modes = {}
    for gib in (80, 16, 1):
        with mock.patch.object(tiling, "_free_bytes", return_value=[gib * GIB] * 8):
            plan = plan_decode(dataclasses.replace(FRAMEWISE, mode="auto"), vae, (61, 15, 22), world=world)
        modes[gib] = plan.mode, plan.why
    assert {gib: mode for gib, (mode, _) in modes.items()} == {80: "whole", 16: "framewise", 1: "tiled"}, modes
    assert modes[80][1].startswith("exact, and it fits: whole frames need about ")
    assert modes[16][1].startswith("whole frames do not fit: whole frames need about ")


def test_on_a_cpu_the_memory_of_the_machine_is_asked(alone):
    plan = plan_decode(dataclasses.replace(FRAMEWISE, mode="auto"), vae_of("0.9.0"), (6, 4, 3), world=alone)
    assert plan.why.startswith("exact, and it fits: ")
    with mock.patch.object(tiling, "_free_host_bytes", return_value=1000):
        plan = plan_decode(dataclasses.replace(FRAMEWISE, mode="auto"), vae_of("0.9.0"), (6, 4, 3), world=alone)
    assert plan.mode == "framewise"
    assert plan.record["chunk_latents"] == 3


@pytest.mark.parametrize(
    ("config", "size", "mode", "why"),
    [
        (FRAMEWISE, (2, 5, 7), "whole", "the video is no longer than a chunk and a frame is no larger than a tile"),
        (TILED, (6, 4, 3), "framewise", "decode.mode is tiled, but a frame is no larger than a tile"),
        (
            dataclasses.replace(FRAMEWISE, **TILES),
            (2, 5, 7),
            "whole",
            "decode.mode is framewise, but the video is no longer",
        ),
        (dataclasses.replace(TILED, mode="whole"), (6, 5, 7), "whole", "decode.mode is whole"),
    ],
)
def test_a_mode_that_has_nothing_to_cut_says_so(alone, config, size, mode, why):
    plan = plan_decode(config, vae_of("0.9.0"), size, world=alone)
    assert plan.mode == mode
    assert plan.why.startswith(why)


def test_modes_and_settings_that_are_refused(alone):
    with pytest.raises(
        UserError, match=r"decode.mode framewise is not for Wan text-to-video; choose auto, whole, tiled"
    ):
        plan_decode(FRAMEWISE, random_wan().vae, (6, 4, 3), world=alone)
    with pytest.raises(
        UserError, match=r"stride_frames must lie in \[1, decode.tile_frames\], got stride 24 and tile 16"
    ):
        DecodeConfig(stride_frames=24)
    with pytest.raises(UserError, match=r"decode.noise_scale must lie in \[0, 1\], got 2"):
        DecodeConfig(noise_scale=2)
