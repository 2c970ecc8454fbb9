"""LTX-Video with pictures: at any frame for checkpoints of LTXConditionPipeline, whose tokens share the video's layout; otherwise the first one."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LTXConditionPipeline, LTXImageToVideoPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image
from torch import Tensor

from engine.adapters import VideoSpec
from engine.adapters.base import order_of_tokens
from engine.adapters.ltx import LtxAdapter, unpack
from engine.batch.variants import Variant
from engine.config import (
    AttentionConfig,
    MethodConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    SamplerConfig,
    VideoConfig,
)
from engine.engine import LongVideoEngine
from engine.files.latents import load_latents, save_latents
from engine.given.frames import GivenFrames, GivenImage, parse_given
from engine.given.known import check_given, encode_frames
from engine.hooks.step_hook import share_tokens
from engine.load.checkpoint import open_checkpoint
from engine.load.convolutions import use_onednn
from engine.ranks.layouts import Ranks
from freespec.methods import METHODS, FreeSpec
from launch.video.prompts import look_at_given
from tests.engine.applied import applied, latents_of, refused
from tests.engine.golden import (
    LIMIT,
    Case,
    all_degrees,
    assert_same_video,
    first_picture,
    mesh_of,
    on_one_rank,
    relative,
    rounding_of_direct,
    stop_run,
)
from tests.engine.golden import latents_of as latents_on
from tests.ranks import run_ranks
from tests.tiny_pipelines import random_ltx

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' code with numpy 2

PROMPT = "a red circle"
NATIVE, LONG = 17, 57  # frames; 3 and 8 latents, and the window is 3
DISTILLED = (1000, 975, 725, 0.03)
TIMELINE = "a red circle [0-16] | a star [16-33, scene] | a square [33-, fade 9]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As 0.9.7 and later name their pipeline, with a scheduler that shifts nothing."""
    made = tmp_path_factory.mktemp("ltx")
    random_ltx(dynamic_shift=False, shift_terminal=None).save_pretrained(made)
    index = json.loads((made / "model_index.json").read_text())
    (made / "model_index.json").write_text(json.dumps(index | {"_class_name": "LTXConditionPipeline"}))
    return made


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As 0.9.0 and 0.9.1, whose model_index.json names LTXPipeline."""
    made = tmp_path_factory.mktemp("plain")
    random_ltx().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> GivenFrames:
    return first_picture(tmp_path_factory.mktemp("given") / "first.png", 64, 96)


@pytest.fixture(scope="module")
def several(given: GivenFrames) -> GivenFrames:
    """At the first frame, inside a latent frame, at one's end, and at the last frame."""
    folder = given.images[0].path.parent
    others = [
        first_picture(folder / f"{where}.png", 64, 96, where=where, seed=seed).images[0]
        for seed, where in enumerate(("last", "1s", "20"), start=1)
    ]
    return GivenFrames(images=(*given.images, *others))


def config_of(
    folder: Path,
    *,
    frames: int = LONG,
    method: str = "freespec",
    timesteps: tuple[float, ...] | None = None,
    shift: str = "native",
) -> RunConfig:
    steps = (
        {"num_steps": 3, "guidance_scale": 4.0}
        if timesteps is None
        else {"timesteps": timesteps, "guidance_scale": 1.0}
    )
    return RunConfig(
        model=ModelConfig(path=str(folder), device="cpu"),
        video=VideoConfig(num_frames=frames, height=64, width=96, fps=8),
        sampler=SamplerConfig(seed=3, negative_prompt="bad", max_text_tokens=20, shift=shift, **steps),
        method=MethodConfig(name=method, window_frames=3, freespec=FreeSpec(domain="step")),
        output=OutputConfig(progress="off"),
    )


def stock_latents(
    folder: Path,
    frames: int,
    given: GivenFrames | None,
    monkeypatch: Any,
    *,
    timesteps: tuple[float, ...] | None = None,
    clip: np.ndarray | None = None,
) -> Tensor:
    """What diffusers' own pipeline makes of the same pictures, or of a clip that it begins with, with the mean of their latents, which it would sample."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipe = LTXConditionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    use_onednn(pipe.vae)  # the engine's convolutions on a CPU, whose sums are in another order
    call: dict[str, Any] = {"num_frames": frames, "height": 64, "width": 96, "frame_rate": 8}
    call |= {"max_sequence_length": 20, "image_cond_noise_scale": 0.0}
    steps = {"num_inference_steps": 3, "guidance_scale": 4.0}
    call |= steps if timesteps is None else {"timesteps": list(timesteps), "guidance_scale": 1.0}
    if given is not None:
        call["conditions"] = [condition_of(image, frames) for image in given.images]
    if clip is not None:
        call["conditions"] = [LTXVideoCondition(video=[Image.fromarray(frame) for frame in clip], frame_index=0)]
    draw = torch.Generator().manual_seed(3)
    return pipe(prompt=PROMPT, negative_prompt="bad", **call, generator=draw, output_type="latent").frames


def stock_of_first(folder: Path, frames: int, given: GivenFrames, monkeypatch: Any, *, begun: int = 1) -> Tensor:
    """What LTXImageToVideoPipeline makes of a picture, with the mean of its latents, which it would sample, or of `begun` first latent frames.

    It takes one of them. Others are in its mask, and stay as they are after each step too; they are the file of `given`.
    """
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipe = LTXImageToVideoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    use_onednn(pipe.vae)  # the engine's convolutions on a CPU, whose sums are in another order
    prepare, kept = pipe.prepare_latents, {}
    tokens = begun * 4 * 6

    def prepare_prefix(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        latents, mask = prepare(*args, **kwargs)
        if given.extend is not None:
            latents[:, :tokens] = load_latents(given.extend)[0].flatten(2).transpose(1, 2)
            mask[:, :tokens] = 1
        kept["latents"] = latents[:, :tokens].clone()
        return latents, mask

    def keep(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.cat([kept["latents"], tensors["latents"][:, tokens:]], dim=1)}

    pipe.prepare_latents = prepare_prefix
    more = {} if begun == 1 else {"callback_on_step_end": keep}
    image = Image.new("RGB", (96, 64)) if given.extend is not None else Image.open(given.images[0].path)
    call = {"num_frames": frames, "height": 64, "width": 96, "frame_rate": 8, "max_sequence_length": 20}
    call |= {"num_inference_steps": 3, "guidance_scale": 4.0, "prompt": PROMPT, "negative_prompt": "bad"}
    draw = torch.Generator().manual_seed(3)
    packed = pipe(image, **call, **more, generator=draw, output_type="latent").frames
    return unpack(packed, (frames - 1) // 8 + 1, 4, 6)


def condition_of(image: GivenImage, frames: int) -> LTXVideoCondition:
    with Image.open(image.path) as file:
        return LTXVideoCondition(image=file.copy(), frame_index=round(image.frame(frames, 8)))


@pytest.mark.parametrize(
    ("frames", "method", "timesteps"), [(NATIVE, "freespec", None), (LONG, "direct", None), (LONG, "direct", DISTILLED)]
)
def test_the_engine_has_the_bits_of_the_stock_pipeline(folder, given, monkeypatch, frames, method, timesteps):  # noqa: PLR0917
    """With the steps of distilled checkpoints without guidance."""
    config = config_of(folder, frames=frames, method=method, timesteps=timesteps)
    for shown in (given, None):
        expected = stock_latents(folder, frames, shown, monkeypatch, timesteps=timesteps)
        assert torch.equal(on_one_rank(config, given=shown), expected)


def test_pictures_at_any_frame_are_conditions_of_the_stock_pipeline(folder, several, given, monkeypatch):
    """Up to rounding, since their tokens stand in another order; at native length a method has the bits of direct."""
    config = config_of(folder, method="direct")
    first, last, second, third = several.images
    more = GivenFrames(
        images=(*several.images, GivenImage(where="21", path=first.path))
    )  # in one latent frame with the third
    stock, made = stock_latents(folder, LONG, more, monkeypatch), on_one_rank(config, given=several)
    assert relative(latents_on(config, given=more), stock) <= LIMIT * rounding_of_direct(config)
    assert (
        relative(on_one_rank(config, given=given), stock) > 1e-3
    )  # negative controls: without the others, and one less
    assert relative(made, stock) > 1e-4
    moved = GivenFrames(images=(first, last, second, replace(third, where="21")))
    assert relative(latents_on(config, given=moved), made) > 1e-4  # and one frame later, in the same latent frame
    native = GivenFrames(images=(first, last, second))
    short = [
        on_one_rank(config_of(folder, frames=NATIVE, method=name), given=native) for name in ("direct", "freespec")
    ]
    assert torch.equal(*short)
    assert relative(on_one_rank(config_of(folder), given=several), made) > 1e-3


def test_tokens_of_a_picture_stand_after_the_latent_frame_of_its_moment():
    assert order_of_tokens(4, ()) == [0, 1, 2, 3]
    assert order_of_tokens(4, (1, 3)) == [0, 1, 4, 2, 3, 5]


def test_what_is_said_and_recorded_of_pictures_at_any_frame(several):
    size = {"num_frames": LONG, "fps": 8, "step": 8, "pictures": ("first", "any")}
    assert several.describe(**size) == [
        f"{name} is the condition of {which}, which this checkpoint was trained for"
        for name, which in (
            ("first.png", "the first frame"),
            ("last.png", "frame 56"),
            ("1s.png", "frame 8"),
            ("20.png", "frame 20"),
        )
    ]
    spans = [(each["start"], each["stop"]) for each in several.record(**size, begun=0)["images"]]
    assert spans == [(0, 1), (56, 57), (8, 9), (20, 21)]
    assert several.settings(**size)["trained"] == ["20", "56", "8", "first"]
    # By latent frame, as for every checkpoint, unless two share one.
    assert sorted(several.settings(**size)["images"]) == ["0", "1", "3", "7"]
    near = replace(several, images=(several.images[3], GivenImage(where="21", path=several.images[0].path)))
    assert sorted(near.settings(**size)["images"]) == ["frame 20", "frame 21"]


@pytest.mark.parametrize(("frames", "method"), [(NATIVE, "freespec"), (LONG, "direct")])
def test_a_first_picture_is_that_of_the_image_to_video_pipeline(plain, given, monkeypatch, frames, method):
    config = config_of(plain, frames=frames, method=method, shift="actual")
    made = on_one_rank(config, given=given)
    assert torch.equal(made, stock_of_first(plain, frames, given, monkeypatch))
    with monkeypatch.context() as patch:  # negative control: the rule of checkpoints without conditions
        patch.setattr(LtxAdapter, "video_spec", lambda self, *parts: replace(_spec(self, *parts), pictures=()))
        other = latents_on(config, given=given)
    assert torch.equal(other[:, :, :1], made[:, :, :1])
    assert relative(other, made) > 1e-3
    with LongVideoEngine(config) as engine:
        assert engine.denoise(PROMPT, given=given).settings["given"]["trained"] == ["first"]


_spec = LtxAdapter.video_spec


@pytest.mark.parametrize(("frames", "method"), [(NATIVE, "freespec"), (LONG, "direct")])
def test_a_video_is_continued_by_the_rule_of_the_first_picture(plain, monkeypatch, tmp_path, frames, method):
    """As LTXImageToVideoPipeline would if several latent frames were in its mask; for text-to-video it takes none."""
    given = GivenFrames(extend=tmp_path / "a.safetensors")
    with LongVideoEngine(config_of(plain, frames=frames, method=method, shift="actual")) as engine:
        latents = torch.randn(engine.spec.latent_shape(9, 64, 96), generator=torch.Generator().manual_seed(1))
        save_latents(given.extend, latents, {})
        made = engine.denoise(PROMPT, given=given)
        [note] = check_given(given, engine.spec, num_frames=frames, height=64, width=96, fps=8)
        with monkeypatch.context() as patch:  # negative control: the rule of checkpoints without conditions
            patch.setattr(VideoSpec, "takes_prefix", False)
            other = engine.denoise(PROMPT, given=given).latents
    assert torch.equal(made.latents, stock_of_first(plain, frames, given, monkeypatch, begun=2))
    assert torch.equal(made.latents[:, :, :2], latents)
    assert torch.equal(other[:, :, :2], latents)
    assert relative(other, made.latents) > 1e-3
    assert made.settings["given"]["trained"] == ["extend"]
    assert (
        note
        == "a.safetensors is the condition of frames 0 to 8; diffusers' pipeline of this checkpoint takes frame 0 alone"
    )


def test_other_pictures_of_a_text_to_video_checkpoint_keep_the_rule_without_training(plain, several, given, tmp_path):
    """Beside the first one; a run that was stopped continues with both."""
    spec = open_checkpoint(ModelConfig(path=str(plain))).spec
    assert spec.pictures == ("first",)
    both = GivenFrames(images=several.images[:2])

    with LongVideoEngine(config_of(plain)) as engine:
        stop_run(engine, tmp_path / "state", given=both)
        made = engine.denoise(PROMPT, given=both, snapshot=tmp_path / "state")
        still = encode_frames(engine.adapter, engine.pipe.vae, read_still(both.images[1]))
    assert made.resumed_at == 2
    assert made.settings["given"]["trained"] == ["first"]
    assert torch.equal(made.latents, on_one_rank(config_of(plain), given=both))
    alone = on_one_rank(config_of(plain), given=given)
    assert torch.equal(made.latents[:, :, :1], alone[:, :, :1])
    assert torch.equal(made.latents[:, :, -1:], still[:, :, -1:])
    assert relative(made.latents[:, :, 1:-1], alone[:, :, 1:-1]) > 1e-3
    size = {"num_frames": LONG, "fps": 8, "step": 8, "pictures": spec.pictures}
    assert both.describe(**size) == [
        "first.png is the condition of the first frame, which this checkpoint was trained for",
        "last.png is given at frames 49 to 56, as a still of 8 frames",
    ]


def read_still(image: GivenImage) -> np.ndarray:
    """A picture as the nine frames of two latent frames."""
    with Image.open(image.path) as file:
        return np.repeat(np.asarray(file)[None], 9, axis=0)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_takes_a_first_picture(plain, given, method):
    made, text = (on_one_rank(config_of(plain, method=method), given=each) for each in (given, None))
    direct = on_one_rank(config_of(plain, method="direct"), given=given)
    assert torch.equal(made[:, :, :1], direct[:, :, :1])
    assert relative(made[:, :, 1:], text[:, :, 1:]) > 1e-3
    assert torch.equal(made, direct) == (method in ("direct", "lvsa"))  # the latter sees all frames of so short a video


@pytest.mark.parametrize("frames", [NATIVE, LONG])
def test_a_method_on_the_pipelines_of_pictures(frames):
    pipes = [LTXImageToVideoPipeline(**random_ltx().components)]
    pipes += [LTXConditionPipeline(**random_ltx(dynamic_shift=False, shift_terminal=None).components)]
    call = {"height": 64, "width": 96, "num_frames": frames, "image": Image.new("RGB", (96, 64), "red")}
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        stock = latents_of(pipe, **call)
        with applied(pipe, method="direct"):
            assert torch.equal(latents_of(pipe, **call), stock)
        with applied(pipe):
            assert torch.equal(latents_of(pipe, **call), stock) == (frames == NATIVE)
    with applied(pipes[1]):
        refused(
            lambda: latents_of(pipes[1], **call, frame_index=8), match="has a condition at a later frame than the first"
        )


def test_arguments_that_a_method_cannot_follow_are_refused():
    pipe = LTXConditionPipeline(**random_ltx(dynamic_shift=False, shift_terminal=None).components)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 96, "num_frames": NATIVE}
    latents = torch.zeros(1, 1, 3, 2, 3)
    with applied(pipe):
        refused(lambda: latents_of(pipe, **call, denoise_strength=0.5), match="denoise_strength 0.5 starts")
        refused(lambda: latents_of(pipe, **call, latents=latents), match="ignores latents= and draws noise")
        latents_of(pipe, **call, denoise_strength=1.0, latents=None)
    latents_of(pipe, **call, latents=latents)  # without a method as in the stock pipeline


def test_a_picture_that_the_pipeline_would_ignore_is_refused():
    """LTXImageToVideoPipeline takes latents instead of the picture."""
    pipe = LTXImageToVideoPipeline(**random_ltx().components)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 96, "num_frames": NATIVE, "latents": torch.ones(1, 18 * 4, 4)}
    red, blue = (Image.new("RGB", (96, 64), colour) for colour in ("red", "blue"))
    assert torch.equal(
        latents_of(pipe, **call, image=red), latents_of(pipe, **call, image=blue)
    )  # diffusers ignores it
    with applied(pipe):
        refused(lambda: latents_of(pipe, **call, image=red), match="ignores image= beside latents=")
        latents_of(pipe, **call)


def test_settings_that_do_not_suit_pictures_beside_the_video_are_refused(folder, several, given):
    """Before weights are read, and by the engine; a picture at the first frame has no tokens of its own."""
    config = config_of(folder, method="freeloc")
    match = "method freeloc counts positions .* than the first \\(3\\) as one more frame"
    refused(lambda: look_at_given(config, several), match=match)
    variant = Variant(label="freeloc", config=config)
    refused(lambda: look_at_given(config_of(folder), several, variants=[variant]), match=match)
    few = replace(
        config_of(folder), attention=AttentionConfig(far="6")
    )  # frames outside the window: 5, and 8 with pictures
    refused(lambda: look_at_given(few, several), match="each of the 8 frames outside the window")
    for each, pictures in ((config, given), (few, given), (config_of(folder), several)):
        look_at_given(each, pictures)
    native = GivenFrames(images=tuple(image for image in several.images if image.where in ("first", "last")))
    look_at_given(config_of(folder, method="freeloc", frames=NATIVE), native)
    with LongVideoEngine(config) as engine:
        refused(lambda: engine.denoise(PROMPT, given=several), match=match)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("engine.engine.check_beside", lambda *_args, **_sizes: None)
            refused(lambda: engine.denoise(PROMPT, given=several), match="positions of tiers .* and 3 pictures stand")


@pytest.mark.parametrize(("beside", "line"), [(1, "13725 tokens over 2 ranks are not: \\[6862, 6863\\]"), (2, None)])
def test_a_provider_of_even_shares_counts_pictures(beside, line):
    axes = {name: SimpleNamespace(size=size) for name, size in (("sequence", 2), ("ring", 1), ("ulysses", 2))}
    mesh = SimpleNamespace(**axes, trace=lambda *_args: None)
    setup = SimpleNamespace(mesh=mesh, hybrid=None, exchange=SimpleNamespace(), local_route="all_to_all")
    state: Any = SimpleNamespace(setup=setup, beside=(30,) * beside)
    size = {"latents": torch.empty(0), "mode": "global", "halo": lambda *span: span}

    def share() -> Any:
        return share_tokens(state, SimpleNamespace(num_attention_heads=2), (60 + beside) * 225, **size)

    if line is None:
        share()
    else:
        refused(share, match=line + "; the tokens of pictures at later frames than the first \\(1\\) count too")


def test_a_scheduler_that_shifts_is_refused():
    refused(
        lambda: applied(LTXConditionPipeline(**random_ltx().components)),
        match="would shift its noise levels alone \\(use_dynamic_shifting True, shift_terminal 0.1\\)",
    )


def given_of(case: Case) -> GivenFrames:
    """The pictures that the case names, and the latents that the video begins with if its route does."""
    return parse_given(case.fault.split(), case.route if case.route.endswith(".safetensors") else None)


def latents_on_ranks(rank: int, case: Case) -> Tensor:
    """This rank's latents with what the case is given; runs on every rank."""
    ranks = Ranks(mesh=mesh_of(case.degrees))
    return latents_on(config_of(Path(case.folder)), ranks, case.prompt, given=given_of(case))


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_arrangement_of_ranks_makes_the_same_video(folder, plain, several, ranks, tmp_path):
    words = " ".join(f"{image.where}={image.path}" for image in several.images)
    cases = [Case(str(folder), degrees, "freespec", fault=words) for degrees in all_degrees(ranks)]
    cases.append(cases[-1]._replace(prompt=TIMELINE))
    save_latents(tmp_path / "a.safetensors", torch.ones(1, 4, 2, 4, 6), {})
    later = " ".join(words.split()[1:2])  # the last frame
    cases.append(cases[-1]._replace(fault=later, route=str(tmp_path / "a.safetensors")))
    of_first = Case(str(plain), cases[0].degrees, "freespec", fault=" ".join(words.split()[:2]))
    cases += [of_first._replace(degrees=degrees) for degrees in all_degrees(ranks)]
    cases += [
        cases[-1]._replace(prompt=TIMELINE),
        of_first._replace(fault=later, route=str(tmp_path / "a.safetensors")),
    ]
    for case, by_rank in zip(cases, run_ranks(ranks, latents_on_ranks, cases, tmp_path), strict=True):
        assert_same_video(by_rank, config_of(Path(case.folder)), case, given_of(case))


def test_a_run_that_was_stopped_continues(folder, several, tmp_path):
    with LongVideoEngine(config_of(folder)) as engine:
        stop_run(engine, tmp_path / "state", given=several)
        made = engine.denoise(PROMPT, given=several, snapshot=tmp_path / "state")
        assert engine.handle.state.beside == ()
    assert made.resumed_at == 2
    assert torch.equal(made.latents, on_one_rank(config_of(folder), given=several))
    assert made.settings["given"]["trained"] == ["20", "56", "8", "first"]


def test_a_video_is_continued_towards_a_picture(folder, several, tmp_path):
    """The video that it begins with and the picture at its end are conditions; a run that was stopped continues."""
    file, last = tmp_path / "a.safetensors", several.images[1]
    both = GivenFrames(extend=file, images=(last,))

    with LongVideoEngine(config_of(folder)) as engine:
        latents = torch.randn(engine.spec.latent_shape(NATIVE, 64, 96), generator=torch.Generator().manual_seed(1))
        save_latents(file, latents, {})
        stop_run(engine, tmp_path / "state", given=both)
        made = engine.denoise(PROMPT, given=both, snapshot=tmp_path / "state")
        alone = engine.denoise(PROMPT, given=GivenFrames(extend=file))
    assert made.resumed_at == 2
    assert torch.equal(made.latents, on_one_rank(config_of(folder), given=both))
    assert made.given["extend"] == {"file": "a.safetensors", "start": 0, "stop": NATIVE}
    assert made.settings["given"]["trained"] == ["56", "extend"]
    assert torch.equal(made.latents[:, :, :3], latents)
    assert relative(made.latents[:, :, -1:], alone.latents[:, :, -1:]) > 1e-3


@pytest.mark.parametrize(("frames", "method"), [(NATIVE, "freespec"), (LONG, "direct")])
def test_a_video_is_continued_as_the_stock_pipeline_does(folder, monkeypatch, tmp_path, frames, method):
    """With the same clip as its condition at frame 0."""
    clip = np.random.default_rng(0).integers(0, 256, (9, 64, 96, 3), np.uint8)
    given = GivenFrames(extend=tmp_path / "a.safetensors")
    with LongVideoEngine(config_of(folder, frames=frames, method=method)) as engine:
        save_latents(given.extend, encode_frames(engine.adapter, engine.pipe.vae, clip), {})
        made = engine.denoise(PROMPT, given=given).latents
        [note] = check_given(given, engine.spec, num_frames=frames, height=64, width=96, fps=8)
        with monkeypatch.context() as patch:  # negative control: the rule of checkpoints without conditions
            patch.setattr(VideoSpec, "takes_prefix", False)
            other = engine.denoise(PROMPT, given=given).latents
    assert torch.equal(made, stock_latents(folder, frames, None, monkeypatch, clip=clip))
    assert torch.equal(other[:, :, :2], made[:, :, :2])
    assert relative(other, made) > 1e-3
    assert note == "a.safetensors is the condition of frames 0 to 8, which this checkpoint was trained for"


def test_two_pictures_at_one_frame_are_refused(folder, several):
    """Of one latent frame only where each picture has no tokens of its own."""
    third = several.images[3]
    twice, near = (GivenFrames(images=(third, GivenImage(where=where, path=third.path))) for where in ("2.5s", "21"))
    spec = open_checkpoint(ModelConfig(path=str(folder))).spec
    size = {"num_frames": LONG, "height": 64, "width": 96, "fps": 8}
    refused(
        lambda: check_given(twice, spec, **size), match=r"--given 20 and 2\.5s fall on one frame \(20\); leave one out"
    )
    assert len(check_given(near, spec, **size)) == 2
    untrained = replace(spec, pictures=())
    refused(lambda: check_given(near, untrained, **size), match="fall into one latent frame \\(frames 17 to 24\\)")
