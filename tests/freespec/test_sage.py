"""Quantised attention of the keys outside the windows: what is merged is exact but for the rounding, and nothing else changes."""

import sys
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import freespec.sage
from freespec.attention import WindowedAttention, masked_ref
from freespec.kernels import plain, select_complement
from freespec.sage import sage_kernel
from tests.freespec import sage_stand_in
from tests.freespec.cases import Video, assert_same_math

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# 11 frames of 37 tokens with windows of 4: blocks of 64 keys and 128 queries end inside frames.
VIDEO = Video(num_frames=11, frame_tokens=37, window_frames=4, batch=2, heads=3, dim=16)


def layer(function: Any = None) -> WindowedAttention:
    return WindowedAttention(
        num_frames=VIDEO.num_frames,
        frame_tokens=VIDEO.frame_tokens,
        window_frames=VIDEO.window_frames,
        kernel=plain,
        rest_kernel=None if function is None else sage_kernel(function),
    )


def biased_qkv() -> tuple[Tensor, Tensor, Tensor]:
    """Keys with a mean, which the smoothing takes away: without one its correction would be zero."""
    q, k, v = VIDEO.qkv(0)
    return q, k + torch.linspace(-2, 3, VIDEO.dim, dtype=k.dtype), v


def whole(attention: WindowedAttention, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return attention.both(*qkv)[1]


def test_without_rounding_the_global_branch_is_that_of_plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = biased_qkv()
    expected = masked_ref(*qkv, frame_tokens=VIDEO.frame_tokens, window_frames=None)
    assert_same_math(whole(layer(sage_stand_in.exact), qkv), expected)
    for keys in (1, 600):  # one window at a time, and two: the last piece is smaller
        monkeypatch.setattr(freespec.sage, "KEYS_AT_ONCE", keys)
        assert_same_math(whole(layer(sage_stand_in.exact), qkv), expected)


def test_negative_control_uncorrected_log_sum_exp() -> None:
    qkv = biased_qkv()
    expected = masked_ref(*qkv, frame_tokens=VIDEO.frame_tokens, window_frames=None)
    with pytest.raises(AssertionError):
        assert_same_math(whole(layer(sage_stand_in.uncorrected), qkv), expected)


def test_rounding_moves_the_global_branch_by_what_int8_costs_and_the_local_branch_not_at_all() -> None:
    qkv = biased_qkv()
    (local, o_global), (exact_local, exact_global) = layer(sage_stand_in.sageattn).both(*qkv), layer().both(*qkv)
    assert torch.equal(local, exact_local)
    error = (o_global - exact_global).norm() / exact_global.norm()
    assert 1e-4 < error < 2e-2  # 127 steps to the largest of 16 normal numbers: a hundredth of a logit
    assert torch.equal(layer(sage_stand_in.sageattn).dense(*qkv)[0], layer().dense(*qkv)[0])
    assert torch.equal(layer(sage_stand_in.sageattn).local(*qkv, 0, 0)[0], exact_local)


def test_keys_that_follow_from_other_ranks_are_quantised_too_and_keys_stay_as_they_are() -> None:
    q, k, v = biased_qkv()
    before = k.clone()
    out, lse = layer(sage_stand_in.exact).far(q, k, v)
    for actual, expected in zip((out, lse), layer().dense(q, k, v), strict=True):
        assert_same_math(actual, expected)
    rounded = layer(sage_stand_in.sageattn).far(q, k, v)[0]
    assert not torch.equal(rounded, out)
    assert torch.equal(k, before)
    none, minus = layer(sage_stand_in.sageattn).far(q, k[:, :0], v[:, :0])
    assert not none.any() and minus.isneginf().all()


def test_wide_heads_are_refused_with_the_number() -> None:
    with pytest.raises(ValueError, match="at most 128 channels, got 160; use same"):
        sage_kernel(sage_stand_in.sageattn)(*torch.zeros(3, 1, 1, 2, 160))


def package(function: Any) -> ModuleType:
    module = ModuleType("sageattention")
    module.sageattn = function
    return module


def test_the_installed_package_becomes_the_kernel() -> None:
    with mock.patch.dict(sys.modules, {"sageattention": package(sage_stand_in.sageattn)}):
        kernel = select_complement("sage", CUDA, torch.bfloat16, dual="auto")
        assert kernel is sage_kernel(sage_stand_in.sageattn)
        assert select_complement("sage", CUDA, torch.bfloat16, dual="strided") is kernel  # or blocks would recompile
    assert select_complement("same", CPU, torch.float64, dual="triton") is None


@pytest.mark.parametrize(
    ("module", "device", "dtype", "dual", "message"),
    [
        (None, CUDA, torch.bfloat16, "auto", r"needs the package sageattention \(.*\); use same"),
        (
            package(sage_stand_in.version_1),
            CUDA,
            torch.bfloat16,
            "auto",
            "needs sageattention 2 or newer, which returns",
        ),
        (package(sage_stand_in.sageattn), CPU, torch.bfloat16, "auto", "does not run on cpu; use same"),
        (package(sage_stand_in.sageattn), CUDA, torch.float32, "auto", r"takes fp16 or bf16, not torch\.float32"),
        (
            package(sage_stand_in.sageattn),
            CUDA,
            torch.bfloat16,
            "triton",
            "needs attention.dual strided; triton attends",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    module: ModuleType | None, device: torch.device, dtype: torch.dtype, dual: str, message: str
) -> None:
    with (
        mock.patch.dict(sys.modules, {"sageattention": module}),
        pytest.raises(ValueError, match=f"attention.complement sage {message}") as caught,
    ):
        select_complement("sage", device, dtype, dual=dual)
    assert "\n" not in str(caught.value)


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown attention.complement 'sge'; choose one of same, sage"):
        select_complement("sge", CUDA, torch.bfloat16, dual="auto")
