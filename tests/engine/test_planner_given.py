"""What the planner counts of pictures that a checkpoint was trained for, and of step caches, against what a small real run holds."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import StateManager
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.adapters.ltx_published import PUBLISHED
from engine.batch.forecast import gpu_hours
from engine.batch.variants import Variant
from engine.config import DecodeConfig, MethodConfig, ModelConfig, ParallelConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.files.latents import save_latents
from engine.given.frames import GivenFrames, Places, parse_given
from engine.given.known import check_given
from engine.hooks.apply import apply_method
from engine.media.write_video import write_video
from engine.planner.arrange import arrange_ranks
from engine.planner.cached import SCHEDULED
from engine.planner.choose import _shorter, _smaller, describe_changes
from engine.planner.cpu import denoising_operations
from engine.planner.flops import call_operations
from engine.planner.forward import count_forward
from engine.planner.gpu import GpuSpec, read_gpu
from engine.planner.layout import Layout, lay_out
from engine.planner.memory import GIB, cache_bytes, denoise_peak
from engine.planner.model import ModelSpec, read_model
from engine.planner.plan import Case, Options
from engine.presets import read_preset
from freespec.methods import Mode
from launch.arguments.plan import read
from launch.commands.plan import run
from tests.engine.hooks.test_step_cache import CACHES, PROMPT, config_of
from tests.engine.test_planner import profiled_peak
from tests.tiny_pipelines import random_i2v, random_ltx, random_ti2v, random_wan22, save_random_ltx, save_random_wan

NAME = "Lightricks/LTX-Video-0.9.7-dev"
ROOT = Path(__file__).parents[2]
LTX, I2V = (str(ROOT / "configs" / f"{name}.yaml") for name in ("ltx-video-13b-0.9.7-dev", "wan2.1-i2v-14b-480p"))
TWO = Places(first=True, moments=(20, 56))
SAMPLER = SamplerConfig(num_steps=40, guidance_scale=3.0, max_text_tokens=128)
CPU = torch.device("cpu")
WITH_PICTURES = {"i2v": "i2v", "flf2v": "flf2v", "i2v a14b": "a14b"}


def layout_of(spec: ModelSpec, video: VideoConfig, given: Places, **more: Any) -> Layout:
    method = MethodConfig(window_frames=more.pop("window", 16))
    return lay_out(spec, (1, 1, 1), video, SAMPLER, method, local_route="auto", given=given, **more)


@pytest.fixture(scope="module")
def ltx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint that was trained with conditions."""
    made = tmp_path_factory.mktemp("conditions")
    random_ltx(dynamic_shift=False, shift_terminal=None, heads=8, head_dim=16).save_pretrained(made)
    index = json.loads((made / "model_index.json").read_text())
    (made / "model_index.json").write_text(json.dumps(index | {"_class_name": "LTXConditionPipeline"}))
    return made


def inputs_with_pictures(layout: Layout, *, tokens_apart: bool) -> dict[str, Any]:
    """Arguments of a forward of both passes: a timestep of each token, or one of each pass."""
    config, batch = layout.spec.configs["transformer"], layout.batch
    return {
        "hidden_states": torch.empty(batch, layout.tokens, config["in_channels"]),
        "encoder_hidden_states": torch.empty(batch, layout.text, config["caption_channels"]),
        "timestep": torch.full((batch, layout.tokens) if tokens_apart else (batch,), 500.0),
        "encoder_attention_mask": torch.empty(batch, layout.text),
        "num_frames": layout.frames,
        "height": layout.rows,
        "width": layout.columns,
        "video_coords": torch.empty(1, 3, layout.tokens),
        "return_dict": False,
    }


def test_operations_with_pictures_are_exactly_what_torch_counts() -> None:
    spec = ModelSpec(name=NAME, source="test", configs=PUBLISHED[NAME])
    layout = layout_of(spec, VideoConfig(num_frames=57, height=128, width=128, fps=30), TWO, itemsize=2)
    assert (layout.frames, layout.video_frames, layout.tokens) == (10, 8, 160)
    with torch.device("meta"):
        model = LTXVideoTransformer3DModel.from_config(spec.configs["transformer"]).eval()
        inputs = inputs_with_pictures(layout, tokens_apart=True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    counted = counter.get_total_flops()
    assert sum(call_operations(layout, "global").values()) == counted
    # Negative controls: without one of the pictures, and with one timestep of all tokens.
    for given, fewer in ((replace(TWO, moments=(20,)), 9), (Places(), 10)):
        other = replace(layout, given=given, frames=fewer)
        assert sum(call_operations(other, "global").values()) < counted


@pytest.mark.parametrize(("name", "width"), [(NAME, 4096), ("Lightricks/LTX-Video", 2048)])
def test_the_modulation_of_each_token_is_counted(name: str, width: int) -> None:
    """By the formula: for both passes 6 numbers of each token and channel, as the embedding makes them and as a block adds its own."""
    spec = ModelSpec(name=name, source="test", configs=PUBLISHED[name])
    video = VideoConfig(num_frames=481, height=512, width=768)
    with_first, without = (
        count_forward(layout_of(spec, video, given, itemsize=2)) for given in (Places(first=True), Places())
    )
    modulation = 2 * 61 * 384 * 6 * width * 2
    assert with_first.at_attention - without.at_attention == pytest.approx(2 * modulation, rel=0.15)


@pytest.mark.parametrize("given", [Places(first=True), TWO], ids=["first", "three"])
def test_peak_of_a_forward_with_pictures_is_within_15_percent_of_what_the_allocator_gave_out(
    ltx: Path, given: Places
) -> None:
    spec = read_model(ModelConfig(path=str(ltx)))
    layout = layout_of(spec, VideoConfig(num_frames=121, height=192, width=192), given, itemsize=4)
    assert layout.frames == 16 + len(given.moments)
    pipe = random_ltx(dynamic_shift=False, shift_terminal=None, heads=8, head_dim=16)
    inputs = inputs_with_pictures(layout, tokens_apart=given.first)
    inputs = {name: torch.rand_like(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    measured = profiled_peak(lambda: pipe.transformer(**inputs))
    parts = denoise_peak(layout, "global")
    assert parts["activations"] + parts["kv_copies"] == pytest.approx(measured, rel=0.15)


WAN = {
    "a14b": partial(random_wan22, heads=8, head_dim=16),
    "5b": partial(random_ti2v, heads=8, head_dim=16),
    **{kind: partial(random_i2v, name, heads=8, head_dim=16) for kind, name in WITH_PICTURES.items()},
}


@pytest.mark.parametrize("kind", WAN)
@pytest.mark.parametrize(("mode", "method"), [("global", "direct"), ("dual", "freespec")])
def test_peaks_of_the_other_models_of_wan_are_within_15_percent(
    kind: str, mode: Mode, method: str, tmp_path: Path
) -> None:
    """Two transformers, a timestep of each token, channels and CLIP tokens of pictures: weights, and a forward of 31 latent frames."""
    pipe = WAN[kind]()
    pipe.save_pretrained(tmp_path)
    spec, side = read_model(ModelConfig(path=str(tmp_path))), 192 if kind == "5b" else 96
    config, pictures = pipe.transformer.config, {"i2v": 1, "flf2v": 2}.get(kind, 0)
    video, sampler = VideoConfig(num_frames=121, height=side, width=side), SamplerConfig(max_text_tokens=512)
    settings, given = MethodConfig(name=method, window_frames=9), Places(first=kind == "5b")
    layout = lay_out(spec, (1, 1, 1), video, sampler, settings, itemsize=4, local_route="auto", given=given)
    latents = torch.randn(1, config.in_channels, layout.frames, 24, 24)
    text = torch.randn(1, layout.text - spec.image_tokens, config.text_dim)
    tokens = torch.randn(pictures, 5, config.image_dim) if pictures else None
    with apply_method(pipe, method=method, window_frames=9):
        pipe.scheduler.set_timesteps(4)
        pipe.scheduler.set_begin_index(0)
        timestep = pipe.scheduler.timesteps[:1]
        timestep = timestep.expand(1, layout.tokens) if kind == "5b" else timestep
        call = (latents, timestep, text, tokens)
        measured = profiled_peak(lambda: pipe.transformer(*call, return_dict=False))
    parts = denoise_peak(layout, mode)
    assert parts["activations"] + parts["kv_copies"] == pytest.approx(measured, rel=0.15)
    if kind == "5b":  # negative control: one timestep of all tokens
        index = {**spec.configs["model_index"], "expand_timesteps": False}
        other = replace(layout, spec=replace(spec, configs={**spec.configs, "model_index": index}), given=Places())
        assert sum(denoise_peak(other, mode).values()) < 0.85 * measured


@pytest.mark.parametrize("kind", WAN)
def test_weights_of_the_other_models_of_wan_are_within_15_percent(kind: str, tmp_path: Path) -> None:
    """Of two transformers both while the idle one stays, and one while it leaves."""
    WAN[kind]().save_pretrained(tmp_path)
    config = config_with(tmp_path)
    sampler = replace(config.sampler, max_text_tokens=512)
    config = replace(config, model=replace(config.model, dtype="float32"), sampler=sampler)
    case = Case.of(config, read_model(config.model), gpu=read_gpu("h200"), world_size=1)
    with LongVideoEngine(config) as engine:
        resident = engine.facts.model["resident_bytes"]
    planned = case.memory((1, 1, 1), ["global"])[0]
    assert case.placed((1, 1, 1), ["global"]).idle_expert == ("stay" if "transformer_2" in resident else None)
    kept = sum(num_bytes for part, num_bytes in resident.items() if part != "text_encoder")
    assert planned["weights"] == pytest.approx(kept, rel=0.15)
    assert planned["text_encoder"] == pytest.approx(resident["text_encoder"], rel=0.15)
    if "transformer_2" in resident:
        leaves = replace(case, options=replace(case.options, idle_expert="leave"))
        assert leaves.memory((1, 1, 1), ["global"])[0]["weights"] == pytest.approx(
            kept - resident["transformer"], rel=0.15
        )


def kept_by_caches(engine: LongVideoEngine) -> int:
    """Bytes of the tensors that diffusers' caches hold, each storage once."""
    found = {}
    for module in engine.pipe.transformer.modules():
        registry: HookRegistry | None = getattr(module, "_diffusers_hook", None)
        hooks = () if registry is None else registry.hooks.values()
        for manager in (x for hook in hooks for x in vars(hook).values() if isinstance(x, StateManager)):
            for state in manager._state_cache.values():
                found |= {id(x.untyped_storage()): x.untyped_storage().nbytes() for x in tensors_in(vars(state))}
    return sum(found.values())


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, dict | tuple | list):
        return [x for part in (value.values() if isinstance(value, dict) else value) for x in tensors_in(part)]
    return [value] if isinstance(value, Tensor) and value.dim() else []


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("save", [save_random_wan, save_random_ltx], ids=["wan", "ltx"])
def test_a_step_cache_keeps_as_many_bytes_as_are_planned(save: Any, cache: str, tmp_path: Path) -> None:
    config = config_of(str(save(tmp_path / save.__name__.rpartition("_")[2])), cache)
    kept: list[int] = []
    with LongVideoEngine(config) as engine:
        steps = engine.denoise(PROMPT, on_step=lambda *_: kept.append(kept_by_caches(engine))).steps
    case = Case.of(config, read_model(config.model), gpu=read_gpu("h200"), world_size=1)
    counts = [case.count_steps(computed=computed)["freespec"] for computed in (False, True)]
    assert counts[0] == Counter(row["mode"] for row in steps)
    if cache in SCHEDULED:  # and some are skipped
        assert counts[1] == Counter(row["mode"] for row in steps if not row["cached"]) != counts[0]
    layout = replace(case.layout((1, 1, 1)), itemsize=4)
    assert max(kept) == cache_bytes(layout) == denoise_peak(layout, "dual")["step_cache"]
    assert kept[2] == kept[8]  # in either mode of the method
    one = replace(layout, passes=1)
    assert cache_bytes(one) == cache_bytes(layout) // 2  # negative control: without guidance
    assert "step_cache" not in denoise_peak(replace(layout, cache="none"), "dual")


def test_each_rank_keeps_its_tokens_and_passes() -> None:
    spec = ModelSpec(name=NAME, source="test", configs=PUBLISHED[NAME])
    video, method = VideoConfig(num_frames=121, height=512, width=768), MethodConfig(window_frames=16)
    sampler = replace(SAMPLER, cache="first_block")
    kept = [
        cache_bytes(lay_out(spec, degrees, video, sampler, method, itemsize=2, local_route="auto"))
        for degrees in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 1, 2))
    ]
    assert kept[0] == 2 * 3 * 16 * 384 * 4096 * 2
    assert kept == [kept[0], kept[0] // 2, kept[0] // 2, kept[0] // 4]


def test_a_change_that_is_advised_is_one_that_a_cache_or_compiling_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights that these exclude, each of which would fit; the embedded model on two GPUs."""
    for name in ("_shorter", "_smaller"):  # which take seconds to search
        monkeypatch.setattr(f"engine.planner.choose.{name}", lambda _case: [])
    config = read_preset("tiny-wan")
    sampler = replace(config.sampler, cache="first_block", cache_threshold=0.1)
    case = Case.of(config, read_model(config.model), gpu=read_gpu("h200"), world_size=2)
    case = replace(case, video=replace(case.video, num_frames=257))
    peak = min(case.memory(degrees, case.modes)[1] for degrees in case.support.possible(2))

    def advised(each: SamplerConfig, spare: int, **options: Any) -> str:
        small = replace(case.gpu, memory_gib=2 + (peak + spare) / GIB, reserved_gib=2)
        changed = replace(case, sampler=each, gpu=small, options=replace(case.options, **options))
        return describe_changes(changed, (None, None, None))

    with_compile = replace(config, model=replace(config.model, compile=True))
    with_cache, without = advised(sampler, 10_000), advised(config.sampler, -10_000)
    assert "sampler.cache none" in with_cache
    assert not any(weights in with_cache for weights in ("zero3", "block_offload"))
    compiled = advised(config.sampler, -10_000, compile=Options.of(with_compile).compile)
    assert "GPUs" in compiled
    assert not any(words in compiled for words in ("zero3", "block_offload", "storage"))
    assert "block_offload" in without  # negative control
    assert "storage fp8" in without
    assert "sampler.cache" not in without


def test_plan_shows_pictures_and_caches(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--given", "first=a.png", "--given", "last=b.png", "--sampler.cache", "first_block", "--json", "true"]
    run(read([f"--config={LTX}", *words]))
    shown = json.loads(capsys.readouterr().out)["plans"][0]
    assert shown["tokens"] == [62 * 384]
    assert shown["memory"]["step_cache"] == 2 * 3 * 62 * 384 * 4096 * 2
    run(read([f"--config={LTX}", "--json", "true"]))
    alone = json.loads(capsys.readouterr().out)["plans"][0]
    assert shown["memory"]["activations"] - alone["memory"]["activations"] > 4e9
    assert alone["tokens"] == [61 * 384]
    assert "step_cache" not in alone["memory"]
    run(read([f"--config={LTX}", *words[:6]]))
    text = capsys.readouterr().out
    assert "61 latent frames and 1 picture beside them of 384 tokens = 23808 tokens" in text
    assert (
        "sampler.cache first_block: its memory is counted (step cache); the time that it saves is not predicted" in text
    )
    with pytest.raises(UserError, match=r"--given 90s=.* is beyond the video"):
        run(read([f"--config={LTX}", "--given", "90s=a.png"]))


def test_plan_counts_the_steps_that_a_schedule_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By sampler.cache_interval 5 of the steps of each mode the first three and then each fifth; and a picture that nobody gave is counted."""
    random_i2v().save_pretrained(tmp_path)
    size = "--video.num_frames 29 --video.height 32 --video.width 48 --method.window_frames 3"
    words = [f"--config={I2V}", f"--model.path={tmp_path}", *size.split(), "--sampler.cache", "taylorseer"]
    run(read(words))
    text = capsys.readouterr().out
    assert "its schedule decides which steps are computed, and a skipped one is counted as no time" in text
    assert "given: this checkpoint needs --given first=FILE, counted as if it were given" in text
    run(read([*words, "--json", "true"]))
    tree = json.loads(capsys.readouterr().out)
    assert tree["notes"] == ["given: this checkpoint needs --given first=FILE, counted as if it were given"]
    [only] = tree["plans"]
    steps, computed = (only[name]["freespec"] for name in ("steps", "computed"))
    for mode, count in steps.items():
        assert computed[mode] == min(3, count) + len(range(4, count, 5)) < count
        assert f"{computed[mode]} of {count} {mode}" in text
    seconds = {mode: sum(parts.values()) for mode, parts in only["step_seconds"].items()}
    assert only["run_seconds"]["freespec"] == pytest.approx(sum(computed[mode] * seconds[mode] for mode in steps))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A video of 18 frames, whose last 17 fill 3 latent frames, and latents of as many."""
    files = {suffix: tmp_path_factory.mktemp("clip") / f"clip.{suffix}" for suffix in ("mp4", "safetensors")}
    frames = np.random.default_rng(0).integers(0, 256, (18, 32, 32, 3), np.uint8)
    write_video(files["mp4"], frames, fps=8)
    save_latents(files["safetensors"], torch.zeros(1, 4, 3, 2, 2), {})
    return files


@pytest.mark.parametrize("suffix", ["mp4", "safetensors"])
def test_a_video_to_continue_is_counted_where_its_file_is(
    ltx: Path, clip: dict[str, Path], suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(frames: int, extend: Path, *words: str) -> str:
        size = f"--video.num_frames {frames} --video.height 32 --video.width 32 --video.fps 8 --method.window_frames 3"
        run(read([f"--model.path={ltx}", *size.split(), "--extend", str(extend), *words]))
        return capsys.readouterr().out

    assert f"given: --extend {clip[suffix]} fills 3 of 8 latent frames, 17 of 57 frames" in shown(57, clip[suffix])
    left_out = "given: of clip.mp4 the first 1 of 18 frames are left out, which fill no latent frame"
    assert (left_out in shown(57, clip[suffix])) == (suffix == "mp4")
    with pytest.raises(
        UserError, match=r"has 17 frames, and video\.num_frames, which counts them, is 17; ask for more"
    ):
        shown(17, clip[suffix])
    with pytest.raises(UserError, match=r"--given 1s=a\.png lies in the frames of --extend"):
        shown(57, clip[suffix], "--given", "1s=a.png")
    elsewhere = clip[suffix].with_name(f"none.{suffix}")  # negative control
    assert f"--extend {elsewhere} is not here, so its size and length are not checked" in shown(17, elsewhere)
    assert "picture beside them" in shown(57, elsewhere, "--given", "1s=a.png")


@pytest.mark.parametrize(
    ("preset", "words", "line"),
    [
        (LTX, "--given 20=a.png --given 20=b.png", "--given 20 and 20 fall on one frame"),
        (LTX, "--given first=a.png --given 0=b.png", "--given first and 0 fall on one frame"),
        (LTX, "--extend x.mp4 --given first=a.png", "--given first=a.png lies in the frames of --extend x.mp4"),
        (
            I2V,
            "--extend x.mp4",
            "--extend x.mp4 is refused: this checkpoint makes videos of pictures and cannot continue one",
        ),
        (I2V, "--given last=a.png", "no picture is given for the first frame"),
        (
            I2V,
            "--extend x.mp4 --given first=a.png",
            "--extend x.mp4 is refused: this checkpoint makes videos of pictures",
        ),
        (I2V, "--extend x.mp4 --decode.tile_width 250", "--extend x.mp4 is refused: this checkpoint"),
        (LTX, "--given 20=a.png --given 21=b.png --video.num_frames 41", None),
        (I2V, "--given first=a.png", None),
        (I2V, "", None),  # the pictures that it needs are counted
    ],
)
def test_what_a_run_refuses_is_not_planned(
    preset: str, words: str, line: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is opened."""
    monkeypatch.setattr("launch.commands.plan.plan", mock.Mock(side_effect=InterruptedError("planned")))
    with pytest.raises(InterruptedError if line is None else UserError, match=line or "planned"):
        run(read([f"--config={preset}", *words.split()]))


def test_a_video_to_continue_is_refused_before_the_memory_of_ranks() -> None:
    """Two of these GPUs would be too few."""
    asked = read([f"--config={I2V}", "--extend=x.mp4"])
    with pytest.raises(UserError, match=r"^--extend x\.mp4 is refused"):
        arrange_ranks(asked.config, 2, torch.device("cpu"), read_gpu("rtx4090"), given=asked.given)


@pytest.mark.parametrize(
    ("words", "shortest", "without"),
    [
        ([], 9, 9),
        (["first=a.png"], 9, 9),
        (["last=a.png"], 9, 9),
        (["20=a.png"], 25, 25),
        (["2.05s=a.png"], 25, 25),  # frame 16.4, which a video of 17 frames has not
        (["first=a.png", "last=b.png"], 9, 17),  # as a condition the last picture fills no latent frame
        (["first=a.png", "8=b.png"], 9, 17),
        (["20=a.png", "last=b.png"], 25, 33),
        (["40=a.png", "20=b.png"], 41, 41),
    ],
)
def test_a_shorter_video_that_is_advised_has_the_given_frames(
    ltx: Path, words: list[str], shortest: int, without: int
) -> None:
    """`without`: of a checkpoint that was not trained for pictures."""
    config, spec = config_with(ltx), read_model(ModelConfig(path=str(ltx)))
    config = replace(config, method=replace(config.method, window_frames=2))
    plain = replace(spec, configs=spec.configs | {"model_index": {"_class_name": "LTXPipeline"}})
    for of, fewest in ((spec, shortest), (plain, without)):
        case = Case.of(config, of, gpu=read_gpu("h200"), world_size=1, given=parse_given(words, None))
        assert [video.num_frames for video in _shorter(case)] == list(range(fewest, 57, 8))


@pytest.mark.parametrize(("name", "clip_frames", "suffix"), [("wan", 161, "mp4"), ("ltx", 17, "safetensors")])
def test_a_shorter_video_is_longer_than_the_clip_it_continues(
    name: str, clip_frames: int, suffix: str, tmp_path: Path
) -> None:
    """`generate.py`, `batch.py` and `plan.py` advise the same; short videos of Wan need most memory in the decoder, whatever their length."""
    video = VideoConfig(num_frames=2 * clip_frames - 1, height=64, width=64, fps=8)
    config = RunConfig(
        model=ModelConfig(path=str(ROOT / "tiny" / name), device="cpu"),
        video=video,
        method=MethodConfig(name="direct", window_frames=2),
        decode=DecodeConfig(mode="whole"),
    )
    spec, path = read_model(config.model), tmp_path / f"clip.{suffix}"
    if suffix == "mp4":  # one frame more than fills latent frames
        write_video(path, np.zeros((clip_frames + 1, 64, 64, 3), np.uint8), fps=8)
    else:
        save_latents(path, torch.zeros(spec.video.latent_shape(clip_frames, 64, 64)), {})
    clip, elsewhere = parse_given([], str(path)), parse_given([], str(tmp_path / "none.mp4"))
    fewest = clip_frames + spec.video.temporal_factor

    def gpu_for(frames: int, given: GivenFrames | None) -> GpuSpec:
        """One whose memory is just enough for so many frames."""
        case = Case.of(config, spec, gpu=read_gpu("h200"), world_size=1, given=given)
        peak = replace(case, video=replace(video, num_frames=frames)).memory((1, 1, 1), case.modes)[1]
        return replace(case.gpu, memory_gib=(peak + 1) / GIB, reserved_gib=0)

    def advised(ask: Callable[[], Any]) -> list[int]:
        with pytest.raises(UserError, match=r"does not fit: .* the smallest change") as refused:
            ask()
        return [int(frames) for frames in re.findall(r"video\.num_frames (\d+)", str(refused.value))]

    def made(frames: int, given: GivenFrames | None) -> list[int]:
        gpu = gpu_for(frames, given)
        return advised(lambda: arrange_ranks(config, 1, CPU, gpu, given=given))

    assert made(fewest, clip) == [fewest]
    assert made(clip_frames, elsewhere) == [clip_frames]  # negative control
    gpu, variant, item = gpu_for(clip_frames, clip), Variant(label="direct", config=config), mock.Mock(variant="direct")
    asked = replace(read(["--gpus=1", "--gpu=h200"]), config=config, gpu=gpu, given=clip)
    with mock.patch("engine.batch.forecast.read_gpu", return_value=gpu):
        batch = advised(lambda: gpu_hours(config, [variant], [item], gpu="h200", ranks=1, given=clip))
    assert advised(lambda: run(asked)) == batch == made(clip_frames, clip)
    assert clip_frames not in batch
    size = {"height": 64, "width": 64, "fps": 8}
    with pytest.raises(UserError, match=rf"has {clip_frames} frames, and video\.num_frames, which counts them, is"):
        check_given(clip, spec.video, num_frames=clip_frames, **size)
    check_given(clip, spec.video, num_frames=fewest, **size)


def config_with(ltx: Path, **parallel: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(ltx), device="cpu"),
        video=VideoConfig(num_frames=57, height=32, width=32, fps=8),
        sampler=replace(SAMPLER, guidance_scale=1.0),
        method=MethodConfig(name="direct", window_frames=3),
        parallel=ParallelConfig(**parallel),
    )


def test_ranks_of_even_shares_are_refused_before_they_join(ltx: Path) -> None:
    """Frames of 4 tokens: over 3 ranks 9 frames are even, and neither 8 nor 10."""
    none, one, two = (
        parse_given([f"{where}=none.png" for where in wheres], None) for wheres in ((), ("last",), ("last", "20"))
    )
    config = config_with(ltx, provider="deepspeed")
    with mock.patch("engine.planner.arrange.check_deepspeed"):  # whether the package is here is another question
        assert arrange_ranks(config, 3, CPU, given=one).plan.tokens == 36
        line = (
            r"parallel\.provider deepspeed: .* takes even shares only, and 40 tokens over 3 ranks are not: \[13, 13, 14\]; the tokens of "
            r"pictures at later frames than the first \(2\) count too; it can have no arrangement of 3 ranks: use parallel\.provider torch, "
        )
        with pytest.raises(UserError, match=line):
            arrange_ranks(config, 3, CPU, given=two)
        with pytest.raises(UserError, match=r"and 32 tokens over 3 ranks are not: [^;]*; it can have no arrangement"):
            arrange_ranks(config, 3, CPU, given=none)
    plans = [arrange_ranks(config_with(ltx), 3, CPU, given=pictures).plan.tokens for pictures in (none, one, two)]
    assert plans == [32, 36, 40]


def test_a_video_to_continue_is_planned_with_a_timestep_of_each_token(ltx: Path) -> None:
    spec, video = read_model(ModelConfig(path=str(ltx))), VideoConfig(num_frames=57, height=32, width=32)
    continued = parse_given([], "none.mp4")
    assert spec.places(continued, video) == Places(first=True)
    assert spec.places(parse_given(["first=none.png"], None), video) == Places(first=True)
    text = replace(spec, configs=spec.configs | {"model_index": {"_class_name": "LTXPipeline"}})
    assert text.places(continued, video) == Places(first=True)
    assert text.places(parse_given(["first=none.png"], None), video) == Places(first=True)
    assert not text.places(parse_given(["last=none.png"], None), video).first  # the rule without training
    wan = read_model(ModelConfig(path="tiny/wan"))  # negative control: no pictures
    assert wan.places(continued, video) == Places()


def test_no_other_size_is_advised_than_that_of_a_video_to_continue(ltx: Path) -> None:
    config, spec = config_with(ltx), read_model(ModelConfig(path=str(ltx)))
    config = replace(config, video=replace(config.video, height=256, width=384))
    case = Case.of(config, spec, gpu=read_gpu("h200"), world_size=1)
    assert _smaller(case)
    assert _smaller(replace(case, given=parse_given([], "none.mp4"))) == []


def test_the_time_on_a_cpu_counts_pictures(ltx: Path) -> None:
    config = config_with(ltx)
    more, less = (denoising_operations(config, given) for given in (parse_given(["last=none.png"], None), None))
    assert more > 1.1 * less
