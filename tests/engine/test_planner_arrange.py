"""What a run asks the planner before weights are loaded: whether it fits the GPU, on one rank as on several."""

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import engine.planner.arrange
from engine.batch.forecast import arrange_replica
from engine.batch.variants import Variant
from engine.config import (
    AttentionConfig,
    DecodeConfig,
    MethodConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SamplerConfig,
    VideoConfig,
)
from engine.errors import UserError
from engine.planner.arrange import arrange_ranks, match_gpu
from engine.planner.gpu import FOLDER, read_gpu
from engine.planner.memory import GIB
from engine.planner.model import read_model
from launch.ranks.join import open_ranks
from parallel.shards import length
from tests.engine.planned import plan

CUDA = torch.device("cuda")  # a name only: which GPU it is comes from the fixture
CONFIG = RunConfig(
    model=ModelConfig(path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    video=VideoConfig(num_frames=641, height=480, width=832),
    sampler=SamplerConfig(guidance_scale=6.0, flow_shift=8.0),
    method=MethodConfig(window_frames=21),
)
LOOK = engine.planner.arrange._find_gpu
READ = functools.cache(read_model)  # its parts are built once


@pytest.fixture(autouse=True)
def _read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.planner.arrange, "read_model", READ)


@functools.cache
def peak(world: int, degrees: tuple[int, int, int]) -> int:
    """Bytes that the planner's list says of these degrees."""
    spec, gpu = READ(CONFIG.model), read_gpu("h100")
    plans = plan(spec, CONFIG.video, CONFIG.sampler, CONFIG.method, gpu=gpu, world_size=world)
    return next(found.peak_bytes for found in plans if found.degrees == degrees)


@pytest.fixture
def with_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`with_memory(bytes)`: this machine has an H100 whose tensors can have so many."""

    def set_memory(num_bytes: int) -> None:
        gpu = replace(read_gpu("h100"), memory_gib=num_bytes / GIB + 2, reserved_gib=2)
        monkeypatch.setattr(engine.planner.arrange, "_find_gpu", lambda device: gpu)

    return set_memory


def parallel(**settings: Any) -> RunConfig:
    return replace(CONFIG, parallel=ParallelConfig(**settings))


def test_a_process_alone_is_refused_by_the_byte_that_is_missing(with_memory: Callable[[int], None]) -> None:
    needed = peak(1, (1, 1, 1))
    with_memory(needed + 1)  # to spare, as GiB round
    assert arrange_ranks(CONFIG, 1, CUDA).degrees == (1, 1, 1)
    with_memory(needed - 1)
    with pytest.raises(UserError) as refused:
        arrange_ranks(CONFIG, 1, CUDA)
    line = str(refused.value)
    assert "\n" not in line
    found = re.search(
        r"cfg 1 x ring 1 x ulysses 1 needs (\S+) GiB on one H100, where tensors can have (\S+) GiB \(", line
    )
    assert found is not None
    assert float(found[1]) == pytest.approx(needed / GIB)
    assert found[1] != found[2]  # a byte apart
    assert "; the smallest change that fits is parallel.text_device cpu" in line


def test_advised_change_is_accepted(with_memory: Callable[[int], None]) -> None:
    with_memory(peak(1, (1, 1, 1)) - 1)
    assert arrange_ranks(parallel(text_device="cpu"), 1, CUDA).degrees == (1, 1, 1)


def test_fixed_degrees_of_several_ranks_are_asked_about_too(with_memory: Callable[[int], None]) -> None:
    # In tiles over four ranks a video would fit that does not in whole frames.
    fixed = replace(parallel(cfg=2, ring=2, ulysses=1), decode=DecodeConfig(mode="whole"))
    needed = peak(4, (2, 2, 1))
    with_memory(needed + 1)
    assert arrange_ranks(fixed, 4, CUDA).degrees == (2, 2, 1)
    with_memory(needed - 1)
    with pytest.raises(UserError, match=r"does not fit: cfg 2 x ring 2 x ulysses 1 needs .* on each of 4 H100"):
        arrange_ranks(fixed, 4, CUDA)
    arrange_ranks(replace(fixed, decode=DecodeConfig()), 4, CUDA)


def test_driver_of_a_cluster_plans_for_the_named_gpus() -> None:
    batch = replace(CONFIG, video=replace(CONFIG.video, num_frames=321))
    variants = [Variant.of(batch, name) for name in ("freespec", "direct")]
    told = arrange_replica(variants, 8, CUDA, gpu="h200")
    assert told.why.startswith("the planner's choice for H200")
    with pytest.raises(UserError, match=r"does not fit: .* on each of 2 RTX4090"):
        longer = replace(batch, video=replace(batch.video, num_frames=2561))
        arrange_replica([Variant.of(longer, "freespec")], 2, CUDA, gpu="rtx4090")


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA GeForce RTX 4070", "rtx4070"),
        ("NVIDIA GeForce RTX 4070 Ti", None),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", None),
        ("NVIDIA GeForce RTX 4070 SUPER", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
    ],
)
def test_a_device_is_described_by_its_own_file(device: str, gpu: str | None) -> None:
    assert match_gpu(device, [path.stem for path in FOLDER.glob("*.json")]) == gpu


def test_a_plan_made_by_hand_is_not_asked_about(with_memory: Callable[[int], None]) -> None:
    with_memory(1)
    by_hand = parallel(plan="manual", cfg=1, ring=1, ulysses=1)
    assert arrange_ranks(by_hand, 1, CUDA).degrees == (1, 1, 1)


@pytest.mark.parametrize("kernel", ["plain", "cuda_efficient"])
def test_a_kernel_of_unknown_speed_is_no_reason_to_refuse(with_memory: Callable[[int], None], kernel: str) -> None:
    config = replace(CONFIG, attention=AttentionConfig(kernel=kernel))
    with_memory(peak(1, (1, 1, 1)) + 1)
    assert arrange_ranks(config, 1, CUDA).degrees == (1, 1, 1)
    with_memory(1)
    with pytest.raises(UserError, match="does not fit"):
        arrange_ranks(config, 1, CUDA)


@pytest.mark.parametrize("kernel", ["plain", "cuda_efficient"])
def test_degrees_of_a_kernel_of_unknown_speed_come_from_the_rule_and_the_memory(
    with_memory: Callable[[int], None], kernel: str
) -> None:
    config = replace(CONFIG, attention=AttentionConfig(kernel=kernel), decode=DecodeConfig(mode="whole"))
    with_memory(10**12)
    arrangement = arrange_ranks(config, 4, CUDA)
    assert arrangement.degrees == (2, 1, 2)  # guidance first, then heads
    assert arrangement.why.startswith(f"no time can be predicted (attention_fraction of H100 has no {kernel}, it has ")
    assert arrangement.why.endswith(
        "; the first that fits the memory by the rule cfg first, then ulysses as far as it divides the heads and stays within a node, then ring"
    )
    # The rule's second needs less: a run is not refused where it fits.
    first, second = peak(4, (2, 1, 2)), peak(4, (2, 2, 1))
    with_memory(min(first, second) - 1)
    with pytest.raises(UserError, match=r"does not fit: .* on each of 4 H100, .*the smallest change that fits is"):
        arrange_ranks(replace(config, parallel=ParallelConfig(cfg=2)), 4, CUDA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode": DecodeConfig(mode="framewise")}, "decode.mode framewise is for decoders"),
        ({"decode": DecodeConfig(tile_width=250)}, "decode.tile_width must be a multiple of the 8 pixels"),
        (
            {"model": replace(CONFIG.model, single_file="no/file.safetensors")},
            "model.single_file 'no/file.safetensors'",
        ),
    ],
)
def test_settings_that_the_model_cannot_have_are_refused_before_ranks_join(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        arrange_ranks(replace(CONFIG, **change), 2, torch.device("cpu"))


def test_the_provider_decides_which_degrees_are_possible() -> None:
    """25 latent frames of 60 tokens, 12 heads: five ranks have even shares of tokens, and no number of heads."""
    deepspeed = replace(parallel(provider="deepspeed"), video=VideoConfig(num_frames=97, height=96, width=160))
    with mock.patch("engine.planner.arrange.check_deepspeed"):  # whether the package is here is another question
        for world in (2, 3, 4, 6, 12):
            shares = arrange_ranks(deepspeed, world, torch.device("cpu")).plan
            assert len({*map(length, shares.shards)}) == len({*map(length, shares.head_shares)}) == 1, (world, shares)
        assert arrange_ranks(deepspeed, 5, torch.device("cpu")).degrees == (1, 5, 1)
    with pytest.raises(
        UserError, match=r"1500 tokens over 7 .*no arrangement of 7 ranks: use .* torch, or 6 or 8 ranks"
    ):
        arrange_ranks(deepspeed, 7, torch.device("cpu"))
    fixed = replace(deepspeed, parallel=ParallelConfig(provider="deepspeed", ulysses=5))
    with pytest.raises(
        UserError, match=r"12 heads over 5 ranks are not.*; it can have 1 x 5 x 1 \(cfg x ring x ulysses\)"
    ):
        arrange_ranks(fixed, 5, torch.device("cpu"))


def test_cpu_memory_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with several ranks: no description of a CPU is in configs/gpus."""
    assert LOOK(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert LOOK(CUDA) is None  # the driver of a cluster, which has no GPU itself
    huge = replace(CONFIG, video=replace(CONFIG.video, num_frames=10**6 - 3))
    assert arrange_ranks(huge, 1, torch.device("cpu")).degrees == (1, 1, 1)


def test_generate_alone_asks_before_anything_is_loaded(
    with_memory: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("launch.ranks.join.pick_device", lambda name: CUDA)
    with_memory(1)
    with (
        pytest.raises(UserError, match="does not fit: cfg 1 x ring 1 x ulysses 1 needs"),
        open_ranks(CONFIG, prompts=["a red circle"], verbose=False),
    ):
        pytest.fail("the block of a run that does not fit was entered")
    with_memory(10**12)
    with open_ranks(CONFIG, prompts=["a red circle"], verbose=False) as context:
        assert context.ranks is None
    monkeypatch.setattr("launch.ranks.join.pick_device", lambda name: torch.device("cpu"))
    with_memory(1)  # which nobody asks for
    with open_ranks(CONFIG, prompts=["a red circle"], verbose=False) as context:
        assert context.ranks is None
