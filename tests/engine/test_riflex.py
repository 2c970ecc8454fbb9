"""RIFLEx on a pipeline: the rotary table that its blocks get, and that it goes away again."""

import math

import pytest
import torch
from torch import Tensor

from engine import apply_method
from engine.errors import UserError
from freespec.riflex import Riflex
from tests.engine.hooks.test_apply import latents_of
from tests.tiny_pipelines import random_ltx, random_wan

RIFLEX = Riflex(enabled=True, index=1)


def table_of(pipe, frames: int) -> tuple[Tensor, Tensor]:
    """What the rotary module hands to the blocks in the last forward of a short run."""
    seen = {}
    hook = pipe.transformer.rope.register_forward_hook(lambda *call: seen.update(out=call[2]))
    latents_of(pipe, num_frames=4 * frames - 3)
    hook.remove()
    return seen["out"]


@pytest.mark.parametrize("method", ["direct", "freespec", "freepca"])
def test_the_blocks_get_the_table_written_by_hand(method):
    """12 channels a head: 4 temporal ones, so periods of 6.3 and 628 frames; 8 frames of 4 x 6 tokens."""
    pipe = random_wan()
    stock = table_of(pipe, 8)
    with apply_method(pipe, method=method, window_frames=3, riflex=RIFLEX):
        cos, sin = table_of(pipe, 8)
    frequency = 0.9 * 2 * math.pi / 8
    frame = torch.arange(8 * 24).div(24, rounding_mode="floor").double()
    for table, before, curve in ((cos, stock[0], torch.cos), (sin, stock[1], torch.sin)):
        for column in (0, 1):
            torch.testing.assert_close(table[0, :, 0, column].double(), curve(frame * frequency), atol=1e-6, rtol=0)
            assert (table - before)[0, :, 0, column].abs().max() > 0.1
        assert torch.equal(table[..., 2:], before[..., 2:])


def test_remove_restores_the_pipeline_bit_for_bit():
    pipe = random_wan()
    stock = latents_of(pipe)
    handle = apply_method(pipe, method="direct", window_frames=3, riflex=RIFLEX)
    assert not torch.equal(latents_of(pipe), stock)
    handle.remove()
    assert torch.equal(latents_of(pipe), stock)
    assert not pipe.transformer.rope._forward_hooks


def test_off_by_default_and_below_the_period():
    pipe = random_wan()
    stock, short = latents_of(pipe), latents_of(pipe, num_frames=21)  # 6 frames: no longer than the period of 6.3
    with apply_method(pipe, method="direct", window_frames=3, riflex=Riflex()):
        assert torch.equal(latents_of(pipe), stock)
    with apply_method(pipe, method="direct", window_frames=3, riflex=RIFLEX):
        assert torch.equal(latents_of(pipe, num_frames=21), short)


def test_native_length_is_the_stock_pipeline_bit_for_bit():
    """Of 9 frames, longer than the period of 6.3 that index 1 names."""
    pipe = random_wan()
    native, longer = latents_of(pipe, num_frames=33), latents_of(pipe, num_frames=37)
    with apply_method(pipe, method="direct", window_frames=9, riflex=RIFLEX):
        assert torch.equal(latents_of(pipe, num_frames=33), native)
        assert not torch.equal(latents_of(pipe, num_frames=37), longer)
    with apply_method(pipe, method="direct", window_frames=9, riflex=Riflex(enabled=True)):  # takes the period of 628
        assert torch.equal(latents_of(pipe, num_frames=37), longer)


def test_a_frequency_that_the_model_does_not_have():
    pipe = random_wan()
    with pytest.raises(UserError, match="riflex: index 3 of the model's 2 temporal frequencies"):
        apply_method(pipe, method="direct", window_frames=3, riflex=Riflex(enabled=True, index=3))
    latents_of(pipe, num_frames=9)  # and nothing was left on it
    assert not pipe.transformer._forward_pre_hooks


def test_a_model_whose_positions_are_seconds_is_refused():
    with pytest.raises(
        UserError, match=r"attention.riflex does nothing for LTX-Video.*; set attention.riflex.enabled false"
    ):
        apply_method(random_ltx(), method="direct", window_frames=3, riflex=RIFLEX)
