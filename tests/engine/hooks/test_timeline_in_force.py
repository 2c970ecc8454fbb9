"""A timeline on a living pipeline: whatever takes it off is one line and no video of texts that no frame was meant to see."""

import copy
import pickle
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from engine.hooks.cross_attention import TimelineHandle, apply_timeline
from tests.engine.applied import (
    MODELS,
    SIZE,
    another,
    applied,
    blocks_of,
    every_model,
    in_step,
    name_of,
    refused,
)


def timed(pipe: DiffusionPipeline) -> TimelineHandle:
    fps = {"wan": 4, "ltx": 8}[name_of(pipe)]  # a latent frame is a second
    return apply_timeline(
        pipe, "a red circle [0-3s] | a gold star [3s-]", fps=fps, negative_prompt="bad", max_sequence_length=20
    )


def latents_of(pipe: DiffusionPipeline, handle: TimelineHandle | None = None, **more: Any) -> Tensor:
    text = {"prompt": "a red circle", "negative_prompt": "bad"} if handle is None else handle.inputs
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "max_sequence_length": 20, "output_type": "latent"}
    generator = torch.Generator().manual_seed(3)
    return pipe(**call, **SIZE[name_of(pipe)], **text, generator=generator, **more).frames


def set_one_processor(pipe: DiffusionPipeline) -> None:
    attn = blocks_of(pipe)[1].attn2
    attn.set_processor(type(attn)._default_processor_cls())


TAKEN_OFF = {
    "another transformer": (lambda pipe: setattr(pipe, "transformer", another(pipe)), "pipe.transformer is another"),
    "no transformer": (lambda pipe: setattr(pipe, "transformer", None), "pipe.transformer is None"),
    "one processor": (set_one_processor, "layer 1 has another cross-attention processor"),
    "a block less": (lambda pipe: blocks_of(pipe).pop(1), "has 1 cross-attentions and had 2"),
    "pre-hooks cleared": (lambda pipe: pipe.transformer._forward_pre_hooks.clear(), "its hooks were removed"),
    "context parallel": (lambda pipe: setattr(pipe.transformer, "_parallel_config", object()), "context parallel"),
}


@every_model
@pytest.mark.parametrize("accident", TAKEN_OFF)
def test_what_takes_the_timeline_off_is_an_error_at_the_next_call(model, accident):
    happen, message = TAKEN_OFF[accident]
    pipe = MODELS[model]()
    handle = timed(pipe)
    assert handle.in_force
    happen(pipe)
    assert not handle.in_force
    refused(handle.check, match=message)
    refused(lambda: latents_of(pipe, handle), match=f"the timeline is not in force: .*{message}")
    handle.remove()


@every_model
@pytest.mark.parametrize("accident", ["another transformer", "one processor"])
def test_what_happens_during_a_call_is_an_error_of_that_call(model, accident):
    happen, message = TAKEN_OFF[accident]
    pipe = MODELS[model]()
    with timed(pipe) as handle:
        refused(lambda: latents_of(pipe, handle, callback_on_step_end=in_step(0, happen)), match=message)


@every_model
@pytest.mark.parametrize("first", ["timeline", "method"])
def test_with_a_method_both_leave_in_any_order(model, first):
    pipe = MODELS[model]()
    kind, stock = type(pipe), latents_of(pipe)
    method, timeline = applied(pipe), timed(pipe)
    assert method.in_force
    assert timeline.in_force
    refused(lambda: applied(pipe), match="already has a method")
    both = latents_of(pipe, timeline)
    handles = {"timeline": timeline, "method": method}
    handles.pop(first).remove()
    left = latents_of(pipe, None if first == "timeline" else timeline)
    assert not torch.equal(left, both)
    assert not torch.equal(left, stock)
    assert type(pipe) is not kind
    handles.popitem()[1].remove()
    assert type(pipe) is kind
    assert not method.in_force
    assert not timeline.in_force
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())
    assert torch.equal(latents_of(pipe), stock)


@every_model
@pytest.mark.parametrize("copying", [copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__)
def test_copies_and_pickles_are_refused_until_it_is_removed(model, copying):
    pipe = MODELS[model]()
    handle = timed(pipe)
    for what in (pipe, pipe.transformer, handle):
        refused(lambda what=what: copying(what), match=r"a timeline on it cannot be copied or pickled; call .*remove")
    handle.remove()
    copying(pipe.transformer)


@every_model
def test_only_a_whole_pipeline_is_taken(model):
    pipe = MODELS[model]()
    refused(
        lambda: apply_timeline(pipe.transformer, "a [0-3s] | b [3s-]", fps=4),
        match="a timeline applies to a whole pipeline: give the",
    )


@every_model
def test_projections_that_are_fused_afterwards(model):
    pipe = MODELS[model]()
    with timed(pipe) as handle:
        expected = latents_of(pipe, handle)
        pipe.transformer.fuse_qkv_projections()
        torch.testing.assert_close(latents_of(pipe, handle), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
