"""Each attention kernel against plain torch: output, log-sum-exp, strided overlapping views, low precision, selection."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from freespec.kernels import (
    CUDNN_FIRST,
    CUDNN_SINCE,
    KERNELS,
    Kernel,
    candidates,
    cpu_flash,
    cuda_candidates,
    cuda_cudnn,
    cuda_efficient,
    cuda_flash,
    plain,
    preferred,
    select_kernel,
)
from tests.freespec.cases import assert_low_precision, assert_same_math, drawn, seeds

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# Kernel, dtype, device of every fast kernel that is compared with plain torch.
FAST = [
    pytest.param(cpu_flash, torch.float32, "cpu", id="cpu_flash-fp32"),
    pytest.param(cpu_flash, torch.bfloat16, "cpu", id="cpu_flash-bf16"),
    pytest.param(cuda_flash, torch.bfloat16, "cuda", id="cuda_flash-bf16", marks=gpu),
    pytest.param(cuda_flash, torch.float16, "cuda", id="cuda_flash-fp16", marks=gpu),
    pytest.param(cuda_cudnn, torch.bfloat16, "cuda", id="cuda_cudnn-bf16", marks=gpu),
    pytest.param(cuda_efficient, torch.float32, "cuda", id="cuda_efficient-fp32", marks=gpu),
    pytest.param(cuda_efficient, torch.bfloat16, "cuda", id="cuda_efficient-bf16", marks=gpu),
]


def reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / sqrt D) v and its log-sum-exp, in the dtype of the arguments: written for the eye."""
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def sliding_views(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q of 5 frames and overlapping windows of 3 frames in k and v, cut from [S, N, D] tensors without a copy."""
    frames, tokens, heads, dim, window = 7, 33, 3, 64, 3
    generator = torch.Generator().manual_seed(0)
    o_global = torch.randn(3, frames * tokens, heads, dim, generator=generator)
    q, k, v = o_global.to(device, dtype).unbind(0)
    k_bnkd, v_bnkd = (x.unfold(0, window * tokens, tokens).transpose(-1, -2) for x in (k, v))
    assert k_bnkd.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    return q[: 5 * tokens].unflatten(0, (5, tokens)).transpose(1, 2), k_bnkd, v_bnkd


def check_low_precision(kernel: Kernel, views: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = views
    out, lse = kernel(q, k, v)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert lse.shape == q.shape[:3]
    assert lse.dtype == torch.float32
    exact, exact_lse = reference(q.double(), k.double(), v.double())
    naive, naive_lse = reference(q, k, v)
    assert_low_precision(out, naive, exact)
    assert_low_precision(lse, naive_lse.float(), exact_lse)


@pytest.mark.parametrize(("kernel", "dtype", "device"), FAST)
def test_fast_kernel_on_overlapping_views(kernel: Kernel, dtype: torch.dtype, device: str) -> None:
    check_low_precision(kernel, sliding_views(dtype, device))


@pytest.mark.parametrize(("kernel", "dtype", "device"), FAST)
def test_negative_controls_of_the_fast_kernels(kernel: Kernel, dtype: torch.dtype, device: str) -> None:
    def unscaled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return kernel(q * 1.05, k, v)

    def base_two(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = kernel(q, k, v)
        return out, lse * 1.4427

    for broken in (unscaled, base_two):
        with pytest.raises(AssertionError):
            check_low_precision(broken, sliding_views(dtype, device))


@drawn
@given(
    seed=seeds,
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)),
    dim=st.sampled_from([1, 2, 4, 8]),
)
@pytest.mark.parametrize("kernel", [plain, cpu_flash])
def test_cpu_kernels_in_fp64(kernel: Kernel, seed: int, sizes: tuple[int, int, int, int], dim: int) -> None:
    batch, heads, queries, keys = sizes
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, dim, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, batch, heads, keys, dim, generator=generator, dtype=torch.float64).unbind(0)
    for actual, expected in zip(kernel(q, k, v), reference(q, k, v), strict=True):
        assert_same_math(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_flash_is_what_the_public_function_runs(dtype: torch.dtype) -> None:
    q, k, v = sliding_views(dtype, "cpu")
    assert torch.equal(cpu_flash(q, k, v)[0], torch.nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that sees an H100 and a cuDNN that is new enough."""
    see_gpu(monkeypatch, (9, 0), CUDNN_SINCE)


def see_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cudnn: int | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("name", "device", "dtype", "expected"),
    [
        ("auto", CPU, torch.float32, "cpu_flash"),
        ("auto", CPU, torch.float64, "cpu_flash"),
        ("auto", CUDA, torch.bfloat16, "cuda_cudnn"),
        ("auto", CUDA, torch.float32, "cuda_efficient"),
        ("plain", CPU, torch.float64, "plain"),
        ("plain", CUDA, torch.float64, "plain"),
        ("cuda_cudnn", CUDA, torch.float16, "cuda_cudnn"),
    ],
)
def test_select_kernel(name: str, device: torch.device, dtype: torch.dtype, expected: str) -> None:
    assert select_kernel(name, device, dtype) is KERNELS[expected]


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("flash", CPU, torch.float32, r"unknown attention kernel 'flash'; choose one of auto, plain, cpu_flash"),
        ("cuda_flash", CPU, torch.bfloat16, r"'cuda_flash' does not run on cpu; use auto or plain"),
        ("cpu_flash", CUDA, torch.float32, r"'cpu_flash' does not run on cuda"),
        ("auto", torch.device("meta"), torch.float32, r"does not run on meta"),
        ("cuda_flash", CUDA, torch.float32, r"'cuda_flash' takes fp16 or bf16, not torch.float32"),
        ("cuda_cudnn", CUDA, torch.float64, r"'cuda_cudnn' takes fp16 or bf16"),
        ("cuda_efficient", CUDA, torch.float64, r"does not take float64; use plain"),
        ("auto", CUDA, torch.float64, r"does not take float64; use plain"),
        ("cuda_fa3", CPU, torch.bfloat16, r"'cuda_fa3' does not run on cpu"),
        ("cuda_fa3", CUDA, torch.float32, r"'cuda_fa3' takes fp16 or bf16"),
        (
            "cuda_fa3",
            CUDA,
            torch.bfloat16,
            r"'cuda_fa3' needs flash-attn 3, .* \(No module named 'flash_attn_interface'\)$",
        ),
    ],
)
def test_select_kernel_errors(name: str, device: torch.device, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_kernel(name, device, dtype)


def returns_always(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """flash_attn_interface.flash_attn_func as its first versions had it: [B, S, N, D] in and out, lse [B, N, S]."""
    out, lse = plain(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2).contiguous(), lse


def returns_if_asked(
    q: Tensor, k: Tensor, v: Tensor, return_attn_probs: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The same since it returns the log-sum-exp where it is asked to."""
    out, lse = returns_always(q, k, v)
    return (out, lse) if return_attn_probs else out


@pytest.mark.parametrize("function", [returns_always, returns_if_asked])
def test_flash_attn_3_as_a_kernel(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interface, computed in plain torch: layouts and what is asked for are ours to get right."""
    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=function))
    kernel = select_kernel("cuda_fa3", CUDA, torch.bfloat16)
    assert kernel is select_kernel("cuda_fa3", CUDA, torch.bfloat16)
    views = sliding_views(torch.float32, "cpu")
    for actual, expected in zip(kernel(*views), plain(*views), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("capability", "cudnn", "expected"),
    [
        ((9, 0), 91501, ("cuda_cudnn", "cuda_flash", "cuda_fa3")),
        ((10, 0), 92000, ("cuda_cudnn", "cuda_flash", "cuda_fa3")),
        ((10, 3), 92000, ("cuda_flash", "cuda_cudnn", "cuda_fa3")),
        ((8, 0), 91501, ("cuda_flash", "cuda_cudnn", "cuda_fa3")),
        ((12, 0), 91501, ("cuda_flash", "cuda_cudnn", "cuda_fa3")),
        ((9, 0), 91500, ("cuda_flash", "cuda_fa3")),
        ((9, 0), 8902, ("cuda_flash", "cuda_fa3")),
        ((9, 0), None, ("cuda_flash", "cuda_fa3")),
        ((7, 5), 91501, ("cuda_efficient",)),
    ],
)
def test_candidates_are_in_the_order_of_torch(
    capability: tuple[int, int], cudnn: int | None, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cuda_candidates(capability, cudnn) == expected
    see_gpu(monkeypatch, capability, cudnn)
    assert candidates(CUDA, torch.bfloat16) == expected
    assert candidates(CUDA, torch.float32) == ("cuda_efficient",)
    assert candidates(CPU, torch.bfloat16) == ("cpu_flash",)
    assert select_kernel("auto", CUDA, torch.bfloat16) is KERNELS[expected[0]]


def test_a_cudnn_that_reads_out_of_bounds_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpu(monkeypatch, (9, 0), 91002)
    with pytest.raises(ValueError, match=r"needs cuDNN 9.15.1 or newer .*, this is 91002: .*; use cuda_flash"):
        select_kernel("cuda_cudnn", CUDA, torch.bfloat16)
    monkeypatch.setattr(torch.version, "cuda", None)  # a build for another vendor reports that vendor's library
    with pytest.raises(ValueError, match="this is None"):
        select_kernel("cuda_cudnn", CUDA, torch.bfloat16)


def test_another_kernel_than_the_first_must_be_clearly_faster() -> None:
    assert preferred({"a": 1.0, "b": 0.95, "c": 2.0}) == "a"
    assert preferred({"a": 1.0, "b": 0.85, "c": 0.8}) == "c"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_first_candidate_is_what_the_public_function_runs() -> None:
    q, k, v = sliding_views(torch.bfloat16, "cuda")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(select_kernel("auto", CUDA, torch.bfloat16)(q, k, v)[0], expected)
    assert (torch.cuda.get_device_capability() in CUDNN_FIRST) == (candidates(CUDA, q.dtype)[0] == "cuda_cudnn")
