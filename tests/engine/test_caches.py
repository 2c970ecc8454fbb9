"""diffusers' caches over ranks: those that decide by the step make one rank's video, and any other is refused by all ranks."""

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import (
    HookRegistry,
    MagCacheConfig,
    SeaCacheConfig,
    TextKVCacheConfig,
    apply_first_block_cache,
    apply_layer_skip,
)
from diffusers.hooks.hooks import StateManager
from diffusers.hooks.mag_cache import MagCacheHeadHook, MagCacheState
from torch import Tensor, nn

from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.ranks.layouts import Ranks
from tests.engine.golden import PROMPT, mesh_of, relative
from tests.ranks import run_ranks
from tests.tiny_pipelines import save_random_wan

STEPS = 5
SAFE = {
    "PyramidAttentionBroadcast": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 10_000),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: 1,
    ),
    "MagCache": MagCacheConfig(
        threshold=10.0, retention_ratio=0.2, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    ),
    "TaylorSeerCache": TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, cache_identifiers=[r"blocks\.\d+\.attn1"]
    ),
}


class MyCacheConfig(FirstBlockCacheConfig):
    """A user's own kind of a cache that diffusers has."""


class MyHook(MagCacheHeadHook):
    """A user's own kind of a hook that is safe."""


def raw_latents(_module: nn.Module, _args: tuple, kwargs: dict) -> list[Tensor]:
    """What SeaCache wants to see of the generic transformer."""
    return list(kwargs["hidden_states"])


UNSAFE = {
    "FirstBlockCache": FirstBlockCacheConfig(threshold=0.1),
    "SeaCache": SeaCacheConfig(raw_vision_callback=raw_latents),
    "FasterCache": FasterCacheConfig(
        spatial_attention_block_identifiers=("blocks",), current_timestep_callback=lambda: 1, tensor_format="BCFHW"
    ),
    "TextKVCache": TextKVCacheConfig(),
    "MyCache": MyCacheConfig(threshold=0.1),
}
# Put on without `enable_cache`, which would have noted a configuration.
UNSAFE_HOOKS = ("FBCHeadBlockHook", "MyHook", "FeedForwardSkipHook, TransformerBlockSkipHook")


def add_cache(transformer: nn.Module, name: str) -> None:
    """The cache of this name, or the hook of that."""
    if name == UNSAFE_HOOKS[0]:
        apply_first_block_cache(transformer, FirstBlockCacheConfig(threshold=0.1))
    elif name == UNSAFE_HOOKS[1]:
        my_hook = MyHook(StateManager(MagCacheState), MagCacheConfig(mag_ratios=[1.0] * STEPS))
        HookRegistry.check_if_exists_or_initialize(transformer.blocks[0]).register_hook(my_hook, "mine")
    elif name == UNSAFE_HOOKS[2]:
        apply_layer_skip(transformer, LayerSkipConfig(indices=[0], fqn="blocks"))
    elif name:
        transformer.enable_cache((SAFE | UNSAFE)[name])


def remove_cache(transformer: nn.Module) -> None:
    """Every hook off again: many cases share one pipeline."""
    for module in transformer.modules():
        if hasattr(module, "_diffusers_hook"):
            for name in reversed(list(module._diffusers_hook.hooks)):
                module._diffusers_hook.remove_hook(name, recurse=False)
    transformer._cache_config = None


def latents_with(made: LongVideoEngine, name: str) -> Tensor | str:
    """Latents, or why there are none."""
    add_cache(made.pipe.transformer, name)
    try:
        return made.denoise(PROMPT).latents
    except UserError as error:
        return str(error)
    finally:
        remove_cache(made.pipe.transformer)
        made.close()


def config_of(folder: str) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=folder, device="cpu"),
        video=VideoConfig(num_frames=17, height=32, width=48),
        sampler=SamplerConfig(num_steps=STEPS, guidance_scale=4.0, max_text_tokens=20),
        method=MethodConfig(name="freespec", window_frames=3),
        output=OutputConfig(progress="off"),
    )


def on_ranks(_rank: int, case: tuple[str, str]) -> Tensor | str:
    folder, name = case
    return latents_with(LongVideoEngine(config_of(folder), Ranks(mesh=mesh_of((1, 1, 2)))), name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_random_wan(tmp_path_factory.mktemp("wan")))


def test_caches_that_decide_by_the_step_make_one_rank_s_video(folder, tmp_path):
    plain = latents_with(LongVideoEngine(config_of(folder)), "")
    for name, by_rank in zip(SAFE, run_ranks(2, on_ranks, [(folder, name) for name in SAFE], tmp_path), strict=True):
        alone = latents_with(LongVideoEngine(config_of(folder)), name)
        assert relative(alone, plain) > 1e-3, name  # it does skip something
        for latents in by_rank:
            assert not isinstance(latents, str), latents
            assert relative(latents, alone) < 1e-5, name


def test_any_other_cache_is_refused_by_all_ranks(folder, tmp_path):
    names = [*UNSAFE, *UNSAFE_HOOKS]
    for name, by_rank in zip(names, run_ranks(2, on_ranks, [(folder, name) for name in names], tmp_path), strict=True):
        for said in by_rank:
            assert isinstance(said, str), name
            assert said.startswith(f"{name}: not known to decide the same on every rank"), said


@pytest.mark.parametrize("name", [*SAFE, "FirstBlockCache"])
def test_a_second_video_of_an_engine_begins_with_an_empty_cache(folder, name):
    made = LongVideoEngine(config_of(folder))
    add_cache(made.pipe.transformer, name)
    first = made.denoise(PROMPT).latents
    made.denoise(PROMPT, seed=5)
    assert torch.equal(made.denoise(PROMPT).latents, first)
    made.close()
