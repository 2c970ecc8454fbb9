"""A given first frame of LTX-Video checkpoints that were trained for one: a timestep of each token, shared with the tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXImageToVideoPipeline, LTXPipeline
from PIL import Image
from torch import Tensor

from engine.adapters.ltx import pack
from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.given.frames import GivenFrames, parse_given
from engine.load.checkpoint import open_checkpoint
from engine.ranks.layouts import Ranks
from freespec.methods import FreeSpec
from tests.engine.applied import applied, latents_of
from tests.engine.golden import Case, all_degrees, assert_same_video, first_picture, mesh_of, on_one_rank, relative
from tests.engine.golden import latents_of as latents_on
from tests.ranks import run_ranks
from tests.tiny_pipelines import random_ltx

PROMPT = "a red circle"
NATIVE, LONG = 17, 57  # frames; 3 and 8 latents, and the window is 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As 0.9.5 and later name their pipeline, with a fixed shift."""
    made = tmp_path_factory.mktemp("ltx")
    random_ltx(dynamic_shift=False).save_pretrained(made)
    index = json.loads((made / "model_index.json").read_text())
    (made / "model_index.json").write_text(json.dumps(index | {"_class_name": "LTXConditionPipeline"}))
    return made


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> GivenFrames:
    return first_picture(tmp_path_factory.mktemp("given") / "first.png", 64, 96)


def config_of(folder: Path, *, frames: int = LONG, method: str = "freespec") -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(folder), device="cpu"),
        video=VideoConfig(num_frames=frames, height=64, width=96, fps=8),
        sampler=SamplerConfig(num_steps=3, guidance_scale=4.0, seed=3, negative_prompt="bad", max_text_tokens=20),
        method=MethodConfig(name=method, window_frames=3, freespec=FreeSpec(domain="step")),
        output=OutputConfig(progress="off"),
    )


def stock_latents(folder: Path, frames: int, first: Tensor) -> Tensor:
    """What diffusers' image-to-video pipeline makes of the engine's noise and first latent frame, which it would sample."""
    parts = LTXPipeline.from_pretrained(folder).components
    pipe = LTXImageToVideoPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, (frames - 1) // 8 + 1, *first.shape[3:], generator=torch.Generator().manual_seed(3))
    noise[:, :, :1] = first
    call: dict[str, Any] = {"num_frames": frames, "height": 64, "width": 96, "num_inference_steps": 3, "frame_rate": 8}
    call |= {"image": Image.new("RGB", (96, 64)), "latents": pack(noise), "max_sequence_length": 20}
    packed = pipe(prompt=PROMPT, negative_prompt="bad", **call, guidance_scale=4.0, output_type="latent").frames
    return packed.unflatten(1, noise.shape[2:]).permute(0, 4, 1, 2, 3) if packed.dim() == 3 else packed


@pytest.mark.parametrize(("frames", "method"), [(NATIVE, "freespec"), (LONG, "direct")])
def test_the_engine_has_the_bits_of_the_stock_pipeline(folder, given, frames, method):
    config = config_of(folder, frames=frames, method=method)
    made = on_one_rank(config, given=given)
    assert torch.equal(made, stock_latents(folder, frames, made[:, :, :1]))


def test_a_checkpoint_of_text_to_video_keeps_the_rule_without_training(folder, given, tmp_path):
    """Negative control: the same weights without the name of the pipeline that they were trained for."""
    random_ltx(dynamic_shift=False).save_pretrained(tmp_path)
    places = [open_checkpoint(ModelConfig(path=str(path))).spec.pictures for path in (folder, tmp_path)]
    assert places == [("first",), ()]
    made, other = (latents_on(config_of(path), given=given) for path in (folder, tmp_path))
    assert torch.equal(made[:, :, :1], other[:, :, :1])
    assert relative(other, made) > 1e-3


@pytest.mark.parametrize("frames", [NATIVE, LONG])
def test_a_method_on_the_image_to_video_pipeline(frames):
    pipe = LTXImageToVideoPipeline(**random_ltx().components)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 96, "num_frames": frames, "image": Image.new("RGB", (96, 64), "red")}
    stock = latents_of(pipe, **call)
    with applied(pipe, method="direct"):
        assert torch.equal(latents_of(pipe, **call), stock)
    with applied(pipe):
        assert torch.equal(latents_of(pipe, **call), stock) == (frames == NATIVE)


def latents_on_ranks(rank: int, case: Case) -> Tensor:
    """This rank's latents with the picture that the case names; runs on every rank."""
    given = parse_given([f"first={case.fault}"], None)
    return latents_on(config_of(Path(case.folder)), Ranks(mesh=mesh_of(case.degrees)), given=given)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_arrangement_of_ranks_makes_the_same_video(folder, given, ranks, tmp_path):
    cases = [Case(str(folder), degrees, "freespec", fault=str(given.images[0].path)) for degrees in all_degrees(ranks)]
    for case, by_rank in zip(cases, run_ranks(ranks, latents_on_ranks, cases, tmp_path), strict=True):
        assert_same_video(by_rank, config_of(folder), case, given)


def test_a_run_that_was_stopped_continues(folder, given, tmp_path):
    def stop(finished: int, _total: int) -> None:
        if finished == 2:
            raise InterruptedError

    with LongVideoEngine(config_of(folder)) as engine:
        with pytest.raises(InterruptedError):
            engine.denoise(PROMPT, given=given, checkpoint=tmp_path / "state", on_step=stop)
        made = engine.denoise(PROMPT, given=given, checkpoint=tmp_path / "state")
    assert made.resumed_at == 2
    assert torch.equal(made.latents, on_one_rank(config_of(folder), given=given))
    assert made.settings["given"]["trained"] == ["first"]
