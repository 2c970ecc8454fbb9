"""A method on a stock pipeline: equal to the stock pipeline where it must be, to a plain reference where it differs."""

import dataclasses
import warnings

import accelerate
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine import apply_method
from engine.adapters.wan import WAN
from engine.errors import UserError
from freespec.methods import FreePCA, FreeSpec, Grid
from tests.engine.reference_run import latents_by_masks
from tests.tiny_pipelines import random_wan

METHODS = (
    "direct",
    "sliding_window",
    "freenoise",
    "freelong",
    "freepca",
    "ultravico",
    "freeloc",
    "freespec",
)  # lvsa sees all of 8 frames
CALL = {
    "prompt": "a red circle",
    "negative_prompt": "bad",
    "height": 32,
    "width": 48,
    "num_frames": 29,
    "num_inference_steps": 3,
    "guidance_scale": 4.0,
    "max_sequence_length": 20,
}


def latents_of(pipe, **overrides) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipe(**(CALL | overrides), generator=generator, output_type="latent").frames


@pytest.fixture(scope="module")
def stock() -> Tensor:
    return latents_of(random_wan())


def test_direct_is_the_stock_pipeline_bit_for_bit(stock):
    pipe = random_wan()
    with apply_method(pipe, method="direct", window_frames=3):
        assert torch.equal(latents_of(pipe), stock)


def test_a_pipeline_without_a_vae(stock):
    pipe = random_wan()
    pipe.register_modules(vae=None)
    with apply_method(pipe, method="direct", window_frames=3):
        assert torch.equal(latents_of(pipe), stock)


@pytest.mark.parametrize("method", METHODS)
def test_native_length_is_the_stock_pipeline_bit_for_bit(method):
    pipe = random_wan()
    expected = latents_of(pipe, num_frames=9)
    with apply_method(pipe, method=method, window_frames=3):
        assert torch.equal(latents_of(pipe, num_frames=9), expected)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_native_length_is_the_stock_pipeline_under_any_backend_and_kernel(backend):
    """It is torch's own function, whose backend a context decides, and not the kernel of long videos."""
    pipe = random_wan()
    with sdpa_kernel(backend):
        expected = latents_of(pipe)
        with apply_method(pipe, method="freespec", window_frames=8, kernel="plain"):
            assert torch.equal(latents_of(pipe), expected)
        # The negative control: a longer video is computed by the kernel.
        with apply_method(pipe, method="direct", window_frames=3, kernel="plain"):
            assert not torch.equal(latents_of(pipe), expected)


@pytest.mark.parametrize("method", METHODS)
def test_remove_restores_the_pipeline_bit_for_bit(method, stock):
    pipe = random_wan()
    processors = dict(pipe.transformer.attn_processors)
    handle = apply_method(pipe, method=method, window_frames=3)
    changed = latents_of(pipe)
    handle.remove()
    assert (method == "direct") == torch.equal(changed, stock)  # the method did something before it was removed
    assert torch.equal(latents_of(pipe), stock)
    assert pipe.transformer.attn_processors == processors
    assert not pipe.transformer._forward_pre_hooks
    assert not any(module._forward_hooks for module in pipe.transformer.modules())


@pytest.mark.parametrize(("fused_share", "agrees"), [(0.6, True), (0.9, False)])
def test_freespec_run_equals_a_run_with_masks_and_svd(fused_share, agrees):
    method = FreeSpec(domain="step", fused_share=0.6)
    fast = random_wan().to(torch.float64)
    with apply_method(fast, method=method, window_frames=3):
        ours = latents_of(fast)

    method = dataclasses.replace(method, fused_share=fused_share)  # negative control: one dual step more
    grid = Grid(frames=8, rows=4, columns=6, window_frames=3)
    theirs = latents_by_masks(random_wan().to(torch.float64), WAN, latents_of, method, num_steps=3, grid=grid)
    assert (torch.linalg.norm(ours - theirs) < 1e-9 * torch.linalg.norm(theirs)).item() == agrees


def test_late_steps_after_dual_ones_are_sliding_window_bit_for_bit():
    """From the latents and the scheduler's state after the dual steps, the late ones are the sliding window's."""
    pipe = random_wan()
    modes: list[str] = []
    half = {"domain": "step", "fused_share": 0.5}

    def run(method: str, then: str | None = None) -> Tensor:
        """The run with `method`; after its two dual steps of three with `then`."""
        handle = apply_method(pipe, method=method, window_frames=3, **half if method == "freespec" else {})

        def swap(_pipe, index: int, _timestep, _kwargs) -> dict:
            nonlocal handle
            modes.append(handle.state.last.mode)
            if index == 1 and then is not None:
                handle.remove()
                handle = apply_method(pipe, method=then, window_frames=3)
            return {}

        latents = latents_of(pipe, callback_on_step_end=swap)
        handle.remove()
        return latents

    whole = run("freespec")
    assert modes == ["dual", "dual", "local"]
    assert torch.equal(run("freespec", "sliding_window"), whole)
    assert not torch.equal(run("freespec", "direct"), whole)  # the late step matters
    assert not torch.equal(run("sliding_window"), whole)  # and so do the dual ones


@pytest.mark.parametrize("num_frames", [9, 29])
@pytest.mark.parametrize("method", METHODS)
def test_latents_that_are_not_finite_are_refused(method, num_frames):
    """Those that come in, and those that a broken weight makes, at the last step too, which no forward follows."""
    pipe = random_wan()
    shape = WAN.video_spec(pipe.transformer.config, pipe.vae.config).latent_shape(num_frames, 32, 48)
    latents = torch.zeros(shape).index_fill(2, torch.tensor([1]), torch.nan)
    where = r"of \d+ numbers of the latents are not finite"
    with apply_method(pipe, method=method, window_frames=3):
        with pytest.raises(UserError, match=f"{where} before the transformer of step 1 of 3 in float32; load"):
            latents_of(pipe, num_frames=num_frames, latents=latents)
        latents_of(pipe, num_frames=num_frames)
        bias = pipe.transformer.proj_out.bias

        def break_last(_pipe, index, _timestep, _kwargs):
            if index == 1:
                bias.data[0] = torch.inf
            return {}

        with pytest.raises(UserError, match=f"{where} after the transformer of step 3 of 3 in float32; load"):
            latents_of(pipe, num_frames=num_frames, callback_on_step_end=break_last)


def test_late_steps_are_sliding_window_bit_for_bit():
    pipe = random_wan()
    with apply_method(pipe, method="sliding_window", window_frames=3):
        expected = latents_of(pipe)
    with apply_method(pipe, method=FreeSpec(domain="step", fused_share=0.0), window_frames=3):
        assert torch.equal(latents_of(pipe), expected)
    with apply_method(pipe, method=FreeSpec(domain="step", fused_share=0.5), window_frames=3):
        assert not torch.equal(latents_of(pipe), expected)  # half of the steps are dual


@pytest.mark.parametrize("method", METHODS)
def test_fused_projections(method):
    pipe = random_wan()
    with apply_method(pipe, method=method, window_frames=3):
        expected = latents_of(pipe)
        pipe.transformer.fuse_qkv_projections()
        torch.testing.assert_close(latents_of(pipe), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
        assert pipe.transformer.blocks[0].attn1.fused_projections


@pytest.mark.parametrize("method", [FreeSpec(domain="step", fused_share=0.5), FreePCA(domain="step", fused_share=0.5)])
def test_compiled_blocks(method):
    torch.compiler.reset()
    pipe = random_wan(layers=10)  # more layers than dynamo's recompile limit
    with apply_method(pipe, method=method, window_frames=3):
        expected = latents_of(pipe, num_inference_steps=4)
        compiled = random_wan(layers=10)
    counter = torch._dynamo.testing.CompileCounter()
    compiled.transformer.compile_repeated_blocks(backend=counter)
    with (
        apply_method(compiled, method=method, window_frames=3),
        torch._dynamo.config.patch(error_on_recompile=False, fail_on_recompile_limit_hit=True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)  # raised by dynamo about torch's own code
        got = latents_of(compiled, num_inference_steps=4)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert 1 <= counter.frame_count <= 6  # graphs per mode, not per layer and step


def test_layerwise_casting():
    """Weights that are kept in bf16 and cast for each layer: the run of a model with those weights."""
    cast = random_wan()
    cast.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    plain = random_wan()
    plain.transformer.load_state_dict({key: value.float() for key, value in cast.transformer.state_dict().items()})
    for method in METHODS:
        with apply_method(cast, method=method, window_frames=3), apply_method(plain, method=method, window_frames=3):
            assert torch.equal(latents_of(cast), latents_of(plain))
    assert not torch.equal(latents_of(plain), latents_of(random_wan()))


def test_accelerate_offload_cycle():
    """What CPU offload does: accelerate hooks go on and off the transformer while the method is on it."""
    pipe = random_wan()
    with apply_method(pipe, method="freespec", window_frames=3):
        expected = latents_of(pipe)
        accelerate.cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
        assert torch.equal(latents_of(pipe), expected)
        accelerate.hooks.remove_hook_from_module(pipe.transformer)
        assert torch.equal(latents_of(pipe), expected)


def test_two_calls_and_another_length_on_one_handle():
    pipe = random_wan()
    with apply_method(pipe, method="freespec", window_frames=3):
        first = latents_of(pipe)
        latents_of(pipe, num_frames=17, num_inference_steps=5)
        assert torch.equal(latents_of(pipe), first)


def test_a_forward_outside_its_pipeline_is_refused():
    pipe = random_wan()
    pipe.scheduler.set_timesteps(3)
    with (
        apply_method(pipe, method="freespec", window_frames=3),
        pytest.raises(ValueError, match=r"called at timestep 123.0, but its scheduler stands at step 0 of 3"),
    ):
        pipe.transformer(
            hidden_states=torch.randn(1, 4, 8, 8, 8),
            timestep=torch.tensor([123]),
            encoder_hidden_states=torch.randn(1, 5, 16),
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "freespce"}, r"unknown method 'freespce' \(did you mean 'freespec'\?\)"),
        ({"method": "freespec", "alhpa": 1.0}, r"does not know 'alhpa' \(did you mean 'alpha'\?\)"),
        ({"method": FreeSpec(), "alpha": 1.0}, "a method object has its own"),
        ({"window_frames": 0}, "window_frames must be 1 or more, got 0"),
        ({"method": "freenoise", "window_frames": 2, "stride": 3}, "stride 3 is more than the 2 frames of a view"),
        ({"kernel": "cuda_flash"}, "'cuda_flash' does not run on cpu"),
    ],
)
def test_mistakes_are_user_errors_and_leave_the_pipeline_alone(arguments, message):
    pipe = random_wan()
    processors = dict(pipe.transformer.attn_processors)
    with pytest.raises(UserError, match=message):
        apply_method(pipe, **({"window_frames": 3} | arguments))
    assert pipe.transformer.attn_processors == processors


def test_context_parallel_switched_on_afterwards_is_refused():
    pipe = random_wan()
    with apply_method(pipe, method="direct", window_frames=3):
        latents_of(pipe)
        pipe.transformer._parallel_config = object()
        with pytest.raises(UserError, match="context parallel"):
            latents_of(pipe)


def test_several_timesteps_in_a_video_are_refused_in_the_forward():
    pipe = random_wan()
    with (
        apply_method(pipe, window_frames=3),
        pytest.raises(ValueError, match="the tokens of a video have several timesteps"),
    ):
        pipe.transformer(
            hidden_states=torch.zeros(1, pipe.transformer.config.in_channels, 4, 4, 4),
            timestep=torch.arange(7.0)[None],
            encoder_hidden_states=torch.zeros(1, 4, pipe.transformer.config.text_dim),
        )


def test_a_second_method_is_refused():
    pipe = random_wan()
    with (
        apply_method(pipe, method="direct", window_frames=3),
        pytest.raises(UserError, match=r"already has a method; call its handle's remove"),
    ):
        apply_method(pipe, method="freespec", window_frames=3)


def test_unsafe_pipelines_are_refused():
    pipe = random_wan()
    pipe.register_to_config(boundary_ratio=0.875)
    with pytest.raises(UserError, match=r"boundary_ratio 0.875"):
        apply_method(pipe, window_frames=3)
    pipe = random_wan()
    pipe.transformer._parallel_config = object()
    with pytest.raises(UserError, match="context parallel"):
        apply_method(pipe, window_frames=3)
    for change, message in (
        (lambda pipe: pipe.transformer.register_to_config(image_dim=8), "image-to-video"),
        (lambda pipe: pipe.transformer.register_to_config(added_kv_proj_dim=8), "image-to-video"),
    ):
        pipe = random_wan()
        change(pipe)
        with pytest.raises(UserError, match=message):
            apply_method(pipe, window_frames=3)
