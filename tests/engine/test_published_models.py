"""The real configurations, as diffusers builds them, on the meta device: every attention, every hook, every layout.

Forwards of these architectures through the hooks, on fake tensors and in layouts, are in test_planner*.py.
"""

import itertools
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from engine.adapters.published import PUBLISHED
from engine.config import DecodeConfig, MethodConfig, ModelConfig, ParallelConfig, RunConfig, SamplerConfig, VideoConfig
from engine.errors import UserError
from engine.hooks.apply import apply_method
from engine.hooks.self_attention import BranchProcessor
from engine.planner.arrange import choose_degrees
from engine.planner.layout import feasible_degrees, plan_sequence
from engine.planner.model import ModelSpec
from parallel.shards import length

NATIVE = {
    "WanPipeline": (21, 321),
    "LTXPipeline": (16, 481),
    "LTXConditionPipeline": (16, 481),
}  # window and long video
WAN_SMALL, WAN_LARGE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
LTX_090, LTX_091, LTX_095 = "Lightricks/LTX-Video", "diffusers/LTX-Video-0.9.1", "Lightricks/LTX-Video-0.9.5"
LTX_097 = "Lightricks/LTX-Video-0.9.7-dev"
LTX = (
    LTX_090,
    LTX_091,
    LTX_095,
    LTX_097,
)  # 0.9.6 dev has the parts of 0.9.5: see tests/engine/load/test_single_file.py
WAN_PAIR = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
WAN_5B = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
# Those of pictures; Wan2.1 I2V is FLF2V without the positions of two pictures.
WAN_FLF, WAN_I2V_PAIR = "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
LTX_DISTILLED = [f"Lightricks/LTX-Video-{version}-distilled" for version in ("0.9.7", "0.9.8-13B")]
WAN_I2V = [f"Wan-AI/Wan2.1-I2V-14B-{size}-Diffusers" for size in ("480P", "720P")]
PICTURES = (WAN_FLF, WAN_I2V_PAIR)
HEADS = {WAN_SMALL: 12, WAN_LARGE: 40, WAN_PAIR: 40, WAN_5B: 24} | dict.fromkeys(PICTURES, 40) | dict.fromkeys(LTX, 32)
LAYERS = {WAN_SMALL: 30, WAN_LARGE: 40, WAN_PAIR: 40, WAN_5B: 30} | dict.fromkeys(PICTURES, 40)
LAYERS |= dict.fromkeys(LTX, 28) | {LTX_097: 48}
# Tensors and parameters of transformer and VAE, as diffusers builds them.
SIZES = {
    WAN_SMALL: ((825, 1_418_996_800), (194, 126_892_531)),
    WAN_LARGE: ((1095, 14_288_491_584), (194, 126_892_531)),
    WAN_PAIR: ((1095, 14_288_491_584), (194, 126_892_531)),
    WAN_FLF: ((1304, 16_395_536_704), (194, 126_892_531)),
    WAN_I2V_PAIR: ((1095, 14_288_901_184), (194, 126_892_531)),
    WAN_5B: ((825, 4_999_787_712), (196, 704_688_668)),
    LTX_090: ((715, 1_923_385_472), (190, 419_193_649)),
    LTX_091: ((715, 1_923_385_472), (294, 934_976_434)),
    LTX_095: ((715, 1_923_385_472), (226, 1_246_913_522)),
    LTX_097: ((1215, 13_042_569_344), (226, 1_246_913_522)),
}
# One tensor of each part that tells the checkpoints apart, and its shape.
SHAPES = {
    WAN_SMALL: {"transformer": ("blocks.29.attn1.to_q.weight", (1536, 1536))},
    WAN_LARGE: {"transformer": ("blocks.39.attn1.to_q.weight", (5120, 5120))},
    WAN_PAIR: {"transformer": ("blocks.39.attn1.to_q.weight", (5120, 5120))},
    WAN_FLF: {"transformer": ("condition_embedder.image_embedder.pos_embed", (1, 514, 1280))},
    WAN_I2V_PAIR: {"transformer": ("patch_embedding.weight", (5120, 36, 1, 2, 2))},
    WAN_5B: {"vae": ("decoder.conv_in.weight", (1024, 48, 3, 3, 3))},
    LTX_090: {"vae": ("decoder.up_blocks.3.resnets.0.conv1.conv.weight", (128, 128, 3, 3, 3))},
    LTX_091: {"vae": ("decoder.scale_shift_table", (2, 128))},
    LTX_095: {"vae": ("encoder.conv_out.conv.weight", (129, 2048, 3, 3, 3))},
    LTX_097: {"transformer": ("transformer_blocks.47.attn2.to_k.weight", (4096, 4096))},
}


@pytest.fixture(scope="module", params=list(HEADS))
def spec(request) -> ModelSpec:
    return ModelSpec(name=request.param, source="test", configs=PUBLISHED[request.param])


def test_all_published_models_are_here():
    assert set(PUBLISHED) == {*HEADS, *WAN_I2V, *LTX_DISTILLED}
    assert all(PUBLISHED[name] == PUBLISHED[LTX_097] for name in LTX_DISTILLED)
    alone = {name: value for name, value in PUBLISHED[WAN_FLF]["transformer"].items() if name != "pos_embed_seq_len"}
    assert all(PUBLISHED[name]["transformer"] == alone for name in WAN_I2V)


def test_keys_and_shapes_are_those_that_diffusers_builds(spec: ModelSpec):
    with torch.device("meta"):
        parts = {part: spec.adapter.build(part, spec.configs[part]) for part in ("transformer", "vae")}
    sizes = [(len(part.state_dict()), sum(p.numel() for p in part.parameters())) for part in parts.values()]
    assert tuple(sizes) == SIZES[spec.name]
    for part, (key, shape) in SHAPES[spec.name].items():
        assert tuple(parts[part].state_dict()[key].shape) == shape
    normed = [key for key in parts["transformer"].state_dict() if key.endswith("attn1.norm_q.weight")]
    assert len(normed) == LAYERS[spec.name]


def test_what_later_versions_of_ltx_tell_their_decoder(spec: ModelSpec):
    if spec.name not in LTX:
        assert "timestep_conditioning" not in spec.configs["vae"]
        return
    settings = spec.adapter.time_settings(spec.configs["vae"], "whole", DecodeConfig(), num_latents=61, seed=3)
    assert settings.timestep == (None if spec.name == LTX_090 else 0.05)
    assert (spec.video.spatial_factor, spec.video.temporal_factor, spec.video.channels) == (32, 8, 128)
    assert spec.configs["scheduler"]["use_dynamic_shifting"] == (spec.name not in (LTX_095, LTX_097))


@pytest.fixture(scope="module")
def pipe(spec: ModelSpec) -> Any:
    """The stock pipeline with its transformer and VAE on the meta device, and no text encoder."""
    scheduler_class = getattr(diffusers, spec.configs["scheduler"]["_class_name"])
    index = spec.configs["model_index"]
    with torch.device("meta"):
        parts = {
            name: spec.adapter.build(name, spec.configs["transformer"]) for name in spec.adapter.experts_named(index)
        }
        parts["vae"] = spec.adapter.build("vae", spec.configs["vae"])
    scheduler = scheduler_class.from_config(spec.configs["scheduler"])
    told = {name: value for name, value in index.items() if name in ("boundary_ratio", "expand_timesteps")}
    return spec.adapter.pipeline_of(index)(text_encoder=None, tokenizer=None, scheduler=scheduler, **parts, **told)


def test_every_attention_is_found_and_every_hook_placed_and_removed(spec: ModelSpec, pipe: Any):
    adapter = spec.adapter
    window = NATIVE[adapter.index_names[0]][0]
    experts = adapter.experts(pipe).values()
    assert len(experts) == (2 if spec.name in (WAN_PAIR, WAN_I2V_PAIR) else 1)
    before = [dict(expert.attn_processors) for expert in experts]
    with apply_method(pipe, method="freespec", window_frames=window, kernel="plain"):
        for expert, processors in zip(experts, before, strict=True):
            assert_method_on(spec, expert, processors)
    for expert, processors in zip(experts, before, strict=True):
        assert expert.attn_processors == processors
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in expert.modules())


def assert_method_on(spec: ModelSpec, transformer: Any, processors: dict[str, Any]) -> None:
    """Every self-attention has the method, every cross-attention its own processor, and the hooks are in four places."""
    adapter = spec.adapter
    found = adapter.attention_modules(transformer)
    named = [module for name, module in transformer.named_modules() if name.endswith(".attn1")]
    assert found == named
    assert len(found) == spec.layers == LAYERS[spec.name]
    assert [attn.processor.layer for attn in found] == list(range(spec.layers))
    replaced = [
        processor for processor in transformer.attn_processors.values() if isinstance(processor, BranchProcessor)
    ]
    assert len(replaced) == spec.layers == len(processors) // 2  # and every attn2 is as it was
    assert len(transformer._forward_pre_hooks) == 1
    hooked = [module for module in transformer.modules() if module._forward_hooks]
    places = (transformer, *adapter.shard_points(transformer))
    assert hooked == [module for module in transformer.modules() if module in places]
    assert len(hooked) == 4


def config_of(spec: ModelSpec, degrees: tuple[int, int, int]) -> RunConfig:
    window, frames = NATIVE[spec.adapter.index_names[0]]
    cfg, ring, ulysses = degrees
    return RunConfig(
        model=ModelConfig(path=spec.name),
        video=VideoConfig(num_frames=frames, height=480, width=704),
        sampler=SamplerConfig(guidance_scale=5.0),
        method=MethodConfig(name="freespec", window_frames=window),
        parallel=ParallelConfig(cfg=cfg, ring=ring, ulysses=ulysses),
    )


@pytest.mark.parametrize("world", range(1, 17))
@pytest.mark.parametrize(
    "spec", [name for name in HEADS if name not in (*PICTURES, LTX_097)], indirect=True
)  # those are laid out as WAN_LARGE
def test_layouts_are_valid_or_refused_for_a_reason(spec: ModelSpec, world: int):
    frames, frame_tokens = spec.grid(NATIVE[spec.adapter.index_names[0]][1], 480, 704)
    tokens = frames * frame_tokens
    feasible = feasible_degrees(world, heads=spec.heads, passes=2, tokens=tokens)
    assert spec.heads == HEADS[spec.name]
    for cfg, ring in itertools.product((1, 2), range(1, world + 1)):
        if world % (cfg * ring):
            continue
        degrees = (cfg, ring, world // cfg // ring)
        config = config_of(spec, degrees)
        if degrees not in feasible:
            assert spec.heads % degrees[2] and ring > 1, degrees
            with pytest.raises(UserError, match=rf"{world} ranks cannot be arranged with .*; possible are "):
                choose_degrees(config, spec, world, None)
            continue
        assert choose_degrees(config, spec, world, None)[0] == degrees
        plan = plan_sequence(tokens, spec.heads, degrees, even=False)
        shards = [length(shard) for shard in plan.shards]
        assert sum(shards) == tokens
        assert max(shards) - min(shards) <= plan.unit
        assert sum(length(share) for share in plan.head_shares) == spec.heads


def test_negative_control_missed_attention(spec: ModelSpec):
    """Negative control: a block whose self-attention has another name is not found."""
    block = nn.Module()
    block.attn1, block.attn3 = nn.Identity(), nn.Identity()
    transformer = SimpleNamespace(blocks=[block, block], transformer_blocks=[block, block])
    block.attn_of_another_name = block.attn1
    del block.attn1
    with pytest.raises(AttributeError, match="attn1"):
        spec.adapter.attention_modules(transformer)
