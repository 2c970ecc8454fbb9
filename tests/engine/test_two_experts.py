"""Two transformers (Wan2.2 A14B): on a pipeline and in the engine, over ranks, across their switch, with LoRAs, moved, and planned."""

import copy
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from torch import Tensor

from engine import apply_timeline
from engine.adapters.published import PUBLISHED
from engine.checks import check_experts
from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.files.latents import save_latents
from engine.given.frames import GivenFrames
from engine.load.checkpoint import open_checkpoint
from engine.load.experts import ExpertPlacement
from engine.load.loras import find_loras
from engine.load.pipeline import load_pipeline
from engine.planner.flops import call_operations
from engine.planner.gpu import read_gpu
from engine.planner.model import ModelSpec
from engine.planner.plan import Case as PlannedCase
from engine.planner.plan import Options
from engine.ranks.layouts import Ranks
from freespec.methods import FreeSpec
from launch.cli.start import run_here
from tests.engine.applied import applied, latents_of, refused
from tests.engine.golden import Case, all_degrees, assert_same_video, mesh_of, on_one_rank, relative, stop_run
from tests.engine.golden import latents_of as engine_latents
from tests.loras import random_lora, save_lora
from tests.ranks import run_ranks
from tests.tiny_pipelines import random_wan, random_wan22, save_random_wan

PROMPT = "a red circle"
STEPS = 4  # at shift 3 these are timesteps 999, 899, 749 and 499: with a boundary at 875 the transformers have two each
SCALES = {"guidance_scale": 4.0, "guidance_scale_2": 2.0}
NATIVE, LONG = 9, 29  # frames; 3 and 8 latents, and the window is 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_wan(tmp_path_factory.mktemp("wan22"), experts=2)


def config_of(folder: Path, *, frames: int = LONG, method: str = "freespec", **model: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(folder), device="cpu", **model),
        video=VideoConfig(num_frames=frames, height=32, width=48),
        sampler=SamplerConfig(num_steps=STEPS, **SCALES, seed=3, negative_prompt="bad", max_text_tokens=20),
        method=MethodConfig(name=method, window_frames=3, freespec=FreeSpec(domain="step")),
        output=OutputConfig(progress="off"),
    )


def stock_latents(folder: Path, frames: int) -> Tensor:
    """What diffusers' own pipeline makes of the same prompt and seed."""
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_frames": frames, "height": 32, "width": 48, "num_inference_steps": STEPS, "max_sequence_length": 20}
    draw = torch.Generator().manual_seed(3)
    return pipe(PROMPT, "bad", **call, **SCALES, generator=draw, output_type="latent").frames


@pytest.mark.parametrize(("frames", "method"), [(NATIVE, "direct"), (NATIVE, "freespec"), (LONG, "direct")])
def test_the_engine_has_the_bits_of_the_stock_pipeline(folder, frames, method):
    assert torch.equal(on_one_rank(config_of(folder, frames=frames, method=method)), stock_latents(folder, frames))


def test_each_transformer_and_each_scale_decides_something(folder):
    """Negative control of the test above."""
    config = config_of(folder, frames=NATIVE, method="direct")
    alike = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, guidance_scale_2=None))
    assert not torch.equal(engine_latents(alike), on_one_rank(config))
    pipe = random_wan22()
    other = random_wan()
    other.register_modules(transformer_2=copy.deepcopy(other.transformer))
    other.register_to_config(boundary_ratio=0.875)
    once = latents_of(pipe, num_inference_steps=STEPS)
    assert not torch.equal(once, latents_of(other, num_inference_steps=STEPS))


@pytest.mark.parametrize("frames", [NATIVE, LONG])
def test_a_method_on_a_pipeline_is_on_both(frames):
    pipe = random_wan22()
    call = {"num_frames": frames, "num_inference_steps": STEPS, **SCALES}
    stock = latents_of(pipe, **call)
    with applied(pipe, method="direct"):
        assert torch.equal(latents_of(pipe, **call), stock)
    with applied(pipe) as handle:
        assert handle.in_force
        assert torch.equal(latents_of(pipe, **call), stock) == (frames == NATIVE)
        # without the method on the second one
        assert {type(attn.processor).__name__ for attn in (b.attn1 for b in pipe.transformer_2.blocks)} == {
            "BranchProcessor"
        }
    assert torch.equal(latents_of(pipe, **call), stock)
    assert not any(
        module._forward_pre_hooks for part in (pipe.transformer, pipe.transformer_2) for module in part.modules()
    )


def test_changes_of_either_transformer_end_the_call():
    pipe = random_wan22()
    second = pipe.transformer_2
    with applied(pipe) as handle:
        pipe.transformer_2 = random_wan().transformer
        refused(lambda: latents_of(pipe), match="pipe.transformer_2 is another WanTransformer3DModel")
        pipe.transformer_2 = second
        pipe.transformer, pipe.transformer_2 = second, pipe.transformer
        refused(handle.check, match="pipe.transformer is another")
        pipe.transformer, pipe.transformer_2 = pipe.transformer_2, second
        pipe.register_to_config(boundary_ratio=None)
        refused(lambda: latents_of(pipe), match="a transformer_2 and no boundary_ratio")
        pipe.register_to_config(boundary_ratio=0.875)
        latents_of(pipe)


def test_a_second_transformer_that_comes_later_has_no_method():
    pipe = random_wan()
    with applied(pipe):
        pipe.register_modules(transformer_2=random_wan().transformer)
        pipe.register_to_config(boundary_ratio=0.875)
        refused(
            lambda: latents_of(pipe), match="denoises with transformer and transformer_2, and did with transformer;"
        )


def test_the_wrong_transformer_of_a_step_is_refused():
    pipe = random_wan22()
    pipe.scheduler.set_timesteps(STEPS)
    text = torch.zeros(1, 12, 16)
    with applied(pipe), pytest.raises(UserError, match="timestep 999 is for the other of the two transformers"):
        pipe.transformer_2(torch.zeros(1, 4, 2, 8, 8), pipe.scheduler.timesteps[:1], text)


def test_a_timeline_is_on_both():
    pipe = random_wan22()
    with applied(pipe), apply_timeline(pipe, "a [0-12] | b [12-, scene]", fps=16, max_sequence_length=12) as handle:
        call = {"prompt_embeds": None, "negative_prompt_embeds": None, **handle.inputs, "num_inference_steps": STEPS}
        made = latents_of(pipe, **call)
        processors = [block.attn2.processor for part in (pipe.transformer, pipe.transformer_2) for block in part.blocks]
        assert {type(each).__name__ for each in processors} == {"TimelineProcessor"}
        assert handle.in_force
    assert torch.isfinite(made).all()
    assert {type(b.attn2.processor).__name__ for b in pipe.transformer_2.blocks} == {"WanAttnProcessor"}


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipe: pipe.register_modules(transformer_2=None), "boundary_ratio 0.875 and no transformer_2"),
        (lambda pipe: pipe.register_to_config(boundary_ratio=1.5), "boundary_ratio must lie between 0 and 1, got 1.5"),
        (
            lambda pipe: pipe.register_modules(transformer_2=random_wan(layers=1).transformer),
            r"transformer and transformer_2 differ in num_layers \(2 and 1\)",
        ),
    ],
)
def test_two_that_do_not_belong_together_are_refused(change, message):
    pipe = random_wan22()
    change(pipe)
    refused(lambda: applied(pipe), match=message)


# In the engine.


def latents_on_ranks(rank: int, case: Case) -> Tensor:
    """This rank's latents, with weights shared by zero3 if the case says so; runs on every rank."""
    weights = {"weights": "zero3"} if case.fault == "shared" else {}
    return engine_latents(
        config_of(Path(case.folder), method=case.method, **weights), Ranks(mesh=mesh_of(case.degrees))
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_arrangement_of_ranks_makes_the_same_video(folder, ranks, tmp_path):
    cases = [Case(str(folder), degrees, "freespec") for degrees in all_degrees(ranks)]
    if ranks == 2 and importlib.util.find_spec("deepspeed") is not None:
        cases.append(Case(str(folder), (1, 1, 2), "freespec", fault="shared"))
    for case, by_rank in zip(cases, run_ranks(ranks, latents_on_ranks, cases, tmp_path), strict=True):
        assert_same_video(by_rank, config_of(folder), case)


@pytest.mark.parametrize("stops_after", [1, 2, 3])
def test_a_run_that_was_stopped_continues_across_the_switch(folder, tmp_path, stops_after):
    config, state = config_of(folder), tmp_path / "state"
    with LongVideoEngine(config) as engine:
        stop_run(engine, state, after=stops_after)
    with LongVideoEngine(config) as engine:
        made = engine.denoise(PROMPT, snapshot=state)
    assert made.resumed_at == stops_after
    assert torch.equal(made.latents, on_one_rank(config))
    assert [row["expert"] for row in made.steps] == ["transformer"] * 2 + ["transformer_2"] * 2
    assert {row["mode"] for row in made.steps} == {"dual", "local"}


def test_a_video_is_continued(folder, tmp_path):
    file = tmp_path / "a.safetensors"
    with LongVideoEngine(config_of(folder)) as engine:
        latents = torch.randn(engine.spec.latent_shape(NATIVE, 32, 48), generator=torch.Generator().manual_seed(1))
        save_latents(file, latents, {})
        made = engine.denoise(PROMPT, given=GivenFrames(extend=file)).latents
    assert torch.equal(made[:, :, :3], latents)
    assert relative(made[:, :, 3:], on_one_rank(config_of(folder))[:, :, 3:]) > 1e-3


def test_the_weights_of_both_decide_the_id(folder, tmp_path):
    other = random_wan22()
    with torch.no_grad():
        other.transformer_2.proj_out.bias.add_(1)
    other.save_pretrained(tmp_path)
    digests = [open_checkpoint(ModelConfig(path=str(path))).digest for path in (folder, tmp_path)]
    assert digests[0] != digests[1]


def test_a_record_names_both(folder):
    with LongVideoEngine(config_of(folder, frames=NATIVE)) as engine:
        record = engine.generate(PROMPT).record
    assert record["model"]["parameters"]["transformer_2"] == record["model"]["parameters"]["transformer"]
    assert "transformer_2/diffusion_pytorch_model.safetensors" in record["model"]["sha256"]
    assert record["config"]["sampler"]["guidance_scale_2"] == SCALES["guidance_scale_2"]
    assert [step["expert"] for step in record["steps"]] == ["transformer"] * 2 + ["transformer_2"] * 2


def test_the_public_command_with_a_given_picture_and_a_timeline(folder, tmp_path):
    Image.new("RGB", (48, 32), "red").save(tmp_path / "given.png")
    words = f"--config configs/wan2.2-t2v-a14b.yaml --model.path {folder} --model.device cpu --video.num_frames 29 --video.height 32"
    words += " --video.width 48 --sampler.num_steps 4 --sampler.max_text_tokens 20 --sampler.negative_prompt bad --method.window_frames 3"
    words += f" --given first={tmp_path / 'given.png'} --output.path {tmp_path / 'a.mp4'} --output.progress off"
    run_here("generate", [*words.split(), "--timeline", "a circle [0-12] | a star [12-, scene]"])
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["given"]
    assert record["timeline"]
    assert {step["expert"] for step in record["steps"]} == {"transformer", "transformer_2"}


# LoRAs.


def test_a_lora_changes_its_own_transformer(folder, tmp_path):
    plain = load_pipeline(ModelConfig(path=str(folder), device="cpu"), with_text=False)
    high, low = (save_lora(tmp_path / f"{n}.safetensors", random_lora(plain.transformer, seed=n)) for n in (1, 2))

    def loaded(*loras: str) -> Any:
        return load_pipeline(ModelConfig(path=str(folder), device="cpu", loras=loras), with_text=False)

    def weights(pipe: Any, name: str) -> Tensor:
        return getattr(pipe, name).blocks[0].attn1.to_q.weight

    both, second = loaded(f"high:{high}@0.5", f"low:{low}"), loaded(f"low:{low}")
    assert torch.equal(weights(second, "transformer"), weights(plain, "transformer"))
    for name, layers, scale in (
        ("transformer", random_lora(plain.transformer, seed=1), 0.5),
        ("transformer_2", random_lora(plain.transformer, seed=2), 1.0),
    ):
        down, up = layers["blocks.0.attn1.to_q"]
        torch.testing.assert_close(weights(both, name), weights(plain, name) + scale * up @ down)
        assert not torch.equal(weights(both, name), weights(plain, name))
    assert torch.equal(weights(second, "transformer_2"), weights(both, "transformer_2"))
    digests = {
        open_checkpoint(ModelConfig(path=str(folder), loras=(f"{side}:{high}",))).digest for side in ("high", "low")
    }
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("experts", "settings", "message"),
    [
        (
            2,
            {"loras": ("a.safetensors",)},
            "has two transformers: say which of them the LoRA a.safetensors changes, high:",
        ),
        (
            1,
            {"loras": ("high:a.safetensors",)},
            "has one transformer, and the LoRA high:a.safetensors names one of two; give it as a.safetensors",
        ),
        (
            2,
            {"single_file": "a.gguf"},
            "has two transformers: say which of them the file a.gguf replaces, high:a.gguf .* or low:a.gguf",
        ),
        (
            1,
            {"single_file": ("high:a.gguf", "low:b.gguf")},
            "has one transformer, and the file high:a.gguf names one of two; give a checkpoint with two, as configs/wan2.2-t2v-a14b.yaml does",
        ),
        (1, {"idle_expert": "leave"}, "model.idle_expert leave is for a checkpoint of two transformers"),
    ],
)
def test_settings_for_the_other_number_of_transformers(folder, experts, settings, message):
    config = config_of(folder, **settings)
    one = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, guidance_scale_2=None))
    names = ("transformer", "transformer_2")[:experts]
    refused(lambda: check_experts(one, names), match=message)
    if experts == 1:
        refused(lambda: check_experts(config_of(folder), names), match="guidance_scale_2 2 is for a checkpoint of two")


def test_a_lora_of_the_other_transformer_by_its_name():
    model = ModelConfig(path="x", loras=("low:a/b/wan2.2_t2v_A14b_high_noise_lora.safetensors",), offline=True)
    refused(
        lambda: find_loras(model),
        match="low:.* is a LoRA for the other transformer, as its name says; give it as high:",
    )


def test_a_second_guidance_scale_without_guidance():
    refused(lambda: SamplerConfig(guidance_scale=1.0, guidance_scale_2=3.0), match="guidance_scale_2 3.0 has no effect")


# Where they are.


class Moved:
    """In place of a transformer: says where it was sent."""

    def __init__(self) -> None:
        self.device, self.went = torch.device("cpu"), []

    def to(self, device: torch.device) -> None:
        self.device = device
        self.went.append(device.type)


def test_the_idle_one_leaves_before_the_other_comes():
    first, second = Moved(), Moved()
    order = []
    for part, name in ((first, "first"), (second, "second")):
        part.to = lambda device, part=part, name=name: (order.append((name, device.type)), Moved.to(part, device))
    placement = ExpertPlacement(
        experts={"transformer": first, "transformer_2": second}, device=torch.device("cuda"), idle_stays=False
    )
    for name in ("transformer", "transformer", "transformer_2", "transformer_2", "transformer"):
        placement.bring(name)
    assert order == [
        ("first", "cuda"),
        ("first", "cpu"),
        ("second", "cuda"),
        ("second", "cpu"),
        ("first", "cuda"),
    ]
    dataclasses.replace(placement, idle_stays=True).bring("transformer_2")
    assert len(order) == 5


def test_another_method_finds_the_first_one_on_the_device(folder, monkeypatch):
    """The last steps of a video have sent it to the CPU, whose kernels are other ones."""
    brought = []
    with LongVideoEngine(config_of(folder, frames=NATIVE)) as engine:
        monkeypatch.setattr(ExpertPlacement, "bring", lambda _self, active: brought.append(active))
        engine.denoise(PROMPT)
        assert brought == ["transformer"] * 2 + ["transformer_2"] * 2
        engine.use_method(MethodConfig(name="direct", window_frames=3))
        assert brought[-1] == "transformer"


# Planned.

PAIR, ONE = "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
VIDEO = VideoConfig(num_frames=321, height=480, width=832)


def case_of(name: str, gpu: str, **options: Any) -> PlannedCase:
    return PlannedCase(
        spec=ModelSpec(name=name, source="test", configs=PUBLISHED[name]),
        video=VIDEO,
        sampler=SamplerConfig(num_steps=40, flow_shift=12.0),
        method=MethodConfig(name="freespec", window_frames=21),
        gpu=read_gpu(gpu),
        world_size=1,
        options=Options(**options),
    )


def test_operations_are_those_of_one_transformer():
    """Its configuration is Wan2.1 14B's, whose operations test_planner holds against torch's counter."""
    assert PUBLISHED[PAIR]["transformer"] == PUBLISHED[ONE]["transformer"]
    layouts = [case_of(name, "h200").layout((1, 1, 1)) for name in (PAIR, ONE)]
    assert call_operations(layouts[0], "dual") == call_operations(layouts[1], "dual")


def test_memory_counts_both_or_one():
    alone, alone_peak = case_of(ONE, "h200").memory((1, 1, 1), ["dual"])
    extra = case_of(ONE, "h200").spec.weight_bytes(2)["transformer"]
    stays, stays_peak = case_of(PAIR, "h200").memory((1, 1, 1), ["dual"])
    assert stays["weights"] == alone["weights"] + extra
    assert stays_peak == alone_peak + extra
    assert case_of(PAIR, "h200").placed((1, 1, 1), ["dual"]).idle_expert == "stay"
    for case in (case_of(PAIR, "h200", idle_expert="leave"), case_of(PAIR, "h100")):
        assert case.placed((1, 1, 1), ["dual"]).idle_expert == "leave"
        assert case.memory((1, 1, 1), ["dual"]) == (alone, alone_peak)
    shared = [case_of(name, "h200", weights="zero3").kept_weights(4)["transformer"] for name in (PAIR, ONE)]
    assert shared[0] == 2 * shared[1]
    offloaded = [case_of(name, "h200", weights="cpu_offload").memory((1, 1, 1), ["dual"])[1] for name in (PAIR, ONE)]
    assert offloaded[0] == offloaded[1]
