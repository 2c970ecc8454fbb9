"""The engine on a real (random) checkpoint folder: equal to the stock pipeline, interrupted and continued, and its errors."""

import contextlib
import dataclasses
import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.kernel_choice import KernelChoice
from engine.load.convolutions import use_onednn
from engine.spectra.trace import SpectralTrace
from freespec.methods import METHODS, FreeSpec
from tests.tiny_pipelines import save_random_wan

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_random_wan(tmp_path_factory.mktemp("wan"))


def config_of(folder: Path, **changes) -> RunConfig:
    config = RunConfig(
        model=ModelConfig(path=str(folder), device="cpu"),
        video=VideoConfig(num_frames=29, height=32, width=48),
        sampler=SamplerConfig(num_steps=4, guidance_scale=4.0, seed=3, negative_prompt="bad", max_text_tokens=20),
        method=MethodConfig(name="freespec", window_frames=3, freespec=FreeSpec(domain="step", fused_share=0.5)),
        output=OutputConfig(progress="off"),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture
def engine(folder):
    engine = LongVideoEngine(config_of(folder))
    yield engine
    engine.close()


@pytest.mark.parametrize(("method", "num_frames"), [("direct", 29), *((method, 9) for method in METHODS)])
def test_the_engines_own_loop_is_the_stock_pipelines_bit_for_bit(folder, method, num_frames):
    """At the native length of 3 latent frames that is true of every method."""
    pipe = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        PROMPT,
        negative_prompt="bad",
        height=32,
        width=48,
        num_frames=num_frames,
        num_inference_steps=4,
        guidance_scale=4.0,
        max_sequence_length=20,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).frames
    iid = dataclasses.replace(config_of(folder).sampler, noise="iid")
    config = config_of(folder, method=MethodConfig(name=method, window_frames=3), sampler=iid)
    with contextlib.closing(LongVideoEngine(config)) as engine:
        assert torch.equal(engine.denoise(PROMPT, num_frames=num_frames).latents, stock)
        assert not torch.equal(engine.denoise(PROMPT, num_frames=num_frames, seed=4).latents, stock)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_direct_is_the_stock_pipeline_bit_for_bit(folder, guidance):
    pipe = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    use_onednn(pipe.vae)  # frames of another kernel are the same to 2e-6, which some roundings to uint8 would show
    stock = pipe(
        PROMPT,
        negative_prompt="bad",
        height=32,
        width=48,
        num_frames=29,
        num_inference_steps=4,
        guidance_scale=guidance,
        max_sequence_length=20,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).frames[0]
    config = config_of(folder, method=MethodConfig(name="direct", window_frames=3))
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, guidance_scale=guidance))
    engine = LongVideoEngine(config)
    result = engine.generate(PROMPT)
    assert np.array_equal(result.frames, (stock * 255).round().astype("uint8"))
    other = engine.generate(PROMPT, seed=4)
    assert not np.array_equal(other.frames, result.frames)
    engine.close()


def test_the_chosen_kernel_stays_on_the_pipeline(folder, monkeypatch):
    choice = KernelChoice(kernel="plain", why="measured", seconds={"plain": 1.0, "cpu_flash": 2.0})
    monkeypatch.setattr("engine.engine.choose_on_ranks", lambda *_args, **_where: choice)
    with contextlib.closing(LongVideoEngine(config_of(folder))) as engine:
        assert engine.handle.state.setup.kernel == "plain"
        engine.use_method(MethodConfig(name="direct", window_frames=3))
        assert engine.handle.state.setup.kernel == "plain"
        assert engine.generate(PROMPT, num_frames=9).record["attention"]["seconds"] == {"plain": 1.0, "cpu_flash": 2.0}


def test_result_and_record(engine):
    result = engine.generate(PROMPT)
    assert result.latents.shape == (1, 4, 8, 8, 12)
    assert result.frames.shape == (29, 32, 48, 3)
    assert result.frames.dtype == np.uint8
    record = json.loads(json.dumps(result.record, allow_nan=False))
    assert [step["mode"] for step in record["steps"]] == ["dual", "dual", "local", "local"]
    assert record["seed"] == 3
    assert record["attention"] == {"kernel": "cpu_flash", "why": "the only one here", "seconds": {}, "left_out": {}}
    assert record["config"]["method"]["freespec"]["fused_share"] == 0.5
    assert set(record["seconds"]) == {"load", "text", "denoise", "decode"}
    assert record["parallel"] == {
        "ranks": 1,
        "cfg": 1,
        "ring": 1,
        "ulysses": 1,
        "local_route": "auto",
        "provider": "torch",
        "why": "one process",
        "nodes": [{"node": socket.gethostname(), "ranks": [0]}],
    }


class InterruptedPrompt:
    """Makes the engine's transformer raise KeyboardInterrupt in the given forward."""

    def __init__(self, engine: LongVideoEngine, forward: int) -> None:
        self.left = forward
        self.hook = engine.pipe.transformer.register_forward_hook(self)

    def __call__(self, module, args, output):
        self.left -= 1
        if self.left == 0:
            self.hook.remove()
            raise KeyboardInterrupt


@pytest.mark.parametrize("forward", [3, 4, 6, 8])
def test_an_interrupted_run_continues_bit_equal(folder, tmp_path, forward):
    engine = LongVideoEngine(config_of(folder))
    seen, again = SpectralTrace(), SpectralTrace()
    whole = engine.denoise(PROMPT, trace=seen)
    path = tmp_path / "run.snapshot.safetensors"
    InterruptedPrompt(engine, forward)
    with pytest.raises(KeyboardInterrupt):
        engine.denoise(PROMPT, snapshot=path, trace=SpectralTrace())
    assert path.exists()
    with pytest.raises(UserError, match="belongs to another run"):
        engine.denoise("a green circle", snapshot=path)
    engine.close()
    if forward == 4:
        path.rename(tmp_path / "run.checkpoint.safetensors")  # as older versions called it
    fresh = LongVideoEngine(config_of(folder))
    continued = fresh.denoise(PROMPT, snapshot=path, trace=again)
    assert continued.resumed_at == (forward - 1) // 2
    assert torch.equal(continued.latents, whole.latents)
    assert [(step["step"], step["mode"]) for step in continued.steps] == [
        (step["step"], step["mode"]) for step in whole.steps
    ]
    assert again.rows == seen.rows
    fresh.close()


def test_interrupted_in_the_first_step_keeps_nothing(engine, tmp_path):
    InterruptedPrompt(engine, 1)
    with pytest.raises(KeyboardInterrupt):
        engine.denoise(PROMPT, snapshot=tmp_path / "run.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_trace_hears_every_layer_of_the_conditional_pass(engine):
    trace = SpectralTrace()
    plain = engine.denoise(PROMPT)
    traced = engine.denoise(PROMPT, trace=trace)
    assert torch.equal(plain.latents, traced.latents)
    rows = [(row["step"], row["layer"], row["branch"]) for row in trace.rows]
    dual = [(step, layer, branch) for step in (0, 1) for layer in (0, 1) for branch in ("local", "global")]
    assert rows == dual + [(step, layer, "local") for step in (2, 3) for layer in (0, 1)]
    assert all(1 <= row["effective_rank"] <= 12 for row in trace.rows)
    first = trace.rows[0]
    assert first["weight_first"] == 1.0 > first["weight_last"] > 0
    assert "residual" not in trace.rows[-1]


def test_a_prompt_that_would_be_cut_is_refused(engine):
    long = "a red circle bounces over a blue background"
    with pytest.raises(UserError, match=r"^the prompt has \d+ tokens, and sampler.max_text_tokens is 20; shorten it"):
        engine.denoise(long)
    with pytest.raises(UserError, match=r"^the negative prompt has \d+ tokens, and sampler.max_text_tokens is 20"):
        engine.denoise("a red circle", negative_prompt=long)


@pytest.mark.parametrize(
    ("method", "layer"), [("direct", "proj_out"), *(("freespec", n) for n in (0, 1)), ("freepca", 0)]
)
def test_latents_that_are_not_finite_end_the_run_in_one_line(folder, tmp_path, method, layer):
    """From the second step on: at the model's end, or in values whose sums would be decomposed."""
    config = config_of(folder)
    config = dataclasses.replace(config, method=dataclasses.replace(config.method, name=method))
    path = tmp_path / "run.safetensors"
    with contextlib.closing(LongVideoEngine(config)) as engine:
        transformer, finished = engine.pipe.transformer, []
        broken = transformer.proj_out if layer == "proj_out" else transformer.blocks[layer].attn1.to_v

        def overflow(_module: torch.nn.Module, _args: tuple, out: torch.Tensor) -> torch.Tensor:
            return out.index_fill(1, torch.tensor([5]), torch.inf) if finished else out

        broken.register_forward_hook(overflow)
        with pytest.raises(
            UserError, match=r"^\d+ of 3072 numbers of the latents are not finite after step 2"
        ) as caught:
            engine.denoise(PROMPT, snapshot=path, on_step=lambda step, _: finished.append(step))
    assert str(caught.value).endswith(
        "after step 2 of 4 in float32; try model.dtype bfloat16, a sampler.guidance_scale below 4.0, or fetch the weights again"
    )
    assert finished == [1]
    assert not path.exists()  # it would only lead there again


def test_a_shift_that_grows_is_refused_for_a_model_that_has_none(folder):
    config = config_of(folder)
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, shift="actual"))
    with pytest.raises(
        UserError, match=r"sampler.shift actual has no effect on this checkpoint: its scheduler has one shift"
    ):
        LongVideoEngine(config)


def test_flow_shift_changes_the_timesteps(folder):
    config = config_of(folder)
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, flow_shift=8.0))
    engine = LongVideoEngine(config)
    timesteps = [step["timestep"] for step in engine.denoise(PROMPT).steps]
    engine.close()
    sigma = 0.5 * 1000 / 1000
    shifted = 8 * sigma / (1 + 7 * sigma)
    assert timesteps[2] == pytest.approx(1000 * shifted, abs=3)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"num_frames": 30}, r"num_frames must be 4k \+ 1, got 30; the nearest are 29 and 33"),
        ({"height": 40}, r"video.height must be a multiple of 16, got 40; the nearest are 32 and 48"),
        ({"num_frames": 261}, r"261 frames .* 66 latent frames, .* ends at 64; make at most 253 frames"),
        ({"width": 528}, r"66 token columns, and the model's rotary table ends at 64; make the video smaller"),
    ],
)
def test_impossible_videos_are_refused_before_weights_are_read(folder, tmp_path, video, message):
    broken = tmp_path / "wan"
    shutil.copytree(folder, broken)
    for file in broken.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:10])  # reading any of them would be another error
    config = config_of(broken)
    config = dataclasses.replace(config, video=dataclasses.replace(config.video, **video))
    with pytest.raises(UserError, match=message):
        LongVideoEngine(config)


def test_the_process_group_goes_with_the_last_engine(folder):
    first, second = LongVideoEngine(config_of(folder)), LongVideoEngine(config_of(folder))
    first.close()
    second.denoise(PROMPT)
    second.close()
    second.close()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({"prompt": None}, "the prompt must be one text, got None"),
        ({"prompt": ["a", "b"]}, "the prompt must be one text, got "),
        ({"negative_prompt": 5}, "the negative prompt must be one text, got 5"),
        *(
            ({"seed": seed}, r"the seed must be a whole number in \[0, 2\*\*63\), got")
            for seed in (-1, 1.5, "1", True, 2**63)
        ),
    ],
)
def test_texts_and_seeds_of_a_call_are_checked_as_settings_are(engine, call, told):
    with pytest.raises(UserError, match=told):
        engine.generate(**({"prompt": PROMPT} | call))


def test_a_closed_engine_says_so(folder):
    with LongVideoEngine(config_of(folder)) as engine:
        pass
    with pytest.raises(UserError, match="this engine is closed and has no method; make another LongVideoEngine"):
        engine.generate(PROMPT)
