"""The planner's numbers against torch's own counters: operations exact, memory within 15 %, degrees by enumeration."""

import dataclasses
import itertools
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.predicted import predicted_table
from engine.adapters.wan_published import PUBLISHED
from engine.config import DecodeConfig, MethodConfig, ModelConfig, RunConfig, SamplerConfig, VideoConfig
from engine.decode.pieces import stream_decode
from engine.errors import UserError
from engine.hooks.apply import apply_method
from engine.hooks.self_attention import BranchProcessor
from engine.hooks.state import Forward, MethodSetup, RunState
from engine.hooks.step_hook import share_tokens
from engine.hooks.token_hooks import TokenHooks
from engine.planner.flops import call_operations
from engine.planner.gpu import FOLDER, read_gpu
from engine.planner.layout import Layout, feasible_degrees, latent_bytes, latent_values, lay_out
from engine.planner.memory import GIB, PREDICTION_TENSORS, decode_cost, denoise_peak
from engine.planner.model import ModelSpec, read_model
from engine.planner.plan import Case, Options
from engine.planner.timing import communication_seconds
from freespec import kernels, spectrum
from freespec.attention import WindowedAttention
from freespec.kernels import KERNELS
from freespec.methods import Grid, Method, StepPlan, make_method
from parallel.attention import TORCH_EXCHANGE, KeptTokens
from parallel.mesh import SeqMesh
from parallel.shards import Mode, length
from tests.engine.planned import choose, plan
from tests.parallel.memory import LiveBytes
from tests.parallel.worlds import small_mesh
from tests.pretend_cuda import pretend_cuda
from tests.tiny_pipelines import random_wan, save_random_wan

SMALL, LARGE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
METHOD_OF: dict[Mode, str] = {
    "dual": "freespec",
    "global": "direct",
    "local": "sliding_window",
    "views": "freenoise",
    "views_global": "freepca",
    "frames": "lvsa",
    "tiers": "freeloc",
}
LONG = VideoConfig(num_frames=321, height=480, width=832)
SAMPLER = SamplerConfig(guidance_scale=6.0, flow_shift=8.0)
FREESPEC = MethodConfig(window_frames=21)
RANK = 3  # of 8: one with neighbours on both sides
CPU = torch.device("cpu")
DECODE = DecodeConfig()
EMBEDDED = Path(__file__).parent.parent.parent / "tiny/wan"


@pytest.fixture(scope="module")
def specs() -> dict[str, ModelSpec]:
    return {name: ModelSpec(name=name, source="test", configs=PUBLISHED[name]) for name in PUBLISHED}


@pytest.fixture(scope="module")
def embedded() -> WanPipeline:
    return WanPipeline.from_pretrained(str(EMBEDDED), dtype=torch.float32)


@pytest.fixture
def fake_world() -> Iterator[None]:
    """Rank 3 of 8 on torch's fake backend, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=8)
    yield
    dist.destroy_process_group()


def make_layout(
    spec: ModelSpec, video: VideoConfig, ring: int, ulysses: int, *, window: int, itemsize: int, far: str = "all"
) -> Layout:
    method = MethodConfig(window_frames=window)
    return lay_out(spec, (1, ring, ulysses), video, SAMPLER, method, itemsize=itemsize, local_route="auto", far=far)


def fake_forward(layout: Layout, mode: Mode, kernel: str, *, layers: int) -> Callable[[], Tensor]:
    """One forward of the real architecture in the layout, as this rank of the fake world runs it, on fake bf16 tensors."""
    spec, (frames, frame_tokens) = layout.spec, (layout.frames, layout.frame_tokens)
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        model = WanTransformer3DModel.from_config(spec.configs["transformer"] | {"num_layers": layers}).eval()
        torch.set_default_dtype(torch.float32)
        for name, parameter in model.named_parameters():
            if any(part in name.split(".") for part in model._keep_in_fp32_modules):
                parameter.data = parameter.data.float()
        rows = {1560: (60, 104), 16: (8, 8)}[frame_tokens]
        latents = torch.empty(1, 16, frames, *rows, dtype=torch.bfloat16)
        text = torch.empty(1, layout.text, 4096, dtype=torch.bfloat16)
        timestep = torch.empty(1)
    method, (_, ring, ulysses) = make_method(METHOD_OF[mode]), layout.degrees
    mesh = small_mesh(cfg=8 // (ring * ulysses), ring=ring, ulysses=ulysses)
    grid = Grid(frames=frames, rows=1, columns=frame_tokens, window_frames=layout.window_frames)
    state = in_forward(spec, mesh, method, grid, mode=mode, kernel=kernel, model=model.config, latents=latents)
    for layer, block in enumerate(model.blocks):
        block.attn1.set_processor(BranchProcessor(state, layer))
        if layout.thins(mode):
            block.attn1.processor.kept = kept_in(layout)
    TokenHooks(state, model)
    return lambda: model(latents, timestep, text, return_dict=False)[0]


def as_step(step: str) -> tuple[Mode, str]:
    """The mode of a step and its far keys, from both in one text."""
    mode, _, far = step.partition(" ")
    return cast(Mode, mode), far or "all"


def kept_in(layout: Layout) -> KeptTokens:
    """The first tokens of every frame, as a fake tensor."""
    kept, size = layout.kept or 0, layout.frame_tokens
    places = [frame * size + token for frame in range(layout.frames) for token in range(kept)]
    cuts = [bisect_left(places, start) for start, _ in layout.sequence.ring_shards]
    with FakeTensorMode():
        return KeptTokens(index=torch.empty(len(places), dtype=torch.int64), cuts=(*cuts, len(places)))


def in_forward(
    spec: ModelSpec,
    mesh: SeqMesh,
    method: Method,
    grid: Grid,
    *,
    mode: Mode,
    kernel: str,
    model: Any,
    latents: Tensor,
) -> RunState:
    """The state in a forward of this mode, as the step hook would leave it; `model` is the transformer's configuration."""
    setup = MethodSetup(
        adapter=spec.adapter,
        method=method,
        window_frames=grid.window_frames,
        kernel=kernel,
        mesh=mesh,
        exchange=TORCH_EXCHANGE,
    )
    state, sizes = RunState(setup, running=True), {"num_frames": grid.frames, "frame_tokens": grid.frame_tokens}
    attention = WindowedAttention(**sizes, window_frames=grid.window_frames, kernel=KERNELS[kernel])
    layout, attention_layout = share_tokens(state, model, grid.tokens, latents=latents, mode=mode, halo=attention.halo)
    attention_layout = replace(attention_layout, gathers_keys=False)  # as on the GPUs that the planner is for
    weights = None
    if mode not in ("global", "local"):
        with FakeTensorMode():
            weights = method.weights(StepPlan(mode=mode), grid, spec.head_dim, CPU)
    state.forward = Forward(
        step=0,
        num_steps=1,
        grid=grid,
        mode=mode,
        attention=attention,
        layout=layout,
        attention_layout=attention_layout,
        weights=weights,
    )
    return state


def added_product(_onto: list[int], a: list[int], b: list[int], **_out: Any) -> int:
    """Of a product of these shapes that is added in place, which torch's counter does not know."""
    return 2 * math.prod(a) * b[-1]


def counted_flops(run: Callable[[], Any]) -> int:
    """What torch counts. Plain SDPA, as the counter does not know the CPU's flash operator; and whole Grams, as on a GPU."""
    with (
        mock.patch.object(spectrum, "product_of_halves", lambda o_NSD: o_NSD.mT @ o_NSD),
        FakeTensorMode(allow_non_fake_inputs=True),
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: added_product}) as counter,
    ):
        run()
    return counter.get_total_flops()


def profiled_peak(run: Callable[[], Any]) -> int:
    """Most bytes that the CPU allocator had given out at once, those inside operators included."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes))


# Operations.


@pytest.mark.parametrize("name", [SMALL, LARGE])
@pytest.mark.parametrize(
    "video", [LONG, VideoConfig(num_frames=5, height=64, width=64)], ids=["321 frames", "5 frames"]
)
def test_flops_of_the_stock_model_are_exactly_what_torch_counts(
    specs: dict[str, ModelSpec], name: str, video: VideoConfig
) -> None:
    spec = specs[name]
    shape = spec.video.latent_shape(video.num_frames, video.height, video.width)
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(spec.configs["transformer"]).eval()
        inputs = torch.empty(shape), torch.empty(1), torch.empty(1, SAMPLER.max_text_tokens, 4096)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs, return_dict=False)
    layout = make_layout(spec, video, 1, 1, window=21, itemsize=2)
    assert sum(call_operations(layout, "global").values()) == counter.get_total_flops()
    # Negative control: a row of tokens, a text token or a layer less is seen.
    fewer = replace(spec, configs=spec.configs | {"transformer": _with_layers(spec, spec.layers - 1)})
    for wrong in ({"rows": layout.rows - 1}, {"text": layout.text - 1}, {"spec": fewer}):
        assert sum(call_operations(replace(layout, **wrong), "global").values()) != counter.get_total_flops()


@pytest.mark.usefixtures("fake_world")
@pytest.mark.parametrize("step", ["dual", "global", "local", "dual 1/3"])
@pytest.mark.parametrize(("name", "ring", "ulysses"), [(SMALL, 4, 2), (LARGE, 1, 8)])
def test_flops_of_every_branch_in_every_layout_are_exactly_what_torch_counts(
    specs: dict[str, ModelSpec], name: str, ring: int, ulysses: int, step: str
) -> None:
    mode, far = as_step(step)
    video = VideoConfig(num_frames=29, height=64, width=64)  # 8 latent frames of 16 tokens
    layout = make_layout(specs[name], video, ring, ulysses, window=3, itemsize=2, far=far)
    layout = replace(layout, spec=_two_layers(specs[name]))
    flops = call_operations(layout, mode)
    assert sum(flops.values()) == counted_flops(fake_forward(layout, mode, "plain", layers=2))
    if mode == "dual" and far == "all":  # both branches for the price of one
        assert flops["attention"] == call_operations(layout, "global")["attention"]


@pytest.mark.usefixtures("fake_world")
@pytest.mark.parametrize("mode", ["views", "views_global"])
def test_flops_of_views_are_what_torch_counts(specs: dict[str, ModelSpec], mode: Mode) -> None:
    """To the last one, but for the algebra of FreePCA's frames x frames matrices: a hundredth of what makes them."""
    video = VideoConfig(num_frames=29, height=64, width=64)
    layout = make_layout(specs[LARGE], video, 1, 8, window=3, itemsize=2)
    layout = replace(layout, spec=_two_layers(specs[LARGE]))
    flops = call_operations(layout, mode)
    assert layout.num_views == 6
    uncounted = counted_flops(fake_forward(layout, mode, "plain", layers=2)) - sum(flops.values())
    assert 0 <= uncounted <= flops["fp32"] / 100  # nothing for `views`, which has no such sums
    fewer = call_operations(replace(layout, num_views=5), mode)
    assert sum(flops.values()) - sum(fewer.values()) > flops["fp32"] / 100  # so a view less is seen


def _with_layers(spec: ModelSpec, layers: int) -> dict[str, Any]:
    return spec.configs["transformer"] | {"num_layers": layers}


def test_a_configuration_whose_model_does_not_run_is_refused_in_one_line(specs: dict[str, ModelSpec]) -> None:
    config = specs[SMALL].configs["transformer"] | {"eps": "small"}
    broken = replace(specs[SMALL], configs=specs[SMALL].configs | {"transformer": config})
    with pytest.raises(UserError, match=r"describes no Wan text-to-video that runs \("):
        call_operations(make_layout(broken, LONG, 1, 1, window=21, itemsize=2), "global")


def _two_layers(spec: ModelSpec) -> ModelSpec:
    return replace(spec, configs=spec.configs | {"transformer": _with_layers(spec, 2)})


# Memory.


def assert_peak_of_a_forward(
    pipe: WanPipeline, mode: Mode, spec: ModelSpec, video: VideoConfig, inputs: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """The planner's bytes of a forward of (latents, text) are within 15 % of what the allocator gave out."""
    latents, text = inputs
    with apply_method(pipe, method=METHOD_OF[mode], window_frames=9):
        pipe.scheduler.set_timesteps(4)
        pipe.scheduler.set_begin_index(0)
        timestep = pipe.scheduler.timesteps[:1]
        measured = profiled_peak(lambda: pipe.transformer(latents, timestep, text, return_dict=False))
    layout = make_layout(spec, video, 1, 1, window=9, itemsize=4)
    assert forward_part(layout, mode) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("mode", ["dual", "global", "local", "views", "views_global", "frames", "tiers"])
def test_peak_of_a_forward_is_within_15_percent_of_what_the_allocator_gave_out(tmp_path: Path, mode: Mode) -> None:
    spec = read_model(ModelConfig(path=str(save_random_wan(tmp_path))))
    pipe = random_wan(layers=2)
    video = VideoConfig(num_frames=141, height=64, width=64)  # 36 latent frames, four times the window
    latents, text = torch.randn(1, 4, 36, 16, 16), torch.randn(1, 16, 16)
    assert_peak_of_a_forward(pipe, mode, spec, video, (latents, text))


@pytest.mark.parametrize("mode", ["dual", "global", "local"])
def test_peaks_of_the_embedded_model_are_within_15_percent(embedded: WanPipeline, mode: Mode) -> None:
    spec = read_model(ModelConfig(path=str(EMBEDDED)))
    video = VideoConfig(num_frames=129, height=64, width=64)
    latents, text = torch.randn(1, 8, 33, 16, 16), torch.randn(1, 32, 64)
    assert_peak_of_a_forward(embedded, mode, spec, video, (latents, text))


def test_peak_of_decoding_the_embedded_model_is_within_15_percent(embedded: WanPipeline) -> None:
    with LiveBytes() as live:
        for _frames in stream_decode(embedded.vae, torch.randn(1, 8, 5, 16, 16)):
            pass
    spec = read_model(ModelConfig(path=str(EMBEDDED)))
    assert decode_cost(spec, 64, 64, 5, decode=DECODE)[0] == pytest.approx(live.peak, rel=0.15)


def forward_part(layout: Layout, mode: Mode) -> int:
    """The predicted peak without what is alive before a forward starts: latents and earlier predictions."""
    predictions = PREDICTION_TENSORS * layout.tokens * latent_values(layout) * layout.itemsize
    return sum(denoise_peak(layout, mode).values()) - 4 * latent_bytes(layout) - predictions


@pytest.mark.usefixtures("fake_world")
@pytest.mark.parametrize(
    ("ring", "ulysses", "step"),
    [
        *itertools.product((1,), (1,), ("dual", "global", "local")),
        *itertools.product((2,), (4,), ("dual", "global", "local", "dual 1/4")),
        *itertools.product((8,), (1,), ("dual", "global", "local")),
    ],
)
def test_peak_of_wan_at_321_frames_is_within_15_percent_in_every_layout(
    specs: dict[str, ModelSpec], ring: int, ulysses: int, step: str
) -> None:
    mode, far = as_step(step)
    layout = make_layout(specs[SMALL], LONG, ring, ulysses, window=21, itemsize=2, far=far)
    run = fake_forward(layout, mode, "cpu_flash", layers=1)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), LiveBytes() as live:
        run()
    assert forward_part(layout, mode) == pytest.approx(live.peak, rel=0.15)


def test_peak_of_decoding_is_within_15_percent_of_the_tensors_of_a_real_run(tmp_path: Path) -> None:
    """Tensors, not the allocator: torch's CPU convolution takes more than all of them for itself, another device's does not."""
    spec = read_model(ModelConfig(path=str(save_random_wan(tmp_path))))
    vae = AutoencoderKLWan.from_config(spec.configs["vae"]).eval()
    latents = torch.randn(1, 4, 5, 16, 16)
    with LiveBytes() as live:
        for _frames in stream_decode(vae, latents):
            pass
    assert decode_cost(spec, 64, 64, 5, decode=DECODE)[0] == pytest.approx(live.peak, rel=0.15)
    assert (
        decode_cost(spec, 64, 64, 50, decode=DECODE)[0] == decode_cost(spec, 64, 64, 5, decode=DECODE)[0]
    )  # any length
    assert decode_cost(spec, 64, 64, 50, decode=DECODE)[1] > decode_cost(spec, 64, 64, 5, decode=DECODE)[1]


def test_weights_are_those_of_the_published_checkpoints(specs: dict[str, ModelSpec]) -> None:
    assert specs[SMALL].parameters == {
        "transformer": 1_418_996_800,
        "text_encoder": 5_680_910_336,
        "vae": 126_892_531,
    }
    assert specs[LARGE].parameters["transformer"] == 14_288_491_584
    assert specs[LARGE].weight_bytes(4)["transformer"] == 4 * 14_288_491_584
    assert 2 * 14_288_491_584 < specs[LARGE].weight_bytes(2)["transformer"] < 2.01 * 14_288_491_584


# Degrees, choice, refusals.


@pytest.mark.parametrize("heads", [12, 40, 5])
@pytest.mark.parametrize("passes", [1, 2])
def test_every_feasible_triple_and_no_other_is_listed(heads: int, passes: int) -> None:
    for world in range(1, 17):
        expected = {
            (c, r, u)
            for c, r, u in itertools.product(range(1, world + 1), repeat=3)
            if c * r * u == world and c <= passes and (heads % u == 0 or r == 1)
        }
        found = feasible_degrees(world, heads=heads, passes=passes, tokens=10**6)
        assert len(found) == len(set(found))
        assert set(found) == expected


def test_plans_of_eight_gpus_list_shares_and_the_cost_of_uneven_heads(specs: dict[str, ModelSpec]) -> None:
    plans = plan(specs[SMALL], LONG, SAMPLER, FREESPEC, gpu=read_gpu("h200"), world_size=8)
    by_degrees = {p.degrees: p for p in plans}
    assert len(by_degrees) == 7
    assert plans[0].degrees == (2, 1, 4)
    assert all(sum(p.tokens) == 126_360 and sum(p.heads) == 12 for p in plans)
    uneven = by_degrees[1, 1, 8]
    assert sorted(uneven.heads) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert "12 heads over 8 ranks give the busiest 1.33x" in uneven.why
    attention = {degrees: p.step_seconds["dual"]["attention"] for degrees, p in by_degrees.items()}
    assert attention[1, 1, 8] == pytest.approx(attention[2, 1, 4] * 4 / 3, rel=0.01)  # cross-attention stays even
    assert plans[0].steps["freespec"] == {"dual": 45, "local": 5}  # shift 8: nine tenths of the steps
    assert plans[0].bytes_per_step["dual"]["ring"] == 0 < by_degrees[1, 8, 1].bytes_per_step["dual"]["ring"]
    json.dumps([dataclasses.asdict(p) for p in plans])


def test_one_gpu_is_its_own_measure_and_sends_nothing(specs: dict[str, ModelSpec]) -> None:
    (only,) = plan(specs[SMALL], LONG, SAMPLER, FREESPEC, gpu=read_gpu("h100"), world_size=1)
    assert set(only.efficiency.values()) == {1.0}
    assert all(not any(kinds.values()) for kinds in only.bytes_per_step.values())
    assert only.run_seconds["sliding_window"] < only.run_seconds["freespec"]
    assert sum(only.step_seconds["local"].values()) < sum(only.step_seconds["global"].values())


@pytest.mark.parametrize(
    ("gpu", "cudnn", "kernel"),
    [
        ("h100", None, "cuda_cudnn"),  # no CUDA here: a version that torch's CUDA builds bring
        ("h200", 92000, "cuda_cudnn"),
        ("h200", 91002, "cuda_flash"),
        ("a100", 92000, "cuda_flash"),
        ("rtx4090", 92000, "cuda_flash"),
    ],
)
def test_auto_is_the_kernel_that_the_engine_takes(
    gpu: str, cudnn: int | None, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None if cudnn is None else "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    described = read_gpu(gpu)
    assert described.kernel("auto") == kernel
    assert described.attention_rate("auto") == described.attention_fraction[kernel]
    # What is measured and what is described go through one rule: a rate that is clearly higher wins there and here.
    other = next(name for name in ("cuda_flash", "cuda_cudnn") if name != kernel)
    faster = {kernel: 0.5, other: 0.6}
    changed = replace(described, attention_fraction=faster).kernel("auto")
    assert changed == (kernel if other == "cuda_cudnn" and (cudnn or 92000) < 91501 else other)
    assert described.kernel("cuda_flash") == "cuda_flash"


def test_a_model_in_float32_is_predicted_with_the_kernel_of_float32(specs: dict[str, ModelSpec]) -> None:
    """Its kernel is the engine's, at the rate of fp32; one that takes half precision alone has no time, as it cannot run."""
    gpu, options = read_gpu("h100"), Options(itemsize=4)
    with pretend_cuda():
        assert options.kernel_on(gpu) == kernels.candidates(torch.device("cuda"), torch.float32)[0] == "cuda_efficient"
    assert Options().kernel_on(gpu) == "cuda_cudnn"
    [single] = plan(specs[SMALL], LONG, SAMPLER, FREESPEC, gpu=gpu, world_size=1, options=options)
    [half] = plan(specs[SMALL], LONG, SAMPLER, FREESPEC, gpu=gpu, world_size=1)
    ratio = single.step_seconds["global"]["attention"] / half.step_seconds["global"]["attention"]
    assert ratio == pytest.approx(gpu.bf16_tflops * 0.6 / (gpu.fp32_tflops * gpu.fp32_fraction))
    with pytest.raises(UserError, match=r"the description of H100 in float32 has no cuda_flash, it has cuda_efficient"):
        plan(
            specs[SMALL], LONG, SAMPLER, FREESPEC, gpu=gpu, world_size=1, options=replace(options, kernel="cuda_flash")
        )


def test_with_xfuser_auto_is_its_own_flash_attention() -> None:
    gpu = read_gpu("h200")
    assert gpu.kernel(Options(provider="xfuser").timed_kernel) == "cuda_flash"
    assert gpu.kernel(Options().timed_kernel) == "cuda_cudnn"


def test_at_native_length_every_step_is_the_stock_model(specs: dict[str, ModelSpec]) -> None:
    native = replace(LONG, num_frames=81)
    (only,) = plan(specs[SMALL], native, SAMPLER, FREESPEC, gpu=read_gpu("h100"), world_size=1)
    assert set(map(str, only.steps.values())) == {"{'global': 50}"}


def test_without_guidance_there_is_no_cfg_axis(specs: dict[str, ModelSpec]) -> None:
    plans = plan(specs[SMALL], LONG, replace(SAMPLER, guidance_scale=1.0), FREESPEC, gpu=read_gpu("h200"), world_size=8)
    assert {p.cfg for p in plans} == {1}
    assert plans[0].degrees == (1, 2, 4)


def test_ring_transfers_cost_only_what_compute_does_not_hide(specs: dict[str, ModelSpec]) -> None:
    layout = make_layout(specs[SMALL], LONG, 8, 1, window=21, itemsize=2)
    gpu = read_gpu("h200")
    hidden = communication_seconds(layout, "global", gpu, attention=100.0)
    exposed = communication_seconds(layout, "global", gpu, attention=0.0)
    ring = layout.step_bytes("global")["ring"] / (gpu.intra_node_gb_s * 1e9 * gpu.link_fraction)
    assert exposed - hidden == pytest.approx(ring)
    slow = replace(gpu, gpus_per_node=4)  # the same eight ranks on two machines
    assert communication_seconds(layout, "global", slow, attention=0.0) > exposed


def test_choose_keeps_the_degrees_that_are_fixed(specs: dict[str, ModelSpec]) -> None:
    arguments: dict[str, Any] = {"gpu": read_gpu("h200"), "world_size": 8}
    assert choose(specs[SMALL], LONG, SAMPLER, FREESPEC, **arguments).degrees == (2, 1, 4)
    fixed = choose(specs[SMALL], LONG, SAMPLER, FREESPEC, **arguments, fixed=(1, None, 2))
    assert fixed.degrees == (1, 4, 2)
    with pytest.raises(UserError, match=r"8 ranks cannot be arranged with ring 3; possible are 1 x 8 x 1, "):
        choose(specs[SMALL], LONG, SAMPLER, FREESPEC, **arguments, fixed=(None, 3, None))


@pytest.mark.parametrize(
    ("memory", "options", "advice"),
    [
        (20.0, Options(), "the smallest change that fits is parallel.text_device cpu"),
        (13.0, Options(text_device="cpu"), "the smallest change that fits is model.weights block_offload (or 2 GPUs"),
        (11.6, Options(text_device="cpu"), "the smallest change that fits is 2 GPUs"),
        (2.5, Options(), "no single change makes it fit: use a GPU with more memory"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_smallest_change(
    specs: dict[str, ModelSpec], memory: float, options: Options, advice: str
) -> None:
    spec = specs[SMALL]
    gpu = replace(read_gpu("h100"), name="small", memory_gib=memory + 2, reserved_gib=2)
    video = replace(LONG, num_frames=641)
    (alone,) = plan(spec, video, SAMPLER, FREESPEC, gpu=gpu, world_size=1, options=options)
    with pytest.raises(UserError) as refused:
        choose(spec, video, SAMPLER, FREESPEC, gpu=gpu, world_size=1, options=options)
    line = str(refused.value)
    assert "\n" not in line
    assert f"needs {alone.peak_bytes / GIB:.1f} GiB on one small" in line
    assert f"can have {memory:.1f} GiB" in line
    assert advice in line


@pytest.mark.parametrize("weights", ["resident", "cpu_offload", "block_offload"])
def test_what_fits_is_what_has_a_peak_that_fits(specs: dict[str, ModelSpec], weights: Any) -> None:
    """GPUs around what each moment needs: those that weights fill, those without room to denoise, and to decode."""
    options = Options(weights=weights, text_device="cpu" if weights == "resident" else "model")
    case = Case(
        spec=specs[SMALL],
        video=replace(LONG, num_frames=81),
        sampler=SAMPLER,
        method=FREESPEC,
        gpu=read_gpu("h100"),
        world_size=1,
        options=options,
    )
    memory, peak = case.memory((1, 1, 1), ["dual"])
    sizes = {peak, peak - 1, *(size + more for size in memory.values() for more in (-1, 0)), memory["weights"] + 2**20}
    found = []
    for size in sorted(size for size in sizes if size > 0):
        gpu = replace(case.gpu, memory_gib=size / GIB + 1, reserved_gib=1.0)
        other = replace(case, gpu=gpu)
        found.append(other.holds((1, 1, 1), ["dual"]))
        assert found[-1] == other.fits(other.memory((1, 1, 1), ["dual"])[1])
    assert found == sorted(found)
    assert set(found) == {False, True}


def test_a_shorter_video_that_is_advised_fits_and_the_next_does_not(specs: dict[str, ModelSpec]) -> None:
    spec, options = specs[SMALL], Options(weights="cpu_offload")
    gpu = replace(read_gpu("h100"), memory_gib=14, reserved_gib=1)
    video = replace(LONG, num_frames=1281)
    with pytest.raises(UserError) as refused:
        choose(spec, video, SAMPLER, FREESPEC, gpu=gpu, world_size=1, options=options)
    frames = int(str(refused.value).partition("video.num_frames ")[2].split()[0].strip(",)"))
    fits = [
        plan(spec, replace(LONG, num_frames=n), SAMPLER, FREESPEC, gpu=gpu, world_size=1, options=options)[0].fits
        for n in (frames, frames + 4)
    ]
    assert fits == [True, False]


def test_shared_weights_are_counted_by_their_share_and_by_the_layers_that_are_whole(
    specs: dict[str, ModelSpec],
) -> None:
    spec, gpu = specs[LARGE], read_gpu("h100")
    arguments: dict[str, Any] = {"gpu": gpu, "world_size": 8}
    plans = {
        name: plan(spec, LONG, SAMPLER, FREESPEC, options=options, **arguments)[0]
        for name, options in {
            "resident": Options(),
            "zero3": Options(weights="zero3"),
            "cpu": Options(weights="zero3", shards="cpu"),
            "text": Options(weights="zero3", text_device="cpu"),
        }.items()
    }
    weights = spec.weight_bytes(2)
    resident, shared = plans["resident"].memory, plans["zero3"].memory
    # Tensors that eight ranks do not divide are rounded up, by less than a thousandth here.
    assert shared["weights"] - weights["vae"] == pytest.approx(weights["transformer"] / 8, rel=1e-3)
    assert shared["text_encoder"] == pytest.approx(weights["text_encoder"] / 8, rel=1e-3)
    assert resident["gathered"] == 0
    # Two of 40 layers are at most a twentieth of the transformer; the words of the text encoder are more, but not with them.
    assert spec.gathered_bytes(2)["transformer"] == pytest.approx(weights["transformer"] / 20, rel=0.03)
    assert shared["gathered"] == spec.gathered_bytes(2)["text_encoder"] > 2 * 256_000 * 4096 * 2
    assert plans["text"].memory["gathered"] == spec.gathered_bytes(2)["transformer"]
    assert plans["cpu"].memory["weights"] == weights["vae"]
    peaks = {name: found.peak_bytes for name, found in plans.items()}
    assert peaks["cpu"] < peaks["zero3"] < peaks["resident"] - 0.8 * weights["transformer"]
    # Every forward sends a rank's share to the seven others; the transformer runs once a step where cfg is 2.
    assert plans["zero3"].degrees[0] == 2
    sent = plans["zero3"].bytes_per_step["dual"]["weights"]
    assert sent == pytest.approx(weights["transformer"] * 7 / 8, rel=1e-3)
    assert plans["resident"].bytes_per_step["dual"]["weights"] == 0


def test_shared_weights_that_a_slow_link_cannot_hide_take_time(specs: dict[str, ModelSpec]) -> None:
    spec, video = specs[LARGE], replace(LONG, num_frames=81, height=240, width=416)
    gpu = read_gpu("rtx4090")
    slow = replace(gpu, intra_node_gb_s=0.1)
    seconds = [
        plan(
            spec, video, SAMPLER, FREESPEC, gpu=which, world_size=2, options=Options(weights=weights, text_device="cpu")
        )
        for which, weights in ((gpu, "resident"), (gpu, "zero3"), (slow, "resident"), (slow, "zero3"))
    ]
    resident, shared, slow_resident, slow_shared = (
        next(p for p in plans if p.degrees == (2, 1, 1)).step_seconds["global"]["communication"] for plans in seconds
    )
    assert resident <= shared
    gathering = spec.weight_bytes(2)["transformer"] / 2 / (0.1e9 * gpu.link_fraction)
    assert 0.5 * gathering < slow_shared - slow_resident < gathering


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.json"))])
def test_every_number_of_a_gpu_has_a_source(name: str) -> None:
    gpu = read_gpu(name)
    assert {key.partition(".")[0] for key in gpu.numbers()} == set(gpu.sources)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gemm_fraction": 1.5}, "gemm_fraction is a fraction of a peak and must be at most 1, got 1.5"),
        ({"memory_gib": "80"}, "memory_gib must be a number, got '80'"),
        ({"memory_gib": float("inf")}, "memory_gib must be finite and less than 1e\\+15, got inf"),
        ({"memory_gib": float("nan")}, "memory_gib must be finite and less than 1e\\+15, got nan"),
        ({"gpus_per_node": 10**400}, "gpus_per_node must be finite and less than 1e\\+15, got a number of 1329 bits"),
        ({"name": 5}, "name must be a text, got 5"),
        ({"attention_fraction": {}}, "attention_fraction is empty; give the share"),
        ({"reserved_gib": 500}, "reserved_gib 500 leaves nothing of memory_gib 1"),
        ({"gpus_per_node": 2.5}, "gpus_per_node must be a whole number, got 2.5"),
        ({"bandwidth": 3}, "has the unknown bandwidth"),
        ({"sources": {}}, "sources names no source of compute_capability"),
    ],
)
def test_a_gpu_file_with_a_mistake_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(json.loads((FOLDER / "h200.json").read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_gpu(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "is nested too deeply"),
        ('{"memory_gib": ' + "9" * 5000 + "}", "holds a number that is too long .Exceeds the limit"),
        ("{", "is not JSON .Expecting"),
    ],
    ids=["nested", "digits", "cut short"],
)
def test_invalid_gpu_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_gpu(str(path))


def test_the_predicted_table_has_a_row_for_every_gpu_and_size() -> None:
    config = RunConfig(model=ModelConfig(path=SMALL), video=LONG, sampler=SAMPLER, method=FREESPEC)
    rows = predicted_table([config], [read_gpu("h100"), read_gpu("h200")], world_sizes=(1, 8))
    assert [(row["gpu"], row["gpus"]) for row in rows] == [("H100", 1), ("H100", 8), ("H200", 1), ("H200", 8)]
    assert all(row["fits"] and 0 < row["efficiency_freespec"] <= 1 for row in rows)
    assert rows[0]["seconds_direct"] > 6 * rows[1]["seconds_direct"]


def test_the_predicted_table_has_the_best_layout_of_a_method_that_cannot_have_the_row_s() -> None:
    config = RunConfig(model=ModelConfig(path=SMALL), video=LONG, sampler=SAMPLER, method=FREESPEC)
    [row] = predicted_table([config], [read_gpu("h200")], world_sizes=(4,))
    plans = plan(
        read_model(config.model),
        LONG,
        SAMPLER,
        FREESPEC,
        gpu=read_gpu("h200"),
        world_size=4,
        options=Options.of(config),
    )
    assert plans[0].ring > 1, "the row's layout has no ring any more: take another number of GPUs"
    assert set(row["elsewhere"]) == {"freenoise", "freelong", "freepca", "lvsa"}
    for name, (degrees, seconds) in row["elsewhere"].items():
        assert f"seconds_{name}" not in row
        assert "ring 1" in degrees
        assert seconds == min(p.run_seconds[name] for p in plans if name in p.run_seconds)


def test_shares_of_the_busiest_rank_cover_the_whole(specs: dict[str, ModelSpec]) -> None:
    layout = make_layout(specs[SMALL], replace(LONG, num_frames=29, height=64, width=64), 3, 5, window=3, itemsize=2)
    share = layout.share("dual")
    assert share.shard == max(map(length, layout.sequence.shards))
    assert share.queries == max(map(length, layout.sequence.ring_shards))
    assert share.heads == 3


def test_a_gpu_too_small_for_whole_frames_decodes_in_tiles_over_all(specs: dict[str, ModelSpec]) -> None:
    """As the engine does with `decode.mode auto`: a run is not refused for a decode that it would not choose."""
    sampler = replace(SAMPLER, guidance_scale=1.0)
    encoder_elsewhere = Options(text_device="cpu")
    planned = partial(plan, specs[SMALL], LONG, sampler, FREESPEC, world_size=8, options=encoder_elsewhere)
    roomy, small = read_gpu("h200"), replace(read_gpu("h100"), memory_gib=10, reserved_gib=1)
    whole, tiled = planned(gpu=roomy)[0], planned(gpu=small)[0]
    assert (whole.decode_mode, tiled.decode_mode) == ("whole", "tiled")
    assert tiled.memory["vae_decode"] < whole.memory["vae_decode"] / 3
    assert tiled.fits
    only_whole = Options(text_device="cpu", decode=DecodeConfig(mode="whole"))
    assert not planned(gpu=small, options=only_whole)[0].fits
    asked = Options(text_device="cpu", decode=DecodeConfig(mode="tiled"))
    assert planned(gpu=roomy, options=asked)[0].decode_mode == "tiled"
