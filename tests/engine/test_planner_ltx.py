"""The planner's numbers for LTX-Video against torch's own counters, as test_planner.py holds those for Wan."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import LTXVideoTransformer3DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.predicted import predicted_table
from engine.adapters.ltx_published import PUBLISHED
from engine.config import DecodeConfig, MethodConfig, ModelConfig, SamplerConfig, VideoConfig
from engine.decode.pieces import stream_decode, to_uint8
from engine.hooks.apply import apply_method
from engine.hooks.self_attention import BranchProcessor
from engine.hooks.token_hooks import TokenHooks
from engine.planner.flops import call_operations
from engine.planner.gpu import read_gpu
from engine.planner.layout import Layout, lay_out
from engine.planner.memory import decode_cost
from engine.planner.model import ModelSpec, read_model
from engine.planner.plan import Options
from freespec.methods import Grid, make_method
from launch.cli.parser import parse_run
from parallel.shards import Mode
from tests.engine.planned import plan
from tests.engine.test_planner import METHOD_OF, RANK, counted_flops, forward_part, in_forward, profiled_peak
from tests.parallel.memory import LiveBytes
from tests.parallel.worlds import small_mesh
from tests.tiny_pipelines import random_ltx, random_ltx_vae, save_random_ltx

ROOT = Path(__file__).parent.parent.parent
NAME = "Lightricks/LTX-Video"
LONG = VideoConfig(num_frames=481, height=480, width=704, fps=30)
SMALL = VideoConfig(num_frames=57, height=128, width=128, fps=30)  # 8 latent frames of 16 tokens
SAMPLER = SamplerConfig(num_steps=40, guidance_scale=3.0, max_text_tokens=128)
METHOD = MethodConfig(window_frames=16)
H200 = read_gpu("h200")


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return ModelSpec(name=NAME, source="test", configs=PUBLISHED[NAME])


@pytest.fixture
def fake_world() -> Iterator[None]:
    """Rank 3 of 8 on torch's fake backend, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=8)
    yield
    dist.destroy_process_group()


def make_layout(spec: ModelSpec, video: VideoConfig, degrees: tuple[int, int, int], *, window: int, e: int) -> Layout:
    method = MethodConfig(window_frames=window)
    return lay_out(spec, degrees, video, SAMPLER, method, itemsize=e, local_route="auto")


def inputs_of(layout: Layout, dtype: torch.dtype, rows: tuple[int, int]) -> dict[str, Any]:
    """Arguments of a forward of the layout's batch."""
    batch, config = layout.batch, layout.spec.configs["transformer"]
    return {
        "hidden_states": torch.empty(batch, layout.tokens, config["in_channels"], dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, layout.text, config["caption_channels"], dtype=dtype),
        "timestep": torch.empty(batch),
        "encoder_attention_mask": torch.empty(batch, layout.text, dtype=dtype),
        "num_frames": layout.frames,
        "height": rows[0],
        "width": rows[1],
        "rope_interpolation_scale": (8 / 30, 32, 32),
        "return_dict": False,
    }


def fake_forward(layout: Layout, mode: Mode, kernel: str, *, layers: int) -> Callable[[], Tensor]:
    """One forward of the real architecture in the layout, as this rank of the fake world runs it, on fake bf16 tensors."""
    spec, rows = layout.spec, {330: (15, 22), 16: (4, 4)}[layout.frame_tokens]
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        model = LTXVideoTransformer3DModel.from_config(spec.configs["transformer"] | {"num_layers": layers}).eval()
        torch.set_default_dtype(torch.float32)
        inputs = inputs_of(layout, torch.bfloat16, rows)
    method, (_, ring, ulysses) = make_method(METHOD_OF[mode]), layout.degrees
    mesh = small_mesh(cfg=8 // (ring * ulysses), ring=ring, ulysses=ulysses)
    grid = Grid(frames=layout.frames, rows=rows[0], columns=rows[1], window_frames=layout.window_frames)
    latents = inputs["hidden_states"]
    state = in_forward(spec, mesh, method, grid, mode=mode, kernel=kernel, model=model.config, latents=latents)
    for layer, attn in enumerate(spec.adapter.attention_modules(model)):
        attn.set_processor(BranchProcessor(state, layer))
    TokenHooks(state, model)
    return lambda: model(**inputs)[0]


# Operations.


@pytest.mark.parametrize("video", [LONG, SMALL], ids=["481 frames", "57 frames"])
def test_flops_of_the_stock_model_are_exactly_what_torch_counts(spec: ModelSpec, video: VideoConfig) -> None:
    layout = make_layout(spec, video, (2, 1, 1), window=16, e=2)
    rows = {330: (15, 22), 16: (4, 4)}[layout.frame_tokens]
    with torch.device("meta"):
        model = LTXVideoTransformer3DModel.from_config(spec.configs["transformer"]).eval()
        inputs = inputs_of(layout, torch.float32, rows)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert sum(call_operations(layout, "global").values()) == counter.get_total_flops()
    # Negative control: a row of tokens or a text token less is seen.
    for wrong in (replace(layout, rows=layout.rows - 1), replace(layout, text=layout.text - 1)):
        assert sum(call_operations(wrong, "global").values()) != counter.get_total_flops()


@pytest.mark.usefixtures("fake_world")
@pytest.mark.parametrize("mode", ["dual", "global", "local"])
@pytest.mark.parametrize("degrees", [(1, 2, 4), (2, 1, 4), (1, 1, 8)], ids=str)
def test_flops_of_every_branch_in_every_layout_are_exactly_what_torch_counts(
    spec: ModelSpec, degrees: tuple[int, int, int], mode: Mode
) -> None:
    """The batch of both passes is two forwards' worth; with a cfg axis a rank runs one of them."""
    layout = make_layout(spec, SMALL, degrees, window=3, e=2)
    two_layers = replace(spec, configs=spec.configs | {"transformer": spec.configs["transformer"] | {"num_layers": 2}})
    flops = call_operations(replace(layout, spec=two_layers), mode)
    assert layout.batch == 2 // degrees[0]
    assert sum(flops.values()) == counted_flops(fake_forward(layout, mode, "plain", layers=2))


# Memory.


@pytest.mark.parametrize("mode", ["dual", "global", "local"])
def test_peak_of_a_forward_is_within_15_percent_of_what_the_allocator_gave_out(tmp_path: Path, mode: Mode) -> None:
    spec = read_model(ModelConfig(path=str(save_random_ltx(tmp_path))))
    pipe = random_ltx()
    layout = make_layout(spec, VideoConfig(num_frames=281, height=128, width=128), (1, 1, 1), window=9, e=4)
    inputs = inputs_of(layout, torch.float32, (8, 8))
    inputs = {name: torch.randn_like(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    with apply_method(pipe, method=METHOD_OF[mode], window_frames=9):
        pipe.scheduler.set_timesteps(4, mu=1.0)
        pipe.scheduler.set_begin_index(0)
        inputs["timestep"] = pipe.scheduler.timesteps[:1].expand(2)
        measured = profiled_peak(lambda: pipe.transformer(**inputs))
    assert forward_part(layout, mode) == pytest.approx(measured, rel=0.15)


@pytest.mark.usefixtures("fake_world")
@pytest.mark.parametrize("mode", ["dual", "global", "local"])
@pytest.mark.parametrize("degrees", [(1, 1, 1), (2, 1, 1), (1, 2, 4), (1, 8, 1)], ids=str)
def test_peak_at_481_frames_is_within_15_percent_in_every_layout(
    spec: ModelSpec, degrees: tuple[int, int, int], mode: Mode
) -> None:
    layout = make_layout(spec, LONG, degrees, window=16, e=2)
    run = fake_forward(layout, mode, "cpu_flash", layers=1)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), LiveBytes() as live:
        run()
    assert forward_part(layout, mode) == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize("mode", ["whole", "framewise"])
def test_peak_of_decoding_is_within_15_percent_of_the_tensors_of_a_real_run(tmp_path: Path, mode: Any) -> None:
    spec = read_model(ModelConfig(path=str(save_random_ltx(tmp_path))))
    vae, decode = random_ltx_vae(), DecodeConfig(mode=mode)
    time = spec.adapter.time_settings(vae.config, mode, decode, num_latents=6, seed=0)
    with LiveBytes() as live:
        for frames in stream_decode(vae, torch.randn(1, 4, 6, 4, 4), time):
            to_uint8(frames)
    costs = {n: decode_cost(spec, 64, 64, n, mode=mode, decode=decode) for n in (6, 12)}
    assert costs[6][0] == pytest.approx(live.peak, rel=0.15)
    assert costs[12][1] > 1.8 * costs[6][1]
    grows = costs[12][0] / costs[6][0]
    assert grows == 1 if mode == "framewise" else grows > 1.8


def test_weights_are_those_of_the_published_checkpoint(spec: ModelSpec) -> None:
    assert spec.parameters == {"transformer": 1_923_385_472, "text_encoder": 4_762_310_656, "vae": 419_193_649}
    assert spec.weight_bytes(2)["transformer"] == 2 * 1_923_385_472


# Plans.


def test_plans_of_the_preset(spec: ModelSpec) -> None:
    alone, *_ = plan(spec, LONG, SAMPLER, METHOD, gpu=H200, world_size=1)
    plans = plan(spec, LONG, SAMPLER, METHOD, gpu=H200, world_size=8)
    assert {p.degrees for p in plans} == {
        (cfg, ring, 8 // cfg // ring) for cfg in (1, 2) for ring in (1, 2, 4, 8) if 8 % (cfg * ring) == 0
    }
    assert all(sum(p.tokens) == 61 * 330 and sum(p.heads) == 32 for p in plans)
    assert alone.memory["activations"] > 1.9 * by_degrees(plans, (2, 1, 4)).memory["activations"]  # a batch of two
    assert alone.run_seconds["direct"] > 6 * plans[0].run_seconds["direct"]
    assert alone.decode_mode == "whole"


def by_degrees(plans: list[Any], degrees: tuple[int, int, int]) -> Any:
    return next(p for p in plans if p.degrees == degrees)


def test_a_small_gpu_decodes_framewise(spec: ModelSpec) -> None:
    small = replace(H200, name="small", memory_gib=24, reserved_gib=2)
    (cut,) = plan(spec, LONG, SAMPLER, METHOD, gpu=small, world_size=1)
    (whole,) = plan(spec, LONG, SAMPLER, METHOD, gpu=H200, world_size=1)
    assert cut.fits
    assert (cut.decode_mode, whole.decode_mode) == ("framewise", "whole")
    assert cut.memory["vae_decode"] < whole.memory["vae_decode"] / 4
    asked = Options(decode=DecodeConfig(mode="framewise"))
    assert plan(spec, LONG, SAMPLER, METHOD, gpu=H200, world_size=1, options=asked)[0].decode_mode == "framewise"


def test_the_shift_decides_how_many_steps_are_dual(spec: ModelSpec) -> None:
    latent = (61, 15, 22)
    frozen, grown = (
        spec.timesteps(replace(SAMPLER, shift=shift), latent, window_frames=16) for shift in ("native", "actual")
    )
    # 16 frames of 330 tokens, and 61 of them: sigma where half of the steps are done.
    assert (frozen[20] / 1000, grown[20] / 1000) == pytest.approx((0.92, 0.97), abs=0.02)
    at_native = spec.timesteps(replace(SAMPLER, shift="actual"), (16, 15, 22), window_frames=16)
    assert frozen == at_native


def test_the_predicted_table_has_ltx(tmp_path: Path) -> None:
    words = [f"--config={ROOT / 'configs' / 'ltx-video-2b.yaml'}"]
    config = parse_run(words, name="plan.py", description="", add_arguments=lambda parser: None)[1]
    rows = predicted_table([config], [H200], world_sizes=(1, 8))
    assert [(row["model"], row["gpus"]) for row in rows] == [(NAME, 1), (NAME, 8)]
    assert all(row["fits"] and 0 < row["efficiency_freespec"] <= 1 for row in rows)
    assert dataclasses.asdict(config.video) == dataclasses.asdict(LONG)


def test_eigendecompositions_take_as_long_as_a_head_has_channels(spec: ModelSpec) -> None:
    """Heads of 64 take half of what a GPU's file says of heads of 128, and heads and both passes lie side by side."""
    free = replace(H200, eigh_seconds=0.0)
    for world in (1, 8):
        with_them, without = (
            plan(spec, LONG, SAMPLER, METHOD, gpu=gpu, world_size=world)[0].step_seconds for gpu in (H200, free)
        )
        added = with_them["dual"]["spectrum"] - without["dual"]["spectrum"]
        assert added == pytest.approx(spec.layers * H200.eigh_seconds / 2)
        assert with_them["global"] == without["global"]
