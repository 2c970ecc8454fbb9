"""Wan2.2 TI2V 5B, with a given first frame or without: a timestep of each token, shared with the tokens, and a VAE of patches."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.adapters import VideoSpec
from engine.adapters.published import PUBLISHED
from engine.adapters.wan import WAN, WanAdapter
from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.decode.pieces import stream_decode
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.files.latents import save_latents
from engine.given.frames import GivenFrames, parse_given
from engine.given.known import check_given
from engine.load.checkpoint import open_checkpoint
from engine.load.convolutions import use_onednn
from engine.planner.flops import call_operations
from engine.planner.layout import lay_out
from engine.planner.model import ModelSpec
from engine.ranks.layouts import Ranks
from freespec.methods import FreeSpec
from launch.cli.start import run_here
from tests.engine.applied import applied, latents_of, refused
from tests.engine.golden import (
    Case,
    all_degrees,
    assert_same_video,
    first_picture,
    mesh_of,
    on_one_rank,
    relative,
    stop_run,
)
from tests.engine.golden import latents_of as latents_on
from tests.loras import random_lora, save_lora
from tests.ranks import run_ranks
from tests.tiny_pipelines import random_ti2v

PROMPT = "a red circle"
NATIVE, LONG = 9, 29
NAME = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ti2v")
    random_ti2v().save_pretrained(made)
    return made


def config_of(folder: Path, *, frames: int = LONG, method: str = "freespec", **model: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(folder), device="cpu", **model),
        video=VideoConfig(num_frames=frames, height=64, width=96),
        sampler=SamplerConfig(num_steps=3, guidance_scale=4.0, seed=3, negative_prompt="bad", max_text_tokens=20),
        method=MethodConfig(name=method, window_frames=3, freespec=FreeSpec(domain="step")),
        output=OutputConfig(progress="off"),
    )


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> GivenFrames:
    """A picture of the video's size for its first frame."""
    return first_picture(tmp_path_factory.mktemp("given") / "first.png", 64, 96)


def stock_latents(folder: Path, frames: int, given: GivenFrames | None = None) -> Tensor:
    pipe = WanPipeline.from_pretrained(folder)
    image = {}
    if given is not None:
        pipe = WanImageToVideoPipeline(**pipe.components, expand_timesteps=True)
        with Image.open(given.images[0].path) as file:
            image = {"image": file.copy()}
        use_onednn(pipe.vae)  # the engine's convolutions on a CPU, whose sums are in another order
    pipe.set_progress_bar_config(disable=True)
    call = {"num_frames": frames, "height": 64, "width": 96, "num_inference_steps": 3, "max_sequence_length": 20}
    call |= {"prompt": PROMPT, "negative_prompt": "bad", "guidance_scale": 4.0}
    return pipe(**call, **image, generator=torch.Generator().manual_seed(3), output_type="latent").frames


@pytest.mark.parametrize(("frames", "method"), [(NATIVE, "freespec"), (LONG, "direct")])
def test_the_engine_has_the_bits_of_the_stock_pipeline(folder, frames, method):
    assert torch.equal(on_one_rank(config_of(folder, frames=frames, method=method)), stock_latents(folder, frames))


@pytest.mark.parametrize(("frames", "method"), [(NATIVE, "freespec"), (LONG, "direct")])
def test_a_given_first_frame_is_the_condition_of_the_stock_pipeline(folder, given, frames, method):
    config = config_of(folder, frames=frames, method=method)
    made = on_one_rank(config, given=given)
    assert torch.equal(made, stock_latents(folder, frames, given))
    with pytest.MonkeyPatch.context() as patch:  # negative control: a picture that the model was not trained for
        patch.setattr(
            WanAdapter, "video_spec", lambda self, *parts: dataclasses.replace(_spec(self, *parts), pictures=())
        )
        other = latents_on(config, given=given)
    assert torch.equal(other[:, :, 0], made[:, :, 0])
    assert relative(other, made) > 1e-3


_spec = WanAdapter.video_spec


def test_pictures_elsewhere_stay_known_and_the_id_says_which_are_conditions(folder, given, tmp_path):
    """A run that was stopped continues with both."""
    config, state = config_of(folder), tmp_path / "state"
    both = GivenFrames(
        images=(*given.images, first_picture(tmp_path / "last.png", 64, 96, where="last", seed=1).images[0])
    )

    with LongVideoEngine(config) as engine:
        stop_run(engine, state, given=both)
        made = engine.denoise(PROMPT, given=both, snapshot=state)
        assert made.resumed_at == 2
        assert torch.equal(made.latents, engine.denoise(PROMPT, given=both).latents)
        assert torch.equal(made.latents[:, :, 0], on_one_rank(config, given=given)[:, :, 0])
    assert made.settings["given"]["trained"] == ["first"]
    assert sorted(made.settings["given"]["images"]) == ["0", "7"]
    assert relative(made.latents, on_one_rank(config, given=given)) > 1e-3


def test_a_video_is_continued_with_the_rule_of_the_first_frame(folder, given, tmp_path, monkeypatch):
    """As the stock pipeline would if its mask were that of several latent frames."""
    config, file = config_of(folder, method="direct"), tmp_path / "a.safetensors"
    prefix = torch.randn(
        open_checkpoint(config.model).spec.latent_shape(5, 64, 96), generator=torch.Generator().manual_seed(1)
    )
    save_latents(file, prefix, {})
    prepare = WanImageToVideoPipeline.prepare_latents

    def prepare_prefix(self: Any, *args: Any, **kwargs: Any) -> Any:
        latents, _, mask = prepare(self, *args, **kwargs)
        mask[:, :, :2] = 0
        return latents, torch.cat([prefix, torch.zeros_like(latents[:, :, 2:])], dim=2), mask

    extended = GivenFrames(extend=file)
    with LongVideoEngine(config) as engine:
        made = engine.denoise(PROMPT, given=extended)
        [note] = check_given(extended, engine.spec, num_frames=LONG, height=64, width=96, fps=16)
        with monkeypatch.context() as patch:  # negative control: the rule of checkpoints without conditions
            patch.setattr(VideoSpec, "takes_prefix", False)
            other = engine.denoise(PROMPT, given=extended).latents
    monkeypatch.setattr(WanImageToVideoPipeline, "prepare_latents", prepare_prefix)
    assert torch.equal(made.latents, stock_latents(folder, LONG, given))
    assert torch.equal(made.latents[:, :, :2], other[:, :, :2])
    assert relative(made.latents, other) > 1e-3
    assert made.settings["given"]["trained"] == ["extend"]
    assert (
        note
        == "a.safetensors is the condition of frames 0 to 4; diffusers' pipeline of this checkpoint takes frame 0 alone"
    )


@pytest.mark.parametrize("frames", [NATIVE, LONG])
def test_a_method_on_the_image_to_video_pipeline(frames):
    pipe = WanImageToVideoPipeline(**random_ti2v().components, expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 96, "num_frames": frames, "image": Image.new("RGB", (96, 64), "red")}
    stock = latents_of(pipe, **call)
    with applied(pipe, method="direct"):
        assert torch.equal(latents_of(pipe, **call), stock)
    with applied(pipe):
        assert torch.equal(latents_of(pipe, **call), stock) == (frames == NATIVE)


def test_a_lora_changes_the_video_by_its_rule(folder, given, tmp_path):
    """As the same numbers added to the weights."""
    layers = random_lora(random_ti2v().transformer)
    file = save_lora(tmp_path / "a.safetensors", layers)
    made = latents_on(config_of(folder, loras=(f"{file}@0.5",)), given=given)
    with LongVideoEngine(config_of(folder)) as engine, torch.no_grad():
        for name, (down, up) in layers.items():
            engine.pipe.transformer.get_submodule(name).weight.add_(0.5 * up @ down)
        torch.testing.assert_close(made, engine.denoise(PROMPT, given=given).latents, rtol=1e-4, atol=1e-4)
    assert relative(made, on_one_rank(config_of(folder), given=given)) > 1e-2


def test_a_method_on_a_pipeline(folder):
    pipe = random_ti2v()
    call = {"height": 64, "width": 96}
    stock = latents_of(pipe, **call)
    with applied(pipe, method="direct"):
        assert torch.equal(latents_of(pipe, **call), stock)
    assert torch.equal(latents_of(pipe, **call), stock)
    assert not any(module._forward_pre_hooks for module in pipe.transformer.modules())


def test_several_timesteps_in_a_video_are_refused():
    pipe = random_ti2v()
    pipe.scheduler.set_timesteps(3)
    timestep = torch.full((1, 2 * 4 * 4), float(pipe.scheduler.timesteps[0]))
    timestep[:, :16] = 500
    with applied(pipe), pytest.raises(UserError, match="have several timesteps that are not 0"):
        pipe.transformer(torch.zeros(1, 4, 2, 8, 8), timestep, torch.zeros(1, 12, 16))


def test_a_picture_as_the_whole_video_is_refused():
    pipe = WanImageToVideoPipeline(**random_ti2v().components, expand_timesteps=True)
    with applied(pipe), pytest.raises(UserError, match="every token of the video has timestep 0"):
        latents_of(pipe, height=64, width=96, num_frames=1, image=Image.new("RGB", (96, 64), "red"))


def test_frames_are_those_of_the_vae():
    vae = random_ti2v().vae
    latents = torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    mean, std = WAN.latent_statistics(vae)
    with torch.no_grad():
        whole = vae.decode(latents / (1.0 / std) + mean).sample
    streamed = torch.cat(list(stream_decode(vae, latents)), dim=2)
    assert streamed.shape == (1, 3, 9, 32, 48)
    assert torch.equal(streamed, whole)


def test_the_public_command_with_a_given_picture_and_a_timeline(folder, tmp_path):
    """Also in tiles."""
    Image.new("RGB", (96, 64), "red").save(tmp_path / "given.png")
    words = f"--config configs/wan2.2-ti2v-5b.yaml --model.path {folder} --model.device cpu --video.num_frames 29 --video.height 64"
    words += " --video.width 96 --sampler.num_steps 3 --sampler.max_text_tokens 20 --sampler.negative_prompt bad --method.window_frames 3"
    words += f" --given first={tmp_path / 'given.png'} --output.path {tmp_path / 'a.mp4'} --output.progress off"
    words += " --decode.mode tiled --decode.tile_height 48 --decode.tile_width 48 --decode.stride_height 32 --decode.stride_width 32"
    run_here("generate", [*words.split(), "--timeline", "a circle [0-12] | a star [12-, scene]"])
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["given"]
    assert record["timeline"]
    assert record["decode"]["mode"] == "tiled"


def latents_on_ranks(rank: int, case: Case) -> Tensor:
    """This rank's latents with the file that the case names, and weights shared by zero3 if its route says so; runs on every rank."""
    given, weights = given_of(case), {"weights": "zero3"} if case.route == "shared" else {}
    return latents_on(config_of(Path(case.folder), **weights), Ranks(mesh=mesh_of(case.degrees)), given=given)


def given_of(case: Case) -> GivenFrames:
    """The picture of the case for the first frame, or the latents to continue."""
    picture = case.fault.endswith(".png")
    return parse_given([f"first={case.fault}"], None) if picture else parse_given([], case.fault)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_arrangement_of_ranks_makes_the_same_video(folder, given, ranks, tmp_path):
    cases = [Case(str(folder), degrees, "freespec", fault=str(given.images[0].path)) for degrees in all_degrees(ranks)]
    if ranks == 2 and importlib.util.find_spec("deepspeed") is not None:
        cases.append(cases[0]._replace(route="shared"))
    save_latents(tmp_path / "a.safetensors", torch.ones(1, 4, 2, 8, 12), {})
    cases.append(cases[0]._replace(fault=str(tmp_path / "a.safetensors")))
    for case, by_rank in zip(cases, run_ranks(ranks, latents_on_ranks, cases, tmp_path), strict=True):
        assert_same_video(by_rank, config_of(folder), case, given_of(case))


def test_operations_are_exactly_what_torch_counts():
    spec = ModelSpec(name=NAME, source="test", configs=PUBLISHED[NAME])
    video = VideoConfig(num_frames=5, height=64, width=64)
    assert spec.grid(5, 64, 64) == (2, 4)
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(spec.configs["transformer"]).eval()
        inputs = torch.empty(1, 48, 2, 4, 4), torch.empty(1, 8), torch.empty(1, 512, 4096)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs, return_dict=False)
    method = MethodConfig(window_frames=31)
    layout = lay_out(spec, (1, 1, 1), video, SamplerConfig(), method, itemsize=2, local_route="auto")
    assert sum(call_operations(layout, "global").values()) == counter.get_total_flops()


def test_a_timestep_for_the_video_alone_is_another_number_of_operations():
    """Negative control."""
    spec = ModelSpec(
        name=NAME, source="test", configs=PUBLISHED[NAME] | {"model_index": {"_class_name": "WanPipeline"}}
    )
    whole = ModelSpec(name=NAME, source="test", configs=PUBLISHED[NAME])
    video, method = VideoConfig(num_frames=5, height=64, width=64), MethodConfig(window_frames=31)
    totals = [
        call_operations(lay_out(s, (1, 1, 1), video, SamplerConfig(), method, itemsize=2, local_route="auto"), "global")
        for s in (spec, whole)
    ]
    assert totals[0]["matrices"] < totals[1]["matrices"]


def test_a_checkpoint_with_both_is_refused():
    pipe = random_ti2v()
    pipe.register_modules(transformer_2=random_ti2v(seed=1).transformer)
    pipe.register_to_config(boundary_ratio=0.875)
    refused(lambda: applied(pipe), match="has two transformers and a timestep per token")
