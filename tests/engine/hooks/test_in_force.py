"""A method on a living pipeline: whatever takes it off, or changes what it was checked against, is one line and no stock video."""

import contextlib
import copy
import inspect
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import diffusers.models.attention_dispatch as dispatch
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from diffusers.hooks import FirstBlockCacheConfig, LayerSkipConfig, apply_layer_skip
from PIL import Image
from torch import Tensor, nn

from engine import Ranks
from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from freespec.riflex import Riflex
from tests.engine.applied import (
    MODELS,
    SIZE,
    another,
    applied,
    blocks_of,
    every_model,
    in_step,
    latents_of,
    name_of,
    refused,
)
from tests.engine.golden import mesh_of, relative
from tests.ranks import run_ranks
from tests.tiny_pipelines import random_ltx, random_wan, save_random_wan


@pytest.fixture(scope="module")
def stock() -> dict[str, Tensor]:
    return {model: latents_of(make()) for model, make in MODELS.items()}


@pytest.fixture(scope="module")
def right() -> dict[str, Tensor]:
    """What the method makes."""
    made = {}
    for model, make in MODELS.items():
        pipe = make()
        with applied(pipe):
            made[model] = latents_of(pipe)
    return made


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Attention backend and process group are those of every other test."""
    yield
    dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName.NATIVE)
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("the test left a process group")


def replace_both(pipe: DiffusionPipeline) -> None:
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    pipe.transformer = another(pipe)


def set_one_processor(pipe: DiffusionPipeline) -> None:
    attn = blocks_of(pipe)[1].attn1
    attn.set_processor(type(attn)._default_processor_cls())


def set_all_processors(pipe: DiffusionPipeline) -> None:
    pipe.transformer.set_attn_processor(type(blocks_of(pipe)[0].attn2.processor)())


def replace_block(pipe: DiffusionPipeline) -> None:
    blocks = blocks_of(MODELS[name_of(pipe)]())
    blocks_of(pipe)[1] = blocks[1]


def replace_blocks(pipe: DiffusionPipeline) -> None:
    name = "blocks" if name_of(pipe) == "wan" else "transformer_blocks"
    setattr(pipe.transformer, name, getattr(another(pipe), name))


def wrap_blocks(pipe: DiffusionPipeline) -> None:
    """What caching libraries do: one module that runs all blocks."""
    name = "blocks" if name_of(pipe) == "wan" else "transformer_blocks"
    setattr(pipe.transformer, name, nn.ModuleList([nn.Sequential(*getattr(pipe.transformer, name))]))


def replace_hooks(pipe: DiffusionPipeline) -> None:
    pipe.transformer._forward_pre_hooks = OrderedDict()


def replace_forward(pipe: DiffusionPipeline) -> None:
    other = another(pipe)
    pipe.transformer.forward = other.forward


def replace_block_forward(pipe: DiffusionPipeline) -> None:
    blocks_of(pipe)[1].forward = blocks_of(MODELS[name_of(pipe)]())[1].forward


def replace_attention_forward(pipe: DiffusionPipeline) -> None:
    attn = blocks_of(pipe)[0].attn1
    plain = type(attn)._default_processor_cls()
    names = {"wan": "rotary_emb", "ltx": "image_rotary_emb"}[name_of(pipe)]

    def forward(hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:
        rotary = named.get(names) or next(other for other in others if other is not None)
        return plain(attn, hidden_states, None, None, rotary)

    attn.forward = forward


def replace_block_by_plain(pipe: DiffusionPipeline) -> None:
    """A block that looks like the one in its place and runs another."""

    class Around(nn.Module):
        def __init__(self, block: nn.Module, other: nn.Module) -> None:
            super().__init__()
            self.attn1 = block.attn1
            self.forward = other.forward

    name = "blocks" if name_of(pipe) == "wan" else "transformer_blocks"
    blocks_of(pipe)[1] = Around(blocks_of(pipe)[1], getattr(another(pipe), name)[1])


TAKEN_OFF = {
    "another transformer": (lambda pipe: setattr(pipe, "transformer", another(pipe)), "pipe.transformer is another"),
    "another transformer registered": (lambda pipe: pipe.register_modules(transformer=another(pipe)), "is another"),
    "transformer deleted": (lambda pipe: delattr(pipe, "transformer"), "pipe.transformer is None"),
    "no transformer": (lambda pipe: setattr(pipe, "transformer", None), "pipe.transformer is None"),
    "something else": (
        lambda pipe: setattr(pipe, "transformer", nn.Linear(2, 2)),
        "pipe.transformer is another Linear",
    ),
    "another transformer and scheduler": (replace_both, "pipe.transformer is another"),
    "one processor": (set_one_processor, "layer 1 has another attention processor"),
    "all processors": (set_all_processors, "layer 0 has another attention processor"),
    "a block": (replace_block, "layer 1 has another attention processor"),
    "all blocks": (replace_blocks, "layer 0 has another attention processor"),
    "a block more": (
        lambda pipe: blocks_of(pipe).append(blocks_of(MODELS[name_of(pipe)]())[0]),
        "has 3 self-att.* had 2",
    ),
    "a block less": (lambda pipe: blocks_of(pipe).pop(1), "has 1 self-attentions and had 2"),
    "blocks of a library": (wrap_blocks, "blocks were replaced"),
    "pre-hooks cleared": (lambda pipe: pipe.transformer._forward_pre_hooks.clear(), "1 of its hooks were removed"),
    "pre-hooks replaced": (replace_hooks, "1 of its hooks were removed"),
    "hooks cleared": (lambda pipe: pipe.transformer._forward_hooks.clear(), "1 of its hooks were removed"),
    "hooks of all parts cleared": (
        lambda pipe: [module._forward_hooks.clear() for module in pipe.transformer.modules()],
        "4 of its hooks were removed",
    ),
    "context parallel": (lambda pipe: setattr(pipe.transformer, "_parallel_config", object()), "context parallel"),
    "a scheduler of noise": (
        lambda pipe: setattr(pipe, "scheduler", EulerDiscreteScheduler()),
        "EulerDiscreteScheduler",
    ),
    "scheduler deleted": (lambda pipe: delattr(pipe, "scheduler"), "scheduler NoneType cannot be used"),
    "a class as scheduler": (
        lambda pipe: setattr(pipe, "scheduler", type(pipe.scheduler)),
        "scheduler type cannot be used",
    ),
    "no scheduler": (lambda pipe: setattr(pipe, "scheduler", None), "NoneType cannot be used"),
    "a backend": (
        lambda pipe: pipe.transformer.set_attention_backend("_native_math"),
        "attention backend _native_math",
    ),
    "a backend of one layer": (
        lambda pipe: blocks_of(pipe)[1].attn1.set_attention_backend("_native_math"),
        "attention backend _native_math is set on layer 1",
    ),
    "a backend of another model": (
        lambda pipe: random_wan().transformer.set_attention_backend("_native_efficient"),
        "attention backend _native_efficient is chosen for all of diffusers",
    ),
}


@every_model
@pytest.mark.parametrize("accident", TAKEN_OFF)
def test_what_takes_the_method_off_is_an_error_at_the_next_call(model, accident):
    happen, message = TAKEN_OFF[accident]
    pipe = MODELS[model]()
    handle = applied(pipe)
    latents_of(pipe)
    assert handle.in_force
    happen(pipe)
    assert not handle.in_force
    refused(handle.check, match=message)
    refused(lambda: latents_of(pipe), match=message)
    handle.remove()


@every_model
@pytest.mark.parametrize(
    "accident", ["another transformer", "all processors", "hooks of all parts cleared", "a backend"]
)
def test_remove_restores_the_pipeline_after_an_accident(model, accident, stock):
    pipe = MODELS[model]()
    transformer, processors = pipe.transformer, dict(pipe.transformer.attn_processors)
    kind, attributes = type(pipe), set(vars(pipe))
    handle = applied(pipe)
    TAKEN_OFF[accident][0](pipe)
    handle.remove()
    pipe.transformer = transformer
    pipe.transformer.reset_attention_backend()
    dispatch._AttentionBackendRegistry.set_active_backend("native")
    assert type(pipe) is kind
    assert set(vars(pipe)) == attributes
    assert {name: p for name, p in transformer.attn_processors.items() if "attn1" in name} == {
        name: p for name, p in processors.items() if "attn1" in name
    }
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())
    assert torch.equal(latents_of(pipe), stock[model])


BYPASSED = {
    "the transformer's forward": (replace_forward, "attention of 2 of 2 layers"),
    "a block's forward": (replace_block_forward, r"attention of 1 of 2 layers \(the first is 1\)"),
    "an attention's forward": (replace_attention_forward, r"attention of 1 of 2 layers \(the first is 0\)"),
    "a block around a block": (replace_block_by_plain, r"attention of 1 of 2 layers \(the first is 1\)"),
}


@every_model
@pytest.mark.parametrize("accident", BYPASSED)
def test_a_forward_that_goes_past_the_method_is_an_error(model, accident):
    happen, message = BYPASSED[accident]
    pipe = MODELS[model]()
    handle = applied(pipe)
    latents_of(pipe)
    happen(pipe)
    refused(lambda: latents_of(pipe), match=message)
    handle.remove()


DURING = {
    "another transformer": (lambda pipe: setattr(pipe, "transformer", another(pipe)), "pipe.transformer is another"),
    "all processors": (set_all_processors, "layer 0 has another attention processor"),
    "the transformer's forward": (replace_forward, "attention of 2 of 2 layers"),
    "a block's forward": (replace_block_forward, r"attention of 1 of 2 layers \(the first is 1\)"),
    "an attention's forward": (replace_attention_forward, r"attention of 1 of 2 layers \(the first is 0\)"),
    "a block around a block": (replace_block_by_plain, r"attention of 1 of 2 layers \(the first is 1\)"),
    "a fresh scheduler": (
        lambda pipe: setattr(pipe, "scheduler", type(pipe.scheduler).from_config(pipe.scheduler.config)),
        "replaced or reset during a call",
    ),
    "a scheduler of noise": (
        lambda pipe: setattr(pipe, "scheduler", EulerDiscreteScheduler()),
        "EulerDiscreteScheduler",
    ),
    "timesteps set anew": (lambda pipe: pipe.scheduler.set_timesteps(7, mu=1.0), "replaced or reset during a call"),
    "a backend": (lambda pipe: pipe.transformer.set_attention_backend("_native_math"), "attention backend"),
}


@every_model
@pytest.mark.parametrize("accident", DURING)
def test_what_happens_during_a_call_is_an_error_of_that_call(model, accident):
    happen, message = DURING[accident]
    pipe = MODELS[model]()
    with applied(pipe):
        refused(lambda: latents_of(pipe, callback_on_step_end=in_step(0, happen)), match=message)


@every_model
def test_the_forward_of_a_class_that_is_replaced_during_a_call_is_an_error(model, monkeypatch):
    pipe = MODELS[model]()
    kind = type(blocks_of(pipe)[0].attn1)

    def replace(pipe: DiffusionPipeline) -> None:
        plain = kind._default_processor_cls()

        def forward(attn: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            return plain(attn, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)

    with applied(pipe):
        refused(lambda: latents_of(pipe, callback_on_step_end=in_step(0, replace)), match="attention of 2 of 2 layers")


@every_model
def test_another_transformer_for_some_steps_is_an_error_of_the_call(model):
    pipe = MODELS[model]()
    mine, other = pipe.transformer, another(pipe)

    def swap(pipe: DiffusionPipeline, index: int, _timestep: Any, _tensors: Any) -> dict:
        pipe.transformer = other if index == 0 else mine
        return {}

    with applied(pipe):
        refused(
            lambda: latents_of(pipe, callback_on_step_end=swap), match="was called in 2 of the 3 steps of this call"
        )


@every_model
def test_a_call_that_is_interrupted_has_the_method(model, right):
    pipe = MODELS[model]()
    with applied(pipe):
        stopped = latents_of(pipe, callback_on_step_end=in_step(0, lambda pipe: setattr(pipe, "_interrupt", True)))
        assert stopped.shape == right[model].shape
        assert torch.equal(latents_of(pipe), right[model])


@pytest.mark.parametrize("backend", ["_native_math", "_native_efficient"])
def test_a_backend_by_environment_or_context_is_refused_before_and_after(backend, monkeypatch):
    pipe = random_wan()
    with dispatch.attention_backend(backend):
        refused(lambda: applied(pipe), match=f"attention backend {backend} is chosen for all of diffusers")
    with applied(pipe) as handle:
        with dispatch.attention_backend(backend):
            assert not handle.in_force
            refused(lambda: latents_of(pipe), match="DIFFUSERS_ATTN_BACKEND")
        assert handle.in_force
        # The variable is read when diffusers is imported, into this.
        monkeypatch.setattr(dispatch._AttentionBackendRegistry, "_active_backend", backend)
        refused(lambda: latents_of(pipe), match=f"attention backend {backend}")
        pipe.transformer.set_attention_backend("native")  # what the message advises
        latents_of(pipe)
    pipe.transformer.set_attention_backend(backend)
    pipe.transformer.set_attention_backend("native")
    applied(pipe).remove()


def test_a_backend_set_on_a_layer_before_is_refused():
    pipe = random_wan()
    pipe.transformer.blocks[1].attn1.set_attention_backend("_native_math")
    refused(lambda: applied(pipe), match="attention backend _native_math is set on layer 1")


@every_model
def test_torchs_own_backend_by_name_is_the_default(model, right):
    pipe = MODELS[model]()
    pipe.transformer.set_attention_backend("native")
    with applied(pipe):
        assert torch.equal(latents_of(pipe), right[model])
        pipe.transformer.set_attention_backend("native")
        assert torch.equal(latents_of(pipe), right[model])


@every_model
@pytest.mark.parametrize("copying", [copy.deepcopy, copy.copy, pickle.dumps, torch.save], ids=lambda f: f.__name__)
def test_copies_and_pickles_are_refused_until_the_method_is_removed(model, copying, tmp_path):
    pipe = MODELS[model]()
    transformer, block = pipe.transformer, blocks_of(pipe)[0]
    handle = applied(pipe)
    deep = () if copying is copy.copy else (transformer, block, transformer.proj_out)  # a shallow one shares its parts
    for what in (pipe, handle, handle.state, *deep):
        arguments = (what, tmp_path / "x.pt") if copying is torch.save else (what,)
        refused(
            lambda arguments=arguments: copying(*arguments), match=r"cannot be copied or pickled; call .*remove\(\)"
        )
    handle.remove()
    copying(transformer, *arguments[1:])
    assert torch.equal(latents_of(copy.copy(pipe)), latents_of(pipe))


def test_a_pipeline_with_a_method_can_be_saved(tmp_path, stock):
    pipe = random_wan()
    with applied(pipe):
        pipe.save_pretrained(tmp_path)
    loaded = WanPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents_of(loaded), stock["wan"])


@every_model
def test_a_class_under_the_same_name_guards_the_pipeline(model):
    pipe = MODELS[model]()
    kind = type(pipe)
    with applied(pipe):
        assert isinstance(pipe, kind)
        assert type(pipe).__name__ == kind.__name__
        assert repr(pipe).startswith(f"{kind.__name__} {{")
        assert set(pipe.components) == set(MODELS[model]().components)
        assert inspect.signature(pipe.__call__) == inspect.signature(MODELS[model]().__call__)
        assert {type(second) for second in (type(pipe)(**parts_of(pipe)), type(pipe).from_pipe(pipe))} == {kind}
    assert type(pipe) is kind


@every_model
def test_a_call_past_the_guard_is_checked_where_it_makes_its_latents(model):
    pipe = MODELS[model]()
    kind = type(pipe)
    with applied(pipe):
        pipe.transformer = another(pipe)
        refused(lambda: latents_of(pipe, call=kind.__call__), match="pipe.transformer is another")


@every_model
def test_a_class_of_another_library_over_the_guard(model, stock):
    pipe = MODELS[model]()
    kind, handle = type(pipe), applied(pipe)
    pipe.__class__ = type("Accelerated", (type(pipe),), {})
    transformer, pipe.transformer = pipe.transformer, another(pipe)
    refused(lambda: latents_of(pipe), match="pipe.transformer is another")
    pipe.transformer = transformer
    handle.remove()
    assert type(pipe).__name__ == "Accelerated"
    assert torch.equal(latents_of(pipe), stock[model])
    with applied(pipe):
        assert not torch.equal(latents_of(pipe), stock[model])
    assert isinstance(pipe, kind)
    assert torch.equal(latents_of(pipe), stock[model])


@every_model
def test_only_a_whole_pipeline_of_a_known_class_is_taken(model):
    pipe = MODELS[model]()
    for part in (pipe.transformer, pipe.vae, torch.compile(pipe.transformer, backend="eager")):
        refused(
            lambda part=part: applied(part),
            match=f"applies to a whole pipeline: give the {type(pipe).__name__}, not its",
        )
    for thing in (None, "wan", pipe.text_encoder):
        refused(lambda thing=thing: applied(thing), match="is not supported; use a WanPipeline")
    pipe.transformer = None
    refused(lambda: applied(pipe), match="Pipeline has no transformer; give it a .*Transformer3DModel")
    pipe.transformer = nn.Linear(2, 2)
    refused(lambda: applied(pipe), match="has a Linear as transformer")


def test_a_pipeline_that_lost_its_method_must_have_it_removed_before_another():
    pipe = random_wan()
    handle = applied(pipe)
    mine = pipe.transformer
    pipe.transformer = random_wan().transformer
    refused(lambda: applied(pipe), match="already has a method; call its handle's remove")
    pipe.transformer = mine
    set_all_processors(pipe)
    refused(lambda: applied(WanPipeline(**pipe.components)), match="already has a method; call its handle's remove")
    handle.remove()
    applied(pipe).remove()


# Two transformers.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipe: pipe.register_to_config(boundary_ratio=0.875), "boundary_ratio 0.875"),
        (lambda pipe: pipe.register_modules(transformer_2=random_wan().transformer), "a transformer_2"),
    ],
)
def test_two_transformers_are_refused_before_and_after(change, message):
    pipe = random_wan()
    with applied(pipe):
        change(pipe)
        refused(lambda: latents_of(pipe), match=message)
    refused(
        lambda: applied(pipe), match="two transformers, each for some of the steps.*either of them alone gives a wrong"
    )
    pipe.transformer = None
    refused(lambda: applied(pipe), match=message)


@pytest.mark.parametrize("loads", ["pipeline", "transformer", "subfolder"])
def test_one_of_two_transformers_is_refused_wherever_it_was_loaded_from(tmp_path, loads):
    pipe = random_wan()
    pipe.register_modules(transformer_2=random_wan().transformer)
    pipe.register_to_config(boundary_ratio=0.875)
    pipe.save_pretrained(tmp_path)
    if loads == "pipeline":
        pipe = WanPipeline.from_pretrained(tmp_path, transformer_2=None, boundary_ratio=None)
    else:
        pipe = random_wan()
        where = {"transformer": (tmp_path / "transformer", None), "subfolder": (tmp_path, "transformer_2")}
        folder, subfolder = where[loads]
        pipe.transformer = WanTransformer3DModel.from_pretrained(folder, subfolder=subfolder)
    refused(lambda: applied(pipe), match="two transformers")


@pytest.mark.parametrize("part", ["pipeline", "transformer"])
def test_one_of_two_transformers_is_refused_by_its_name_on_the_hub(part):
    pipe = random_wan()
    where = pipe if part == "pipeline" else pipe.transformer
    where.register_to_config(_name_or_path="Wan-AI/Wan2.1-T2V-14B-Diffusers")
    applied(pipe).remove()
    where.register_to_config(_name_or_path="Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    refused(lambda: applied(pipe), match="the name Wan-AI/Wan2.2-T2V-A14B-Diffusers: it denoises with two")


# What changes a pipeline and leaves the method in force.


class Lora(nn.Module):
    """A linear layer or a convolution with a small change beside it, as LoRA libraries put one in its place."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.change = copy.deepcopy(base_layer).requires_grad_(False)
        for parameter in self.change.parameters():
            parameter.mul_(0.1)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.base_layer(*inputs) + self.change(*inputs)


LORA = {
    "wan": ("patch_embedding", "proj_out", "blocks.1.attn1.to_q", "blocks.0.ffn.net.2"),
    "ltx": ("proj_in", "proj_out", "transformer_blocks.1.attn1.to_q", "transformer_blocks.0.ff.net.2"),
}


def put_lora(pipe: DiffusionPipeline) -> None:
    for name in LORA[name_of(pipe)]:
        pipe.transformer.set_submodule(name, Lora(pipe.transformer.get_submodule(name)))


def take_lora(pipe: DiffusionPipeline) -> None:
    for name in LORA[name_of(pipe)]:
        pipe.transformer.set_submodule(name, pipe.transformer.get_submodule(name).base_layer)


@every_model
def test_a_lora_before_and_after_and_its_end(model, right, stock):
    pipe = MODELS[model]()
    # Before: nothing has a hook that could be copied.
    put_lora(pipe)
    plain = latents_of(pipe)
    with applied(pipe):
        expected = latents_of(pipe)
        take_lora(pipe)
        assert torch.equal(latents_of(pipe), right[model])
    assert not torch.equal(expected, right[model])
    assert not any(module._forward_hooks for module in pipe.transformer.modules())
    with applied(pipe) as handle:
        latents_of(pipe)
        loras = MODELS[model]()
        put_lora(loras)
        for name in LORA[model]:
            pipe.transformer.set_submodule(name, loras.transformer.get_submodule(name))
        assert handle.in_force
        assert torch.equal(latents_of(pipe), expected)
    assert torch.equal(latents_of(pipe), plain)
    assert not any(module._forward_hooks for module in pipe.transformer.modules())
    take_lora(pipe)
    assert torch.equal(latents_of(pipe), stock[model])


@every_model
def test_fused_and_unfused_projections(model, right):
    pipe = MODELS[model]()
    with applied(pipe):
        pipe.transformer.fuse_qkv_projections()
        torch.testing.assert_close(latents_of(pipe), right[model], rtol=0, atol=2e-5 * float(right[model].abs().max()))
        pipe.transformer.unfuse_qkv_projections()
        assert torch.equal(latents_of(pipe), right[model])


@every_model
def test_a_cache_is_empty_when_a_call_begins_after_one_that_failed(model):
    pipe = MODELS[model]()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=5.0))
    with applied(pipe):
        expected = latents_of(pipe)

        def fail(_pipe: Any) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            latents_of(pipe, callback_on_step_end=in_step(1, fail))
        assert torch.equal(latents_of(pipe), expected)
        pipe.transformer.disable_cache()
        assert not torch.equal(latents_of(pipe), expected)


@every_model
def test_layerwise_casting_afterwards(model):
    before, after = MODELS[model](), MODELS[model]()
    types = {"storage_dtype": torch.bfloat16, "compute_dtype": torch.float32}
    before.transformer.enable_layerwise_casting(**types)
    with applied(before):
        expected = latents_of(before)
    with applied(after) as handle:
        after.transformer.enable_layerwise_casting(**types)
        assert handle.in_force
        assert torch.equal(latents_of(after), expected)


@every_model
def test_another_scheduler_that_is_right_for_the_model(model, right):
    pipe = MODELS[model]()
    first = pipe.scheduler
    others = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    with applied(pipe) as handle:
        for scheduler in (others, FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)):
            pipe.scheduler = scheduler
            assert handle.in_force
            torch.manual_seed(0)
            swapped = latents_of(pipe)
            fresh = MODELS[model]()
            fresh.scheduler = type(scheduler).from_config(scheduler.config)
            with applied(fresh):
                torch.manual_seed(0)
                assert torch.equal(latents_of(fresh), swapped)
            assert not torch.equal(swapped, right[model])
        pipe.scheduler = first
        assert torch.equal(latents_of(pipe), right[model])
        pipe.scheduler.register_to_config(invert_sigmas=True, use_flow_sigmas=False)
        refused(lambda: latents_of(pipe), match="predicts a flow")


def test_layers_that_diffusers_was_told_to_leave_out():
    pipe = random_wan()
    apply_layer_skip(pipe.transformer, LayerSkipConfig(indices=[1], fqn="blocks"))
    expected = latents_of(pipe)
    with applied(pipe, window_frames=8):
        assert torch.equal(latents_of(pipe), expected)


@every_model
def test_a_forward_that_was_wrapped(model, right):
    """Some caches wrap the forward: all layers run in the first step, and later none or some."""
    pipe = MODELS[model]()
    forward, kept = pipe.transformer.forward, []

    def reuse(*args: Any, **kwargs: Any) -> Any:
        skip = len(kept) >= {"wan": 3, "ltx": 2}[model]  # forwards, one or two a step
        kept.append(kept[-1] if skip else forward(*args, **kwargs))
        return kept[-1]

    with applied(pipe):
        pipe.transformer.forward = reuse
        assert not torch.equal(latents_of(pipe), right[model])
        assert len(kept) >= 3
        kept.clear()
        latents_of(pipe)
        del pipe.transformer.forward
        assert torch.equal(latents_of(pipe), right[model])


@every_model
def test_under_inference_mode(model, right):
    pipe = MODELS[model]()
    with applied(pipe), torch.inference_mode():
        assert torch.equal(latents_of(pipe), right[model])


@every_model
def test_hooks_that_a_library_copies_to_a_module_in_the_place_of_another(model, right, stock):
    """Tools of quantization do that."""
    pipe = MODELS[model]()
    before = pipe.transformer.proj_out
    handle = applied(pipe)
    copy_hooks(pipe)
    assert torch.equal(latents_of(pipe), right[model])
    assert len(pipe.transformer.proj_out._forward_hooks) == 1
    handle.remove()
    assert pipe.transformer.proj_out is not before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())
    assert torch.equal(latents_of(pipe), stock[model])


def copy_hooks(pipe: DiffusionPipeline) -> None:
    """Another output projection with the same weights and the hooks of the first."""
    old, new = pipe.transformer.proj_out, MODELS[name_of(pipe)]().transformer.proj_out
    for hook in old._forward_hooks.values():
        new.register_forward_hook(hook)
    pipe.transformer.proj_out = new


HOW = ("wrapper", "in place", "blocks", "forward")
COMPILED = [("wan", how, when) for how in HOW for when in ("before", "after")]
COMPILED += [("ltx", "wrapper", "after"), ("ltx", "blocks", "before")]


@pytest.mark.parametrize(("model", "how", "when"), COMPILED)
def test_a_compiled_transformer_has_the_method(model, how, when, right):
    torch.compiler.reset()
    pipe = MODELS[model]()
    counter = torch._dynamo.testing.CompileCounter()

    def compile_it() -> None:
        if how == "wrapper":
            pipe.transformer = torch.compile(pipe.transformer, backend=counter)
        elif how == "in place":
            pipe.transformer.compile(backend=counter)
        elif how == "blocks":
            pipe.transformer.compile_repeated_blocks(backend=counter)
        else:
            pipe.transformer.forward = torch.compile(pipe.transformer.forward, backend=counter)

    if when == "before":
        compile_it()
    handle = applied(pipe)
    if when == "after":
        compile_it()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised by dynamo about torch's own code
        got = latents_of(pipe)
    assert handle.in_force
    torch.testing.assert_close(got, right[model], rtol=0, atol=2e-5 * float(right[model].abs().max()))
    assert counter.frame_count >= 1
    set_one_processor(pipe)
    refused(lambda: latents_of(pipe), match="layer 1 has another attention processor")
    handle.remove()


@every_model
@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_one_graph_of_everything_is_refused_in_one_line(model, how):
    torch.compiler.reset()
    pipe = MODELS[model]()
    with applied(pipe):
        if how == "wrapper":
            pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
        else:
            pipe.transformer.compile(backend="eager", fullgraph=True)
        refused(
            lambda: latents_of(pipe),
            match="one graph with the whole transformer.*call transformer.compile_repeated_blocks",
        )


# Hooks, groups, parts.


@pytest.mark.parametrize("during", [False, True])
def test_an_engine_says_so_too(during, tmp_path):
    config = RunConfig(
        model=ModelConfig(path=str(save_random_wan(tmp_path)), device="cpu"),
        video=VideoConfig(**SIZE["wan"]),
        sampler=SamplerConfig(num_steps=3, max_text_tokens=20),
        method=MethodConfig(name="freespec", window_frames=3),
        output=OutputConfig(progress="off"),
    )
    with contextlib.closing(LongVideoEngine(config)) as engine:

        def happen(*_: int) -> None:
            engine.pipe.transformer = random_wan().transformer

        if not during:
            happen()
        refused(lambda: engine.denoise("a red circle", on_step=happen), match="pipe.transformer is another")


@every_model
def test_no_part_of_a_transformer_runs_on_what_the_last_forward_left(model):
    pipe = MODELS[model]()
    hidden = torch.zeros(1, 4, pipe.transformer.proj_out.in_features)
    with applied(pipe):
        latents_of(pipe)
        attn = blocks_of(pipe)[0].attn1
        rotary = (torch.zeros(1, 4, 1, 12), torch.zeros(1, 4, 1, 12))
        refused(lambda: attn.processor(attn, hidden, None, None, rotary), match="without the hooks of its transformer")
        refused(lambda: pipe.transformer.proj_out(hidden), match="without the hooks of its transformer")


def test_riflex_stays_on_a_rotary_table_that_was_replaced():
    riflex = Riflex(enabled=True, index=1)
    pipe = random_wan()
    with applied(pipe, riflex=riflex):
        expected = latents_of(pipe)
        pipe.transformer.rope = random_wan().transformer.rope
        assert torch.equal(latents_of(pipe), expected)
    with applied(pipe):
        assert not torch.equal(latents_of(pipe), expected)


def test_a_process_group_that_was_destroyed_is_one_line():
    pipe, other = random_wan(), random_wan()
    handle = applied(pipe)
    dist.destroy_process_group()
    refused(lambda: latents_of(pipe), match="process group .* was destroyed")
    with applied(other) as second:
        refused(lambda: latents_of(pipe), match="process group .* was destroyed")
        handle.remove()  # does not end the group of the other
        assert second.in_force
        latents_of(other)
    assert not dist.is_initialized()
    applied(pipe).remove()


def test_an_error_in_a_call_leaves_the_method_in_force(right):
    pipe = random_wan()
    with applied(pipe) as handle:

        def fail(_pipe: Any) -> None:
            raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            latents_of(pipe, callback_on_step_end=in_step(1, fail))
        assert handle.in_force
        assert torch.equal(latents_of(pipe), right["wan"])
        handle.remove()
        assert not handle.in_force
        refused(handle.check, match="it was removed")
        handle.remove()


# Second pipelines.


@every_model
def test_a_pipeline_of_the_same_parts_has_the_method_too(model, right):
    pipe = MODELS[model]()
    with applied(pipe):
        for second in (
            type(MODELS[model]())(**parts_of(pipe)),
            type(pipe).from_pipe(pipe),
            type(pipe)(**parts_of(pipe)),
        ):
            second.set_progress_bar_config(disable=True)
            assert torch.equal(latents_of(second), right[model])
        assert torch.equal(latents_of(pipe), right[model])


def parts_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    return {name: part for name, part in pipe.components.items() if part is not None}


@every_model
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("ran_before", [False, True])
def test_pipeline_that_shares_only_the_transformer_is_refused(model, steps, ran_before):
    pipe = MODELS[model]()
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    if model == "ltx":
        scheduler.register_to_config(shift_terminal=None)
        pipe.scheduler.register_to_config(shift_terminal=None)
    with applied(pipe):
        if ran_before:
            latents_of(pipe)
        second = type(MODELS[model]())(**parts_of(pipe) | {"scheduler": scheduler})
        second.set_progress_bar_config(disable=True)
        refused(lambda: latents_of(second, num_inference_steps=steps), match="another pipeline shares this transformer")


def test_video_to_video_that_shares_the_transformer_is_refused():
    pipe = random_wan()
    second = WanVideoToVideoPipeline(**{name: part for name, part in parts_of(pipe).items() if name != "transformer_2"})
    second.set_progress_bar_config(disable=True)
    video = [Image.new("RGB", (48, 32), (index, 0, 0)) for index in range(29)]
    arguments = {"prompt": "a red circle", "height": 32, "width": 48, "num_inference_steps": 6, "strength": 0.5}
    with applied(pipe):
        refused(lambda: second(video=video, **arguments, max_sequence_length=20), match="another pipeline shares")


def test_image_to_video_that_shares_transformer_and_scheduler_has_the_method():
    pipe = random_ltx()
    second = LTXImageToVideoPipeline(**parts_of(pipe))
    second.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 32, "num_frames": 57, "image": Image.new("RGB", (32, 64), "red")}
    plain = latents_of(second, **call)
    with applied(pipe, method="direct"):
        assert torch.equal(latents_of(second, **call), plain)
    with applied(pipe):
        assert not torch.equal(latents_of(second, **call), plain)


# Ranks.


def on_ranks(_rank: int, case: tuple[str, str, tuple[int, int]]) -> Tensor | str:
    """Latents of the pipeline's own loop over ring x ulysses, or the one line instead, after something has happened to it."""
    model, event, (ring, ulysses) = case
    pipe = MODELS[model]()
    with warnings.catch_warnings(), applied(pipe, ranks=Ranks(mesh=mesh_of((1, ring, ulysses)))):
        warnings.simplefilter("ignore", DeprecationWarning)  # raised by dynamo about torch's own code
        latents_of(pipe)
        EVENTS[event](pipe)
        try:
            return latents_of(pipe)
        except UserError as error:
            return str(error)


def put_another_lora(pipe: DiffusionPipeline) -> None:
    """LoRAs made of another pipeline's layers, which carry no hooks."""
    other = MODELS[name_of(pipe)]()
    put_lora(other)
    for name in LORA[name_of(pipe)]:
        pipe.transformer.set_submodule(name, other.transformer.get_submodule(name))


def put_noise(pipe: DiffusionPipeline) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)


def compile_blocks(pipe: DiffusionPipeline) -> None:
    pipe.transformer.compile_repeated_blocks(backend="eager")


def compile_all(pipe: DiffusionPipeline) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


EVENTS = {
    "nothing": lambda _pipe: None,
    "a LoRA": put_another_lora,
    "hooks copied": copy_hooks,
    "compiled": compile_all,
    "blocks compiled": compile_blocks,
    "noise": put_noise,
    "another transformer": TAKEN_OFF["another transformer"][0],
    "one processor": set_one_processor,
}


@pytest.mark.parametrize(("ranks", "axes"), [(2, (2, 1)), (2, (1, 2)), (3, (3, 1))])
def test_over_ranks_all_have_the_method_or_say_the_same(ranks, axes, right, tmp_path):
    events = [event for event in EVENTS if "compiled" not in event]
    cases = [(model, event, axes) for model in MODELS for event in events]
    for (model, event, _), by_rank in zip(cases, run_ranks(ranks, on_ranks, cases, tmp_path), strict=True):
        if event in ("nothing", "a LoRA", "hooks copied"):
            pipe = MODELS[model]()
            with applied(pipe):
                EVENTS[event](pipe)
                alone = latents_of(pipe)
            assert (event == "a LoRA") != torch.equal(alone, right[model])
            assert all(relative(latents, alone) < 1e-5 for latents in by_rank), (model, event)
            assert all(torch.equal(latents, by_rank[0]) for latents in by_rank)
        else:
            assert by_rank == [by_rank[0]] * ranks
            expected = {"noise": "draws noise in each step", "one processor": "layer 1 has another"}
            assert expected.get(event, "pipe.transformer is another") in by_rank[0]


@pytest.mark.parametrize("event", ["blocks compiled", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_ring_of_unequal_shards_runs_compiled(event, right, tmp_path):
    [by_rank] = run_ranks(3, on_ranks, [("wan", event, (3, 1))], tmp_path)
    assert all(relative(latents, right["wan"]) < 1e-5 for latents in by_rank)
