"""LTX-Video through the engine: the stock pipeline's bits where they must be the same, a plain reference where they differ."""

import dataclasses
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LTXConditionPipeline,
    LTXPipeline,
    UniPCMultistepScheduler,
)
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb
from torch import Tensor, nn

from engine import apply_method
from engine.adapters.ltx import LTX, pack, shift_exponent, unpack
from engine.config import DecodeConfig, MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.identity import settings_id
from engine.load.convolutions import use_onednn
from engine.load.pipeline import load_pipeline
from engine.spectra.trace import SpectralTrace
from freespec.methods import METHODS, FreeSpec, Grid
from tests.engine.reference_run import latents_by_masks
from tests.tiny_pipelines import random_ltx, save_random_ltx

PROMPT, NEGATIVE = "a red circle", "bad"  # of unequal length, so that their masks differ
WINDOW = 3
# 8 latent frames of 4 x 2 tokens.
CALL = {
    "prompt": PROMPT,
    "negative_prompt": NEGATIVE,
    "height": 64,
    "width": 32,
    "num_frames": 57,
    "frame_rate": 24,
    "num_inference_steps": 4,
    "guidance_scale": 4.0,
    "max_sequence_length": 20,
}
NATIVE_FRAMES = 17


def latents_of(pipe: LTXPipeline, **overrides: Any) -> Tensor:
    """Packed latents [B, S, z] of the pipeline's own loop."""
    return pipe(**(CALL | overrides), generator=torch.Generator().manual_seed(3), output_type="latent").frames


@pytest.fixture(scope="module")
def stock() -> Tensor:
    return latents_of(random_ltx())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_random_ltx(tmp_path_factory.mktemp("ltx"))


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory) -> Path:
    return save_random_ltx(tmp_path_factory.mktemp("ltx095"), conditioned=True)


def config_of(folder: Path, *, sampler: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    settings = {"num_steps": 4, "guidance_scale": 4.0, "seed": 3, "negative_prompt": NEGATIVE, "max_text_tokens": 20}
    config = RunConfig(
        model=ModelConfig(path=str(folder), device="cpu"),
        video=VideoConfig(num_frames=57, height=64, width=32, fps=24),
        sampler=SamplerConfig(**(settings | (sampler or {}))),
        method=MethodConfig(name="freespec", window_frames=WINDOW, freespec=FreeSpec(domain="step", fused_share=0.5)),
        decode=DecodeConfig(mode="whole"),
        output=OutputConfig(progress="off"),
    )
    return dataclasses.replace(config, **changes)


DIRECT = MethodConfig(name="direct", window_frames=WINDOW)


# A method on the user's own pipeline, whose loop runs both passes of guidance as one batch.


@pytest.mark.parametrize(
    "overrides", [{}, {"guidance_scale": 1.0}, {"prompt": [PROMPT, "a"], "negative_prompt": ["b", ""]}]
)
def test_direct_is_the_stock_pipeline_bit_for_bit(overrides):
    pipe = random_ltx()
    expected = latents_of(pipe, **overrides)
    with apply_method(pipe, method="direct", window_frames=WINDOW):
        assert torch.equal(latents_of(pipe, **overrides), expected)


@pytest.mark.parametrize("method", METHODS)
def test_native_length_is_the_stock_pipeline_and_remove_restores_it(method, stock):
    pipe = random_ltx()
    processors = dict(pipe.transformer.attn_processors)
    expected = latents_of(pipe, num_frames=NATIVE_FRAMES)
    settings = {"half_width": 0} if method == "lvsa" else {}  # by default it sees all frames of so short a video
    with apply_method(pipe, method=method, window_frames=WINDOW, **settings):
        assert torch.equal(latents_of(pipe, num_frames=NATIVE_FRAMES), expected)
        changed = latents_of(pipe)
        cross = {name: processor for name, processor in processors.items() if "attn2" in name}
        assert cross.items() <= pipe.transformer.attn_processors.items()  # text and its mask are the model's own affair
    assert torch.equal(changed, stock) == (method == "direct")
    assert torch.equal(latents_of(pipe), stock)
    assert pipe.transformer.attn_processors == processors
    assert not pipe.transformer._forward_pre_hooks
    assert not any(module._forward_hooks for module in pipe.transformer.modules())


@pytest.mark.parametrize(("fused_share", "agrees"), [(0.6, True), (0.9, False)])
def test_freespec_run_equals_a_run_with_masks_and_svd(fused_share, agrees):
    method = FreeSpec(domain="step", fused_share=0.6)
    fast = random_ltx().to(torch.float64)
    with apply_method(fast, method=method, window_frames=WINDOW):
        ours = latents_of(fast)

    method = dataclasses.replace(method, fused_share=fused_share)  # negative control: one dual step more
    grid = Grid(frames=8, rows=4, columns=2, window_frames=WINDOW)
    theirs = latents_by_masks(random_ltx().to(torch.float64), LTX, latents_of, method, num_steps=4, grid=grid)
    # The stock pipeline rounds the prediction to fp32, whatever the model's precision.
    assert (torch.linalg.norm(ours - theirs) < 1e-6 * torch.linalg.norm(theirs)).item() == agrees


def test_rotation_before_the_split_into_heads_matters(stock, monkeypatch):
    """Negative control of the tests above: with every head turned by the first head's frequencies they would fail."""
    pipe = random_ltx()

    def qkv_of_one_head(attn, hidden, rotary, **kwargs):
        return type(LTX).qkv(LTX, attn, hidden, tuple(table[..., :8].repeat(1, 1, 4) for table in rotary), **kwargs)

    monkeypatch.setattr(LTX, "qkv", qkv_of_one_head)
    with apply_method(pipe, method="direct", window_frames=WINDOW):
        assert not torch.allclose(latents_of(pipe), stock, rtol=1e-4)


# The engine's own loop.


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("kind", ["folder", "conditioned"])
def test_direct_with_the_actual_shift_is_the_stock_pipeline_bit_for_bit(kind, guidance, request):
    folder = request.getfixturevalue(kind)
    pipe = LTXPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    use_onednn(pipe.vae)  # as the engine does
    settings = CALL | {"guidance_scale": guidance, "decode_timestep": 0.05, "decode_noise_scale": 0.025}
    expected = pipe(**settings, generator=torch.Generator().manual_seed(3), output_type="np").frames[0]
    config = config_of(folder, method=DIRECT, sampler={"guidance_scale": guidance, "shift": "actual"})
    engine = LongVideoEngine(config)
    result = engine.generate(PROMPT)
    assert np.array_equal(result.frames, (expected * 255).round().astype("uint8"))
    other = engine.generate(PROMPT, seed=4)
    assert not np.array_equal(other.frames, result.frames)
    engine.close()
    decode = result.record["decode"]
    told = {"timestep": 0.05, "noise_scale": 0.025, "noise_seed": 3}
    assert {key: decode.get(key) for key in told} == (told if kind == "conditioned" else dict.fromkeys(told))


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_the_transformer_gets_latents_in_the_stock_pipelines_layout(folder, guidance):
    """Matrix products of another layout round otherwise on some processors, and the video is stock's no more."""
    strides = []

    def keep(_module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        shape = kwargs["hidden_states"].shape
        strides.append([n for size, n in zip(shape, kwargs["hidden_states"].stride(), strict=True) if size > 1])

    pipe = random_ltx()
    pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    latents_of(pipe, guidance_scale=guidance)
    stock, strides = strides, []
    engine = LongVideoEngine(config_of(folder, sampler={"guidance_scale": guidance}))
    engine.pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    engine.denoise(PROMPT)
    engine.close()
    assert strides == stock


def test_the_shift_is_frozen_at_the_native_length_unless_asked(folder):
    runs = {}
    for name, frames, shift in (("long", 57, "native"), ("actual", 57, "actual"), ("native", NATIVE_FRAMES, "actual")):
        engine = LongVideoEngine(config_of(folder, method=DIRECT, sampler={"shift": shift}))
        runs[name] = engine.denoise(PROMPT, num_frames=frames)
        engine.close()
    timesteps = {name: [step["timestep"] for step in run.steps] for name, run in runs.items()}
    assert timesteps["long"] == timesteps["native"] != timesteps["actual"]
    mu = {tokens: 0.95 + (2.05 - 0.95) / (96 - 24) * (tokens - 24) for tokens in (24, 64)}
    schedule = runs["long"].schedule
    assert schedule["mu"] == pytest.approx(mu[24])
    assert (schedule["shift"], schedule["tokens"], schedule["value"]) == ("native", 24, math.exp(schedule["mu"]))
    assert runs["actual"].schedule["mu"] == pytest.approx(mu[64])
    # The same as a fixed shift of exp(mu).
    config = random_ltx().scheduler.config
    fixed = FlowMatchEulerDiscreteScheduler.from_config(config, use_dynamic_shifting=False, shift=math.exp(mu[24]))
    fixed.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4))
    assert fixed.timesteps.tolist() == pytest.approx(timesteps["long"])


def test_a_later_checkpoint_has_one_shift_for_any_length(tmp_path):
    pipe = random_ltx(dynamic_shift=False)
    pipe.save_pretrained(tmp_path)
    engine = LongVideoEngine(config_of(tmp_path, method=DIRECT))
    made = engine.denoise(PROMPT)
    engine.close()
    assert made.schedule == {"shift": "fixed", "value": 1.0}
    assert torch.equal(pack(made.latents), latents_of(pipe))
    with pytest.raises(
        UserError, match=r"sampler.shift actual has no effect on this checkpoint: its scheduler has one shift"
    ):
        LongVideoEngine(config_of(tmp_path, method=DIRECT, sampler={"shift": "actual"}))


def test_mu_is_the_stock_pipelines_line():
    published = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096}
    # 121, 161, 481 and 961 frames of 512 x 704.
    mus = [shift_exponent(published, frames * 352) for frames in (16, 21, 61, 121)]
    assert mus == pytest.approx([2.60, 3.23, 8.27, 15.83], abs=0.01)


def test_the_record_says_what_decides_the_latents(folder):
    engine = LongVideoEngine(config_of(folder))
    record = json.loads(json.dumps(engine.generate(PROMPT).record, allow_nan=False))
    run_ids = {fps: _run_id_with(engine, fps) for fps in (24, 30)}
    engine.close()
    assert record["config"]["sampler"]["shift"] == record["schedule"]["shift"] == "native"
    assert record["latents"]["shape"] == [1, 4, 8, 4, 2]
    assert [step["mode"] for step in record["steps"]] == ["dual", "dual", "local", "local"]
    assert run_ids[24] != run_ids[30]  # the rate is in the rotary coordinates


def _run_id_with(engine: LongVideoEngine, fps: int) -> str:
    engine.config = dataclasses.replace(engine.config, video=dataclasses.replace(engine.config.video, fps=fps))
    return settings_id(engine.checkpoint.settings(engine.config, seed=3))


def test_another_frame_rate_is_another_video(folder):
    latents = []
    for fps in (24, 30):
        config = config_of(folder)
        engine = LongVideoEngine(dataclasses.replace(config, video=dataclasses.replace(config.video, fps=fps)))
        latents.append(engine.denoise(PROMPT).latents)
        engine.close()
    assert not torch.allclose(*latents, rtol=1e-3)


def test_an_interrupted_run_continues_bit_equal(folder, tmp_path):
    engine = LongVideoEngine(config_of(folder))
    whole = engine.denoise(PROMPT)
    path = tmp_path / "run.safetensors"
    calls = []

    def interrupt(module, args, output):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = engine.pipe.transformer.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.denoise(PROMPT, snapshot=path)
    hook.remove()
    continued = engine.denoise(PROMPT, snapshot=path)
    engine.close()
    assert continued.resumed_at == 2
    assert torch.equal(continued.latents, whole.latents)


def test_the_trace_hears_the_conditional_half_of_the_batch(folder):
    ranks = {}
    for prompt, guidance in ((PROMPT, 4.0), (PROMPT, 1.0), (NEGATIVE, 1.0)):
        engine = LongVideoEngine(config_of(folder, sampler={"guidance_scale": guidance, "negative_prompt": NEGATIVE}))
        trace = SpectralTrace()
        engine.denoise(prompt, trace=trace)
        engine.close()
        # The first step sees the same noise with and without guidance; layer 0 comes before the text.
        ranks[prompt, guidance] = [
            row["effective_rank"] for row in trace.rows if row["step"] == 0 and row["layer"] == 1
        ]
    assert ranks[PROMPT, 4.0] == pytest.approx(ranks[PROMPT, 1.0], rel=1e-4)
    assert ranks[PROMPT, 4.0] != pytest.approx(ranks[NEGATIVE, 1.0], rel=1e-4)


# Numbers, packing, mistakes.


def test_packing_is_the_stock_pipelines():
    latents = torch.randn(2, 4, 3, 5, 2)
    packed = pack(latents)
    assert torch.equal(packed, LTXPipeline._pack_latents(latents))
    assert torch.equal(unpack(packed, 3, 5, 2), latents)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"num_frames": 30}, r"num_frames must be 8k \+ 1, got 30; the nearest are 25 and 33"),
        ({"height": 40}, r"video.height must be a multiple of 32, got 40; the nearest are 32 and 64"),
    ],
)
def test_impossible_videos_are_refused(folder, video, message):
    config = config_of(folder)
    with pytest.raises(UserError, match=message):
        LongVideoEngine(dataclasses.replace(config, video=dataclasses.replace(config.video, **video)))


def test_any_number_of_frames_has_positions():
    spec = LTX.video_spec({}, {})
    spec.check_video(8 * 5000 + 1, 480, 704)
    assert spec.latent_shape(481, 480, 704) == (1, 128, 61, 15, 22)


def test_settings_that_would_be_ignored_are_refused(folder):
    with pytest.raises(UserError, match=r"flow_shift 3.0 would be ignored: .* select that number with sampler.shift"):
        LongVideoEngine(config_of(folder, sampler={"flow_shift": 3.0}))
    with pytest.raises(UserError, match=r"decode.tile_frames must be a multiple of the 8 frames of a latent, got 20"):
        LongVideoEngine(config_of(folder, decode=DecodeConfig(tile_frames=20)))
    engine = LongVideoEngine(config_of(folder, sampler={"num_steps": 1}))
    with pytest.raises(UserError, match=r"one step cannot end at .* use sampler.num_steps 2 or more"):
        engine.denoise(PROMPT)
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, and sampler.max_text_tokens is 20"):
        engine.denoise("a red circle bounces over a blue background")
    engine.close()


def test_unsafe_pipelines_are_refused():
    pipe = random_ltx()
    pipe.scheduler = UniPCMultistepScheduler()
    with pytest.raises(
        UserError, match="LTX-Video predicts a flow, and the UniPCMultistepScheduler has prediction_type"
    ):
        apply_method(pipe, window_frames=WINDOW)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(
        UserError, match="sigmas and their shift mu, which FlowMatchHeunDiscreteScheduler does not take"
    ):
        apply_method(pipe, window_frames=WINDOW)
    pipe = random_ltx()
    pipe.transformer.register_to_config(patch_size=2)
    with pytest.raises(UserError, match="patches of 1 x 2"):
        apply_method(pipe, window_frames=WINDOW)
    pipe = random_ltx()
    with (
        apply_method(pipe, window_frames=WINDOW),
        pytest.raises(UserError, match="without num_frames, height and width; call it through LTXPipeline"),
    ):
        pipe.scheduler.set_timesteps(4, mu=1.0)
        inputs = (torch.randn(1, 64, 4), torch.randn(1, 5, 16), pipe.scheduler.timesteps[:1], torch.ones(1, 5))
        pipe.transformer(*inputs, video_coords=torch.zeros(1, 3, 64))


def test_checkpoints_load_by_their_index(folder, tmp_path):
    other = tmp_path / "ltx"
    shutil.copytree(folder, other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "LTXConditionPipeline"}))
    with pytest.raises(UserError, match="would shift its noise levels alone"):
        load_pipeline(ModelConfig(path=str(other), device="cpu"))
    kept = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    unshifted = kept | {"use_dynamic_shifting": False, "shift_terminal": None}
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(unshifted))
    assert type(load_pipeline(ModelConfig(path=str(other), device="cpu"))) is LTXConditionPipeline
    (other / "transformer" / "config.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*transformer/config\.json"):
        load_pipeline(ModelConfig(path=str(other), device="cpu"))
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "LTXImageToVideoPipeline"}))
    with pytest.raises(UserError, match=r"names a LTXImageToVideoPipeline; only WanPipeline .* LTXPipeline"):
        load_pipeline(ModelConfig(path=str(other), device="cpu"))


def test_a_tokenizer_of_one_sentencepiece_file_loads_as_in_the_published_checkpoint(folder, tmp_path):
    other = tmp_path / "ltx"
    shutil.copytree(folder, other)
    for file in (other / "tokenizer").iterdir():
        file.unlink()
    words = "a red circle moves over a blue square and back again"
    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 20),
        model_writer=model,
        vocab_size=30,
        hard_vocab_limit=False,  # so few words have fewer pieces
        minloglevel=2,
        **ids,
    )
    (other / "tokenizer" / "spiece.model").write_bytes(model.getvalue())
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 128, **named}
    (other / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    found = load_pipeline(ModelConfig(path=str(other), device="cpu")).tokenizer(PROMPT).input_ids
    reader = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert found == [*reader.encode(PROMPT), reader.eos_id()]


def test_positions_beyond_those_of_training_keep_their_distances() -> None:
    """At 30 frames a second latent frame 75 is the first beyond 20 seconds; the controls are another distance and the wrong rate."""
    rope, hidden = random_ltx().transformer.rope, torch.zeros(1, 1, 1)
    q, k = torch.randn(2, rope.dim, generator=torch.Generator().manual_seed(0))

    def products(scale: float) -> Tensor:
        tables = rope(hidden, 242, 1, 1, rope_interpolation_scale=(scale, 32, 32))
        turned = [apply_rotary_emb(x.expand(1, 242, -1), tables)[0] for x in (q, k)]
        return turned[0] @ turned[1].T

    found = products(8 / 30)
    torch.testing.assert_close(found[0, 5], found[230, 235], rtol=1e-3, atol=1e-3)
    assert abs(found[0, 5] - found[230, 236]) > 1e-2
    assert abs(found[0, 5] - products(8 / 24)[230, 235]) > 1e-2
