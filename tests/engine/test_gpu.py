"""On a GPU: the methods in bf16 with every kernel against the same run in fp32 on the CPU."""

import contextlib

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine import apply_method
from freespec.kernels import select_kernel
from freespec.methods import FreeSpec
from tests.engine.hooks.test_apply import latents_of
from tests.tiny_pipelines import random_wan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

METHODS = {
    "direct": "direct",
    "sliding_window": "sliding_window",
    "freespec": FreeSpec(domain="step", fused_share=0.6),
    "freespec, global basis": FreeSpec(domain="step", fused_share=0.6, basis="global", time=False, rank=False),
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.norm(a.cpu() - b) / torch.linalg.norm(b))


def skip_unless_it_runs(kernel: str) -> None:
    """What `select_kernel` refuses on this machine, such as an old cuDNN, is no fault."""
    try:
        select_kernel(kernel, torch.device("cuda"), torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", METHODS)
def test_fp32_on_the_gpu_is_fp32_on_the_cpu(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the patch embedding is a convolution
    expected, got = [], []
    for device, into in (("cpu", expected), ("cuda", got)):
        pipe = random_wan(head_dim=16).to(device)
        with apply_method(pipe, method=METHODS[name], window_frames=3):
            into.append(latents_of(pipe))
    assert relative(got[0], expected[0]) < 1e-3


@pytest.mark.parametrize("kernel", ["cuda_flash", "cuda_cudnn", "cuda_efficient", "plain"])
@pytest.mark.parametrize("name", METHODS)
def test_every_kernel_in_bf16_is_no_further_from_fp32_than_plain_twice(name, kernel):
    skip_unless_it_runs(kernel)
    reference = random_wan(head_dim=16)
    with apply_method(reference, method=METHODS[name], window_frames=3):
        expected = latents_of(reference)
    errors = {}
    for each in ("plain", kernel):
        pipe = random_wan(head_dim=16).to("cuda", torch.bfloat16)
        with apply_method(pipe, method=METHODS[name], window_frames=3, kernel=each):
            errors[each] = relative(latents_of(pipe), expected)
    assert errors[kernel] <= 2 * errors["plain"]


BACKENDS = {"cuda_flash": SDPBackend.FLASH_ATTENTION, "cuda_cudnn": SDPBackend.CUDNN_ATTENTION}


@pytest.mark.parametrize("kernel", ["auto", *BACKENDS])
@pytest.mark.parametrize("window", [3, 8])  # a long video, and one of native length
def test_direct_under_the_backend_of_its_kernel_is_the_stock_pipeline(kernel, window):
    skip_unless_it_runs(kernel)
    pipe = random_wan(head_dim=16).to("cuda", torch.bfloat16)
    with sdpa_kernel(BACKENDS[kernel]) if kernel in BACKENDS else contextlib.nullcontext():
        expected = latents_of(pipe)
        with apply_method(pipe, method="direct", window_frames=window, kernel=kernel):
            assert torch.equal(latents_of(pipe), expected)


@pytest.mark.parametrize("backend", [*BACKENDS.values(), SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
def test_native_length_is_the_stock_pipeline_under_any_backend(backend):
    """Whatever kernel was chosen: the choice is for what torch's function cannot do."""
    pipe = random_wan(head_dim=16).to("cuda", torch.bfloat16)
    with sdpa_kernel(backend):
        expected = latents_of(pipe)
        with apply_method(pipe, method="freespec", window_frames=8, kernel="cuda_flash"):
            assert torch.equal(latents_of(pipe), expected)


def test_model_offload_keeps_the_method():
    pipe = random_wan(head_dim=16)
    pipe.enable_model_cpu_offload()
    with apply_method(pipe, method="freespec", window_frames=3):
        first = latents_of(pipe)
        assert torch.equal(latents_of(pipe), first)
