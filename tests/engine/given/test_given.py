"""Given frames: reading, placement, that they stay unchanged, and that other frames follow them."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.adapters import VideoSpec, adapter_of
from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.files.latents import save_latents
from engine.given.frames import MAX_NOISE, GivenFrames, GivenImage, parse_given
from engine.given.image import read_image
from engine.given.known import Known, check_given, count_begun
from engine.media.read_video import read_video
from engine.media.write_video import open_video
from engine.ranks.layouts import Ranks
from freespec.methods import FreeSpec
from tests.engine.golden import mesh_of, relative
from tests.ranks import run_ranks
from tests.tiny_pipelines import random_ltx, random_wan, save_random_ltx, save_random_wan
from tiny.world import render, sample_scene

PROMPT = "a red circle"
SAVE = {"wan": save_random_wan, "ltx": save_random_ltx}
VIDEO = {"wan": (29, 32, 48), "ltx": (57, 64, 96)}  # 8 latent frames


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return {family: str(save(tmp_path_factory.mktemp(family))) for family, save in SAVE.items()}


def config_of(folder: str, family: str, method: str = "freespec") -> RunConfig:
    frames, height, width = VIDEO[family]
    return RunConfig(
        model=ModelConfig(path=folder, device="cpu"),
        video=VideoConfig(num_frames=frames, height=height, width=width, fps=8),
        sampler=SamplerConfig(num_steps=4, guidance_scale=4.0, seed=3, max_text_tokens=20),
        method=MethodConfig(name=method, window_frames=3, freespec=FreeSpec(domain="step", fused_share=0.5)),
        output=OutputConfig(progress="off"),
    )


@contextlib.contextmanager
def engine_of(config: RunConfig) -> Iterator[LongVideoEngine]:
    with contextlib.closing(LongVideoEngine(config)) as engine:
        yield engine


def picture(path: Path, height: int, width: int, *, seed: int = 0, mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def begun(path: Path, engine: LongVideoEngine, count: int) -> Tensor:
    """Latents of `count` frames in a file."""
    _, height, width = VIDEO["wan" if "Wan" in type(engine.pipe).__name__ else "ltx"]
    shape = engine.spec.latent_shape(engine.spec.num_frames(count), height, width)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    save_latents(path, latents, {})
    return latents


@pytest.mark.parametrize("family", SAVE)
@pytest.mark.parametrize("method", ["direct", "sliding_window", "freespec"])
def test_known_frames_keep_their_value_and_the_others_go_with_them(folders, tmp_path, family, method):
    with engine_of(config_of(folders[family], family, method)) as engine:
        file = tmp_path / "a.latents.safetensors"
        latents = begun(file, engine, 3)
        plain = engine.denoise(PROMPT)
        made = engine.denoise(PROMPT, given=GivenFrames(extend=file))
        again = engine.denoise(PROMPT)
    assert torch.equal(made.latents[:, :, :3], latents)
    assert relative(made.latents[:, :, 3:], plain.latents[:, :, 3:]) > 1e-3  # they attend to what is given
    assert torch.equal(again.latents, plain.latents)
    assert plain.given is None
    assert made.given["extend"] == {"file": file.name, "start": 0, "stop": engine.spec.num_frames(3)}


@pytest.mark.parametrize("most", [MAX_NOISE, 0.5])
def test_before_each_step_known_frames_have_its_noise_up_to_the_most(folders, tmp_path, most):
    seen: list[Tensor] = []
    config = config_of(folders["wan"], "wan")
    with engine_of(dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, flow_shift=1.0))) as engine:
        latents = begun(tmp_path / "a.safetensors", engine, 2)
        engine.pipe.transformer.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs["hidden_states"].clone()), with_kwargs=True
        )
        engine.denoise(PROMPT, given=GivenFrames(extend=tmp_path / "a.safetensors", max_noise=most))
        sigmas = engine.pipe.scheduler.sigmas.tolist()
        shape = engine.spec.latent_shape(*VIDEO["wan"])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    assert min(sigmas[:-1]) < most < max(sigmas)  # both cases
    for step, sigma in enumerate(sigmas[:-1]):
        level = min(sigma, most)
        expected = (1 - level) * latents + level * noise[:, :, :2]
        for latents_in in seen[2 * step : 2 * step + 2]:  # both passes
            torch.testing.assert_close(latents_in[:, :, :2], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", SAVE)
def test_pictures_are_encoded_where_they_stand(folders, tmp_path, family):
    """The first is one latent frame by itself; another is the second latent frame of a still."""
    frames, height, width = VIDEO[family]
    files = [picture(tmp_path / f"{seed}.png", height, width, seed=seed) for seed in range(3)]
    with engine_of(config_of(folders[family], family)) as engine:
        step = engine.spec.temporal_factor
        given = parse_given([f"last={files[2]}", f"first={files[0]}", f"{step * 3}={files[1]}"], None)
        made = engine.denoise(PROMPT, given=given)
        vae = engine.pipe.vae
        for file, latent in zip(files, (0, 3, 7), strict=True):
            pixels = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)[None, :, None] / 127.5 - 1
            with torch.no_grad():
                raw = vae.encode(pixels.repeat(1, 1, 1 if latent == 0 else 1 + step, 1, 1)).latent_dist.mode()
            if family == "wan":
                mean, std = (
                    torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std)
                )
                normal = (raw - mean) * (1 / std)
            else:
                mean, std = (x.view(1, -1, 1, 1, 1) for x in (vae.latents_mean, vae.latents_std))
                normal = (raw - mean) * vae.config.scaling_factor / std
            torch.testing.assert_close(made.latents[:, :, latent], normal[:, :, -1], rtol=1e-5, atol=1e-5)
    assert [image["start"] for image in made.given["images"]] == [frames - step, 0, 3 * step - step + 1]


@pytest.mark.parametrize("make", [random_wan, random_ltx])
def test_encoding_is_the_counterpart_of_decoding(make):
    pipe = make()
    adapter = adapter_of(pipe)
    mean, std = adapter.latent_statistics(pipe.vae)
    latents = torch.randn(1, mean.shape[1], 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = []
    pipe.vae.encode = lambda frames: seen.append(frames) or _Encoded(latents * std + mean)
    torch.testing.assert_close(adapter.encode(pipe.vae, torch.zeros(1, 3, 9, 32, 32)), latents, rtol=1e-5, atol=1e-5)
    assert seen[0].dtype == pipe.vae.dtype


class _Encoded:
    def __init__(self, latents: Tensor) -> None:
        self.latent_dist = self
        self.mode = lambda: latents


def test_a_picture_of_the_world_comes_back(tmp_path):
    """Embedded Wan: the first frame of the video is the picture that was given."""
    config = dataclasses.replace(
        config_of("tiny/wan", "wan"), video=VideoConfig(num_frames=33, height=64, width=64, fps=16)
    )
    scene = sample_scene(np.random.default_rng(0))
    pixels = np.asarray(render(dataclasses.replace(scene, shape="circle", colour="red", background="blue"), 1)[0])
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with engine_of(config) as engine:
        given = parse_given([f"first={tmp_path / 'a.png'}"], None)
        made = engine.denoise("a red circle moves right over a blue background", given=given)
        first = next(iter(engine.decode(made.latents)))[0]
        other = next(iter(engine.decode(engine.denoise("a red circle moves right over a blue background").latents)))[0]
    error, control = (np.abs(frame.astype(float) - pixels).mean() for frame in (first, other))
    assert error < 8.0
    assert control > 2 * error


def test_a_video_is_encoded_from_its_end(folders, tmp_path):
    """Seven frames hold one latent frame of one and one of four: the first two are left out."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 32, 48, 3), np.uint8)
    with open_video(tmp_path / "a.mp4", fps=8, height=32, width=48, crf=1) as video:
        video.write(pixels)
    given = parse_given([], str(tmp_path / "a.mp4"))
    with engine_of(config_of(folders["wan"], "wan")) as engine:
        made = engine.denoise(PROMPT, given=given)
        [note] = check_given(given, engine.spec, num_frames=29, height=32, width=48, fps=8)
        last = torch.from_numpy(np.stack(list(read_video(tmp_path / "a.mp4")))[-5:]).permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            expected = engine.adapter.encode(engine.pipe.vae, 2.0 * (last.float() / 255.0) - 1.0)
    assert torch.equal(made.latents[:, :, :2], expected)
    assert note == "of a.mp4 the first 2 of 7 frames are left out, which fill no latent frame"
    assert made.given["extend"] == {"file": "a.mp4", "start": 0, "stop": 5}


def latents_on_ranks(rank: int, case: tuple[str, str, str, tuple[int, int, int]]) -> Tensor:
    folder, family, file, degrees = case
    made = LongVideoEngine(config_of(folder, family), Ranks(mesh=mesh_of(degrees)))
    try:
        return made.denoise(PROMPT, given=given_of(file)).latents
    finally:
        made.close()


def given_of(file: str) -> GivenFrames:
    return parse_given([f"last={Path(file).parent / 'last.png'}"], file)


@pytest.mark.parametrize("family", SAVE)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_make_the_same_video(folders, tmp_path, family, ranks):
    file = tmp_path / "a.safetensors"
    with engine_of(config_of(folders[family], family)) as engine:
        begun(file, engine, 3)
        picture(tmp_path / "last.png", *VIDEO[family][1:])
        expected = engine.denoise(PROMPT, given=given_of(str(file))).latents
        plain = engine.denoise(PROMPT).latents
    layouts = [(1, ranks, 1), (1, 1, ranks)] + ([(2, 1, 1)] if ranks == 2 else [])
    cases = [(folders[family], family, str(file), degrees) for degrees in layouts]
    for case, by_rank in zip(cases, run_ranks(ranks, latents_on_ranks, cases, tmp_path), strict=True):
        assert all(torch.equal(latents, by_rank[0]) for latents in by_rank), case
        assert relative(by_rank[0], expected) < 1e-4, case
    assert relative(plain, expected) > 1e-2  # negative control


def test_an_interrupted_run_goes_on_to_the_same_video(folders, tmp_path):
    class Stop(Exception):  # noqa: N818 - how the first run ends
        pass

    def stop(finished: int, total: int) -> None:
        if finished == 2:
            raise Stop

    with engine_of(config_of(folders["wan"], "wan")) as engine:
        file = tmp_path / "a.safetensors"
        begun(file, engine, 3)
        given = GivenFrames(extend=file)
        expected = engine.denoise(PROMPT, given=given).latents
        with pytest.raises(Stop):
            engine.denoise(PROMPT, given=given, snapshot=tmp_path / "run", on_step=stop)
        with pytest.raises(UserError, match="belongs to another run"):
            engine.denoise(PROMPT, snapshot=tmp_path / "run")
        made = engine.denoise(PROMPT, given=given, snapshot=tmp_path / "run")
    assert made.resumed_at == 2
    assert torch.equal(made.latents, expected)


def test_put_keeps_all_other_frames() -> None:
    known = Known(latents=torch.full((1, 1, 2, 1, 1), 5.0), frames=torch.tensor([0, 3])).with_noise(
        torch.ones(1, 1, 4, 1, 1), torch.device("cpu")
    )
    latents = torch.arange(4.0).view(1, 1, 4, 1, 1)
    assert known.put(latents, 0.0).flatten().tolist() == [5.0, 1.0, 2.0, 5.0]
    assert known.put(latents, 0.25).flatten().tolist() == [4.0, 1.0, 2.0, 4.0]
    assert torch.equal(known.put(latents, 0.9), known.put(latents, MAX_NOISE))
    assert latents.flatten().tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("where", "frame"), [("first", 0.0), ("last", 28.0), ("2.5s", 20.0), ("12", 12.0), ("0s", 0.0)]
)
def test_where_a_picture_stands(where, frame):
    assert GivenImage(where=where, path=Path("a.png")).frame(29, 8) == frame


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cat.png"], "'cat.png' is not WHERE=FILE"),
        (["middle=cat.png"], "'middle=cat.png' is not WHERE=FILE"),
        (["first="], "'first=' is not WHERE=FILE"),
        (["-1s=cat.png"], "is not WHERE=FILE"),
        (["1e9s=cat.png"], "is not WHERE=FILE"),
    ],
)
def test_invalid_place_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse_given(words, None)


def test_pictures_are_turned_resized_and_cropped(tmp_path):
    pixels = np.zeros((40, 20, 3), np.uint8)
    pixels[:20] = (255, 0, 0)  # the upper half
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # turn right: the upper half comes to the right
    image.save(tmp_path / "a.png", exif=exif)
    read = read_image(tmp_path / "a.png", 20, 40)
    assert read.shape == (20, 40, 3)
    assert read[:, 24:].min(axis=(0, 1))[0] > 200
    assert read[:, :16].max() < 50
    assert read_image(tmp_path / "a.png", 16, 16).shape == (16, 16, 3)


def test_pictures_that_cannot_be_used_are_refused(tmp_path):
    def refused(path: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            read_image(path, 32, 48)

    (tmp_path / "text.png").write_text("no picture")
    refused(tmp_path / "text.png", "cannot read the picture .*text.png")
    refused(tmp_path / "gone.png", "cannot read the picture .*gone.png: No such file")
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 100))
    clear.save(tmp_path / "clear.png")
    refused(tmp_path / "clear.png", "has transparent pixels")
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    refused(tmp_path / "deep.png", "has the colours I;16")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    refused(tmp_path / "two.gif", "has 2 frames")
    cut = picture(tmp_path / "cut.png", 64, 64)
    cut.write_bytes(cut.read_bytes()[:2000])
    refused(cut, "cannot read the picture")


def test_what_does_not_fit_the_video_is_refused(folders, tmp_path, monkeypatch):
    picture(tmp_path / "a.png", 32, 48)
    with engine_of(config_of(folders["wan"], "wan")) as engine:

        def refused(message: str, words: list[str], extend: Path | None = None) -> None:
            given = parse_given(words, None if extend is None else str(extend))
            with pytest.raises(UserError, match=message):
                check_given(given, engine.spec, num_frames=29, height=32, width=48, fps=8)
            with pytest.raises(UserError, match=message):
                engine.denoise(PROMPT, given=given)

        refused("beyond the video, whose last frame is 28", [f"29={tmp_path / 'a.png'}"])
        refused(r"beyond the video, whose last frame is 3\.5s", [f"3.6s={tmp_path / 'a.png'}"])
        refused("fall into one latent frame", [f"last={tmp_path / 'a.png'}", f"27={tmp_path / 'a.png'}"])
        refused("it is not a file", [], tmp_path / "gone.mp4")
        file = tmp_path / "a.safetensors"
        begun(file, engine, 8)
        refused("has 29 frames, and video.num_frames, which counts them, is 29; ask for more", [], file)
        begun(file, engine, 3)
        refused("lies in the frames of --extend", [f"first={tmp_path / 'a.png'}"], file)
        for shape in ((1, 3, 2, 4, 6), (24,), (engine.spec.channels, 2, 4, 6)):
            save_latents(file, torch.zeros(shape), {})
            refused("holds latents of shape", [], file)
            with pytest.raises(UserError, match="holds latents of shape"):
                count_begun(file, engine.spec)
        save_latents(file, torch.full_like(begun(tmp_path / "b", engine, 3), torch.nan), {})
        refused("not finite", [], file)
        with open_video(tmp_path / "b.mp4", fps=8, height=16, width=16, crf=20) as video:
            video.write(np.zeros((5, 16, 16, 3), np.uint8))
        refused("is 16 x 16 pixels, and the video is 32 x 48", [], tmp_path / "b.mp4")
        file.write_bytes(b"junk")
        refused("is not a whole safetensors file", [], file)
        (tmp_path / "c.mp4").write_bytes(b"junk")
        refused("cannot be read as a video", [], tmp_path / "c.mp4")
        (tmp_path / "d.mp4").mkdir()
        refused("it is not a file", [], tmp_path / "d.mp4")
        with open_video(tmp_path / "e.mp4", fps=24, height=32, width=48, crf=20) as video:
            video.write(np.zeros((5, 32, 48, 3), np.uint8))
        refused("has 24 frames a second, and video.fps is 8", [], tmp_path / "e.mp4")
        monkeypatch.setattr(type(engine.adapter), "encode", lambda *_: pytest.fail("it was encoded"))
        with open_video(tmp_path / "f.mp4", fps=8, height=32, width=48, crf=20) as video:
            video.write(np.zeros((30, 32, 48, 3), np.uint8))
        refused("has 29 frames, and video.num_frames, which counts them, is 29; ask for more", [], tmp_path / "f.mp4")


@pytest.mark.parametrize(
    ("pictures", "needs", "places", "message"),
    [
        (
            (),
            (),
            ["first"],
            "fill the whole video of 1 frame, and none is left to make; set video.num_frames to 5 or more",
        ),
        (("first",), (), ["first"], "fill the whole video of 1 frame"),
        (("first",), (), ["last"], "fill the whole video of 1 frame"),
        (("first",), ("first",), ["first"], None),  # seen as channels, and denoised
        (
            ("first", "last"),
            ("first", "last"),
            ["first", "last"],
            "between two pictures, which one frame cannot have; set video.num_frames to 5",
        ),
        ((), (), ["1"], "beyond the video, whose last frame is 0"),
    ],
)
def test_a_video_of_one_frame(pictures, needs, places, message, tmp_path):
    picture(tmp_path / "a.png", 32, 48)
    given = parse_given([f"{place}={tmp_path / 'a.png'}" for place in places], None)
    numbers = {"channels": 4, "temporal_factor": 4, "spatial_factor": 4, "patch": (1, 2, 2), "pipeline_multiple": 16}
    spec = VideoSpec(**numbers, pictures=pictures, needs=needs)
    with contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_given(given, spec, num_frames=1, height=32, width=48, fps=8)


def test_pictures_that_fill_every_latent_frame_are_refused(folders, tmp_path):
    picture(tmp_path / "a.png", 32, 48)
    given = parse_given([f"{place}={tmp_path / 'a.png'}" for place in ("first", "last")], None)
    with engine_of(config_of(folders["wan"], "wan")) as engine:
        with pytest.raises(UserError, match=r"fill the whole video of 5 frames, .* set video.num_frames to 9 or more"):
            engine.denoise(PROMPT, given=given, num_frames=5)
