"""Checkpoints that make videos of pictures (Wan2.1 I2V and FLF2V, Wan2.2 I2V A14B): the stock pipeline's bits, ranks, timelines, plans."""

import dataclasses
import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine import apply_timeline
from engine.adapters.published import PUBLISHED
from engine.adapters.wan import WAN
from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.decode.live_bytes import LiveBytes
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.given.frames import GivenFrames, GivenImage, parse_given
from engine.given.known import check_given, read_given
from engine.load.checkpoint import open_checkpoint
from engine.load.convolutions import use_onednn
from engine.load.pipeline import load_pipeline
from engine.planner.flops import call_operations
from engine.planner.layout import lay_out
from engine.planner.memory import encode_cost
from engine.planner.model import ModelSpec, read_model
from engine.ranks.layouts import Ranks
from freespec.methods import FreeSpec
from launch.cli.start import run_here
from launch.video.prompts import look_at_given, look_at_prompts
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
from tests.tiny_pipelines import random_i2v, random_wan

PROMPT = "a red circle"
NATIVE, LONG = 9, 29  # frames; 3 and 8 latents, and the window is 3
PLACES = {"i2v": ("first",), "flf2v": ("first", "last"), "a14b": ("first", "last")}
TEXT = 512  # text tokens, without which diffusers takes tokens of the pictures for text


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: tmp_path_factory.mktemp(kind) for kind in PLACES}
    for kind, folder in made.items():
        random_i2v(kind).save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GivenFrames]:
    """Pictures of the video's size at every place of each kind."""
    folder = tmp_path_factory.mktemp("pictures")
    every = {
        place: first_picture(folder / f"{place}.png", 32, 48, where=place, seed=seed).images[0]
        for seed, place in enumerate(("first", "last"))
    }
    return {kind: GivenFrames(images=tuple(every[place] for place in places)) for kind, places in PLACES.items()}


def config_of(folder: Path, *, frames: int = LONG, method: str = "freespec", **model: Any) -> RunConfig:
    second = {"guidance_scale_2": 2.0} if folder.name.startswith("a14b") else {}
    return RunConfig(
        model=ModelConfig(path=str(folder), device="cpu", **model),
        video=VideoConfig(num_frames=frames, height=32, width=48),
        sampler=SamplerConfig(
            num_steps=3, guidance_scale=4.0, seed=3, negative_prompt="bad", max_text_tokens=TEXT, **second
        ),
        method=MethodConfig(name=method, window_frames=3, freespec=FreeSpec(domain="step")),
        output=OutputConfig(progress="off"),
    )


def opened(image: GivenImage) -> Image.Image:
    """The picture in memory."""
    with Image.open(image.path) as file:
        return file.copy()


def stock_latents(folder: Path, frames: int, given: GivenFrames) -> Tensor:
    """What diffusers' own pipeline makes of the same pictures, prompt and seed."""
    pipe = WanImageToVideoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    use_onednn(pipe.vae)  # the engine's convolutions on a CPU, whose sums are in another order
    call: dict[str, Any] = {"num_frames": frames, "height": 32, "width": 48, "num_inference_steps": 3}
    call |= {"image": opened(given.images[0]), "guidance_scale": 4.0, "max_sequence_length": TEXT}
    call |= {"last_image": opened(given.images[1])} if len(given.images) > 1 else {}
    call |= {"guidance_scale_2": 2.0} if pipe.config.boundary_ratio else {}
    draw = torch.Generator().manual_seed(3)
    return pipe(prompt=PROMPT, negative_prompt="bad", **call, generator=draw, output_type="latent").frames


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize(("frames", "method"), [(NATIVE, "freespec"), (LONG, "direct")])
def test_the_engine_has_the_bits_of_the_stock_pipeline(folders, given, kind, frames, method):
    made = on_one_rank(config_of(folders[kind], frames=frames, method=method), given=given[kind])
    assert torch.equal(made, stock_latents(folders[kind], frames, given[kind]))


@pytest.mark.parametrize("kind", PLACES)
def test_every_part_of_a_condition_decides_something(folders, given, kind, monkeypatch):
    """Negative control of the test above."""
    config = config_of(folders[kind], frames=NATIVE)
    made = on_one_rank(config, given=given[kind])
    own, forward = WAN.condition, ("channels",) if kind == "a14b" else ("channels", "tokens")
    for part in forward:

        def without(*args: Any, part: str = part, **kwargs: Any) -> Any:
            condition = own(*args, **kwargs)
            return dataclasses.replace(condition, **{part: torch.zeros_like(getattr(condition, part))})

        monkeypatch.setattr(
            type(WAN), "condition", lambda _self, *args, change=without, **kwargs: change(*args, **kwargs)
        )
        assert relative(latents_on(config, given=given[kind]), made) > 1e-4, part


def test_the_video_between_pictures_is_encoded_four_frames_at_a_time(given):
    """With the bits of the VAE's own encoding of all of it."""
    pipe = random_i2v("a14b")
    spec = WAN.video_spec(pipe.transformer.config, pipe.vae.config, {"_class_name": "WanImageToVideoPipeline"})
    known, condition = read_given(given["a14b"], WAN, pipe, spec, num_frames=LONG, height=32, width=48, fps=16)
    assert known is None
    pixels = torch.zeros(1, 3, LONG, 32, 48)
    for place, image in zip((0, -1), given["a14b"].images, strict=True):
        frame = torch.from_numpy(np.array(opened(image))).permute(2, 0, 1)
        pixels[0, :, place] = 2.0 * (frame.float() / 255.0) - 1.0
    with torch.no_grad():
        latents = WAN.encode(pipe.vae, pixels)
    assert torch.equal(condition.channels[:, 4:], latents)
    mask = condition.channels[:, :4].transpose(1, 2).flatten(1, 2)[0, :, 0, 0]
    assert mask.tolist() == [1, 1, 1, 1, *[0] * 27, 1]


@pytest.mark.parametrize("kind", PLACES)
def test_a_method_and_a_timeline_on_a_pipeline(kind):
    pipe = random_i2v(kind)
    pictures = {"image": Image.new("RGB", (48, 32), "red")}
    pictures |= {"last_image": Image.new("RGB", (48, 32), "blue")} if kind != "i2v" else {}
    text = {
        name: torch.randn(1, TEXT, 16, generator=torch.Generator().manual_seed(1))
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    call = {**pictures, **text}
    stock = latents_of(pipe, **call)
    with applied(pipe, method="direct"):
        assert torch.equal(latents_of(pipe, **call), stock)
    with applied(pipe):
        assert not torch.equal(latents_of(pipe, **call), stock)
        native = latents_of(pipe, **call, num_frames=NATIVE)
    assert torch.equal(latents_of(pipe, **call, num_frames=NATIVE), native)
    assert torch.equal(latents_of(pipe, **call), stock)
    # Events with one text are the prompt: the tokens of the pictures are seen once, and by every frame.
    with apply_timeline(pipe, "a [0-12] | a [12-, cut]", fps=16) as handle:
        once = latents_of(pipe, **pictures, **handle.inputs)
    plain = {name: tensor[:, :TEXT] for name, tensor in handle.inputs.items()}
    torch.testing.assert_close(once, latents_of(pipe, **pictures, **plain), rtol=1e-5, atol=1e-5)
    with apply_timeline(pipe, "a [0-12] | b [12-, cut]", fps=16) as handle:
        assert relative(latents_of(pipe, **pictures, **handle.inputs), once) > 1e-4


def test_pictures_attended_as_text(tmp_path):
    """Without `added_kv_proj_dim`: a method leaves that to diffusers, a timeline cannot, and no published checkpoint has it."""
    pipe = random_i2v("i2v")
    config = {key: value for key, value in pipe.transformer.config.items() if key[0] != "_"}
    pipe.register_modules(transformer=WanTransformer3DModel.from_config(config | {"added_kv_proj_dim": None}).eval())
    call = {"image": Image.new("RGB", (48, 32), "red")}
    stock = latents_of(pipe, **call)
    assert not torch.equal(latents_of(pipe, image=Image.new("RGB", (48, 32), "blue")), stock)
    with applied(pipe, method="direct"):
        assert torch.equal(latents_of(pipe, **call), stock)
    with applied(pipe):
        assert not torch.equal(latents_of(pipe, **call), stock)
    refused(lambda: apply_timeline(pipe, "a [0-12] | b [12-, cut]", fps=16), match="cannot tell texts from pictures")
    pipe.save_pretrained(tmp_path)
    refused(lambda: open_checkpoint(ModelConfig(path=str(tmp_path))).spec, match="and added_kv_proj_dim None")


def latents_on_ranks(rank: int, case: Case) -> Tensor:
    """This rank's latents with the pictures that the case names, and weights shared by zero3 if its route says so; runs on every rank."""
    given, weights = parse_given(case.fault.split(), None), {"weights": "zero3"} if case.route == "shared" else {}
    ranks = Ranks(mesh=mesh_of(case.degrees))
    return latents_on(config_of(Path(case.folder), **weights), ranks, case.prompt, given=given)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_arrangement_of_ranks_makes_the_same_video(folders, given, ranks, tmp_path):
    timeline = "a circle [0-12] | a star [12-18, cut] | a square [18-, relay 5]"
    cases = []
    for kind, prompt, arrangements in (
        ("flf2v", timeline, all_degrees(ranks)),
        ("a14b", PROMPT, all_degrees(ranks)[-1:]),
    ):
        words = " ".join(f"{image.where}={image.path}" for image in given[kind].images)
        cases += [Case(str(folders[kind]), degrees, "freespec", fault=words, prompt=prompt) for degrees in arrangements]
    if ranks == 2 and importlib.util.find_spec("deepspeed") is not None:
        cases.append(cases[0]._replace(route="shared"))
    for case, by_rank in zip(cases, run_ranks(ranks, latents_on_ranks, cases, tmp_path), strict=True):
        assert_same_video(by_rank, config_of(Path(case.folder)), case, parse_given(case.fault.split(), None))


def test_a_run_that_was_stopped_continues(folders, given, tmp_path):
    """Also with a picture that the checkpoint was not trained for, which stays as it is."""
    config, state = config_of(folders["i2v"]), tmp_path / "state"
    other = first_picture(tmp_path / "other.png", 32, 48, where="last", seed=5)
    both = GivenFrames(images=(*given["i2v"].images, *other.images))

    with LongVideoEngine(config) as engine:
        assert engine.generate(PROMPT, given=both, num_frames=NATIVE).frames.shape == (NATIVE, 32, 48, 3)
        stop_run(engine, state, after=1, given=both)
        with pytest.raises(UserError, match="belongs to another run"):
            engine.denoise(PROMPT, given=given["i2v"], snapshot=state)
        made = engine.denoise(PROMPT, given=both, snapshot=state)
        assert torch.equal(made.latents, engine.denoise(PROMPT, given=both).latents)
    assert made.resumed_at == 1
    assert made.settings["given"]["trained"] == ["first"]
    assert relative(made.latents, on_one_rank(config, given=given["i2v"])) > 1e-3


@pytest.mark.parametrize(
    ("kind", "there", "missing"), [("i2v", (), "first"), ("flf2v", ("first",), "last"), ("a14b", (), "first")]
)
def test_without_its_pictures_a_checkpoint_makes_nothing(folders, given, kind, there, missing):
    fewer = GivenFrames(images=tuple(image for image in given[kind].images if image.where in there))
    spec, line = (
        open_checkpoint(ModelConfig(path=str(folders[kind]))).spec,
        f"no picture is given for the {missing} frame; give --given {missing}=FILE",
    )
    for found in (fewer, None) if not there else (fewer,):
        refused(lambda found=found: check_given(found, spec, num_frames=LONG, height=32, width=48, fps=16), match=line)
        with LongVideoEngine(config_of(folders[kind])) as engine:
            refused(lambda found=found, engine=engine: engine.denoise(PROMPT, given=found), match=line)


def test_what_does_not_belong_together_is_refused(folders, tmp_path):
    pipe = random_i2v("i2v")
    pipe.register_modules(transformer=random_wan().transformer)
    refused(
        lambda: applied(pipe),
        match="this is a text-to-video transformer, with 4 channels of which it makes 4, in a WanImageToVideoPipeline",
    )
    pipe = random_wan()
    pipe.register_modules(transformer=random_i2v("a14b").transformer)
    refused(
        lambda: applied(pipe),
        match="this is an image-to-video transformer, with 12 channels of which it makes 4, in a WanPipeline",
    )
    config = config_of(folders["i2v"])
    few = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, max_text_tokens=20))
    refused(lambda: LongVideoEngine(few), match="max_text_tokens must be 512 for this checkpoint, got 20")
    random_i2v("i2v").save_pretrained(tmp_path)
    (tmp_path / "image_encoder" / "model.safetensors").unlink()
    refused(lambda: LongVideoEngine(config_of(tmp_path)), match="image_encoder has no weights")


def test_a_lora_changes_the_projections_of_pictures_too(folders, tmp_path):
    plain = load_pipeline(ModelConfig(path=str(folders["i2v"]), device="cpu"), with_text=False)
    layers = random_lora(plain.transformer)
    file = save_lora(tmp_path / "a.safetensors", layers)
    model = ModelConfig(path=str(folders["i2v"]), device="cpu", loras=(f"{file}@0.5",))
    changed, name = load_pipeline(model, with_text=False), "blocks.1.attn2.add_k_proj"
    down, up = layers[name]
    before, after = (pipe.transformer.get_submodule(name).weight for pipe in (plain, changed))
    torch.testing.assert_close(after, before + 0.5 * up @ down)
    assert not torch.equal(after, before)


def test_only_the_rank_that_reads_pictures_loads_their_encoder(folders):
    model = ModelConfig(path=str(folders["i2v"]), device="cpu", dtype="bfloat16")
    pipe = load_pipeline(model)
    assert pipe.image_encoder.dtype == torch.float32
    assert load_pipeline(model, with_text=False).image_encoder is None
    assert load_pipeline(model, with_pictures=False).image_encoder is None


def test_the_public_command_with_a_timeline_and_its_record(folders, given, tmp_path):
    words = f"--config configs/wan2.1-flf2v-14b-720p.yaml --model.path {folders['flf2v']} --model.device cpu --video.num_frames 29"
    words += " --video.height 32 --video.width 48 --sampler.num_steps 3 --sampler.negative_prompt bad --method.window_frames 3"
    words += "".join(f" --given {image.where}={image.path}" for image in given["flf2v"].images)
    words += f" --output.path {tmp_path / 'a.mp4'} --output.progress off"
    run_here("generate", [*words.split(), "--timeline", "a circle [0-12] | a star [12-, scene]"])
    record = json.loads((tmp_path / "a.json").read_text())
    assert [(each["where"], each["start"], each["stop"]) for each in record["given"]["images"]] == [
        ("first", 0, 1),
        ("last", 28, 29),
    ]
    assert record["identity"]["settings"]["given"]["trained"] == ["first", "last"]
    assert record["timeline"]
    assert "image_encoder/model.safetensors" in record["model"]["sha256"]


# Planned.

NAMES = {
    "i2v": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "flf2v": "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
    "a14b": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
}


@pytest.mark.parametrize("kind", NAMES)
def test_operations_are_exactly_what_torch_counts(kind):
    spec = ModelSpec(name=NAMES[kind], source="test", configs=PUBLISHED[NAMES[kind]])
    video = VideoConfig(num_frames=5, height=32, width=32)
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(spec.configs["transformer"]).eval()
        inputs = torch.empty(1, 36, 2, 4, 4), torch.empty(1), torch.empty(1, 512, 4096)
        num_pictures = {"i2v": 1, "flf2v": 2, "a14b": 0}[kind]
        tokens = torch.empty(num_pictures, 257, 1280) if num_pictures else None
    assert spec.image_tokens == 257 * num_pictures
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs, encoder_hidden_states_image=tokens, return_dict=False)
    method = MethodConfig(window_frames=31)
    layout = lay_out(spec, (1, 1, 1), video, SamplerConfig(), method, itemsize=2, local_route="auto")
    assert sum(call_operations(layout, "global").values()) == counter.get_total_flops()


def test_a_plan_reads_the_folder(folders):
    """With the configuration of its encoder of pictures."""
    assert {kind: read_model(ModelConfig(path=str(folder))).image_tokens for kind, folder in folders.items()} == {
        "i2v": 5,
        "flf2v": 10,
        "a14b": 0,
    }


def test_encoding_pictures_costs_what_torch_counts_and_its_memory_hardly_grows(folders):
    """Operations exact, memory within 15 %, and from 29 to 61 frames no more than the latents' moments, twice."""
    spec, vae = read_model(ModelConfig(path=str(folders["a14b"]))), random_i2v("a14b").vae
    picture, peaks = torch.zeros(1, 3, 1, 32, 48), []
    for frames in (LONG, 61):
        with torch.no_grad(), LiveBytes() as live:
            WAN.encode_pictures(vae, {"first": picture}, num_frames=frames)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:  # on a CPU it misses attention
            spec.vae.encode(torch.empty(1, 3, frames, 32, 48, device="meta"))
        num_bytes, operations = encode_cost(spec, frames, 32, 48)
        assert operations == counter.get_total_flops()
        assert num_bytes == pytest.approx(live.peak, rel=0.15)
        peaks.append(live.peak)
    assert peaks[1] - peaks[0] <= 2 * 2 * 4 * 8 * 4 * 8 * 12  # two copies, two moments, fp32, 8 more latent frames
    assert encode_cost(
        ModelSpec(name="t2v", source="test", configs=PUBLISHED["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]), 9, 32, 48
    ) == (0, 0)


def test_commands_without_pictures_say_so_before_anything_is_loaded(folders, given):
    config = config_of(folders["i2v"])
    refused(lambda: look_at_prompts(config, [("a prompt", PROMPT)]), match="give --given first=FILE")
    refused(lambda: look_at_given(config, None), match="give --given first=FILE")
    for kind in PLACES:  # a video to continue is refused, with its pictures too
        also = " and a picture as --given last=FILE" if kind == "flf2v" else ""
        line = (
            "none.mp4 is refused: this checkpoint makes videos of pictures and cannot continue one; leave it out and give the video's "
            f"last frame as --given first=FILE{also}, or choose a text-to-video checkpoint"
        )
        for images in ((), given[kind].images):
            extended = GivenFrames(images=images, extend=folders[kind] / "none.mp4")
            refused(partial(look_at_given, config_of(folders[kind]), extended), match=f"^--extend .*{line}$")


def test_pipelines_of_the_other_class_are_loaded_by_their_index(folders):
    assert isinstance(load_pipeline(ModelConfig(path=str(folders["a14b"]), device="cpu")), WanImageToVideoPipeline)
    assert not isinstance(random_wan(), WanImageToVideoPipeline)
    assert issubclass(WAN.pipeline_of({"_class_name": "WanPipeline"}), WanPipeline)
