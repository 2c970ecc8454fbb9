"""`model.compile`: a graph for each kind of step, whatever the layers, steps and videos, also after another method was put on."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter

from engine import apply_method
from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.spectra.trace import SpectralTrace
from freespec.methods import METHODS, FreeSpec
from tests.engine.golden import first_picture
from tests.inductor import buffers, code_of
from tests.tiny_pipelines import random_i2v, random_ltx, random_ti2v, random_wan, save_random_wan

PROMPT = "a red circle"
LTX_VIDEO = {"height": 64, "width": 96, "num_frames": 121}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_wan(tmp_path_factory.mktemp("wan"))


def config_of(folder: Path, *, compiled: bool) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(folder), device="cpu", compile=compiled),
        video=VideoConfig(num_frames=21, height=32, width=32),
        sampler=SamplerConfig(num_steps=4, guidance_scale=4.0, max_text_tokens=20),
        method=MethodConfig(name="freespec", window_frames=3, freespec=FreeSpec(domain="step", fused_share=0.5)),
        output=OutputConfig(progress="off"),
    )


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Counts graphs, and runs them as they are: what inductor makes of them is not ours."""
    counter = CompileCounter()
    whole = WanTransformer3DModel.compile_repeated_blocks
    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", lambda model: whole(model, backend=counter))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised by dynamo about torch's own code
        yield counter
    monkeypatch.undo()
    torch.compiler.reset()


def test_a_kind_of_step_is_compiled_once(folder: Path, counter: CompileCounter) -> None:
    with contextlib.closing(LongVideoEngine(config_of(folder, compiled=False))) as engine:
        expected = engine.denoise(PROMPT).latents
    assert counter.frame_count == 0
    with contextlib.closing(LongVideoEngine(config_of(folder, compiled=True))) as engine:
        assert len(engine.pipe.transformer.blocks) > 1
        made = engine.denoise(PROMPT)
        assert [step["mode"] for step in made.steps] == ["dual", "dual", "local", "local"]
        torch.testing.assert_close(made.latents, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        graphs = counter.frame_count
        assert graphs == 2
        engine.denoise(PROMPT, seed=5)
        assert counter.frame_count == graphs
        engine.use_method(MethodConfig(name="direct", window_frames=3))
        engine.denoise(PROMPT)
        assert counter.frame_count == graphs + 1
        with pytest.raises(UserError, match=r"do not expose branches for a trace .*; set model.compile false"):
            engine.denoise(PROMPT, trace=SpectralTrace())


def test_two_transformers_share_their_graphs(tmp_path: Path, counter: CompileCounter) -> None:
    """The first denoises the dual steps of this run, the second the local ones; in another video it is one graph still for each kind."""
    folder = save_random_wan(tmp_path, experts=2)
    with contextlib.closing(LongVideoEngine(config_of(folder, compiled=False))) as engine:
        expected = engine.denoise(PROMPT).latents
    with contextlib.closing(LongVideoEngine(config_of(folder, compiled=True))) as engine:
        made = engine.denoise(PROMPT)
        assert [(step["mode"], step["expert"]) for step in made.steps] == [("dual", "transformer")] * 2 + [
            ("local", "transformer_2")
        ] * 2
        torch.testing.assert_close(made.latents, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        assert counter.frame_count == 2
        engine.use_method(MethodConfig(name="direct", window_frames=3))
        engine.denoise(PROMPT)  # the same kind of step on both
        assert counter.frame_count == 3


@pytest.mark.parametrize("kind", ["i2v", pytest.param("ti2v", marks=pytest.mark.slow)])
def test_videos_of_pictures(tmp_path: Path, counter: CompileCounter, kind: str) -> None:
    (random_ti2v() if kind == "ti2v" else random_i2v(kind)).save_pretrained(tmp_path)
    given, latents = first_picture(tmp_path / "first.png", 32, 32), []
    for compiled in (False, True):
        config = config_of(tmp_path, compiled=compiled)
        config = dataclasses.replace(
            config, sampler=dataclasses.replace(config.sampler, max_text_tokens=512, num_steps=2, guidance_scale=1.0)
        )
        with contextlib.closing(LongVideoEngine(config)) as engine:
            latents.append(engine.denoise(PROMPT, given=given).latents)
    torch.testing.assert_close(*latents, rtol=0, atol=1e-5 * float(latents[0].abs().max()))
    assert counter.frame_count == 2


def test_timelines_are_compiled_with_their_blocks(folder: Path, counter: CompileCounter) -> None:
    """A timeline of another plan is another graph; the same one again, with other texts, is not."""
    lines = [f"{PROMPT} [0-9] | a {{}} star [9-, scene]", f"{PROMPT} [0-9] | a {{}} star [9-, fade 9]"]
    with contextlib.closing(LongVideoEngine(config_of(folder, compiled=False))) as engine:
        expected = [engine.denoise(line.format("gold")).latents for line in lines]
    with contextlib.closing(LongVideoEngine(config_of(folder, compiled=True))) as engine:
        for graphs, line, latents in zip((2, 4), lines, expected, strict=True):
            made = engine.denoise(line.format("gold")).latents
            torch.testing.assert_close(made, latents, rtol=0, atol=1e-5 * float(latents.abs().max()))
            engine.denoise(line.format("blue"))
            assert counter.frame_count == graphs


@pytest.mark.usefixtures("counter")
def test_timelines_may_change_more_often_than_a_block_may_be_compiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder, compiled=True)
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, num_steps=1, guidance_scale=1.0))

    def change_timelines() -> None:
        for start in (5, 9):
            engine.denoise(f"{PROMPT} [0-{start}] | a gold star [{start}-, cut]")

    with contextlib.closing(LongVideoEngine(config)) as engine, torch._dynamo.config.patch(recompile_limit=1):
        change_timelines()
        monkeypatch.setattr(torch.compiler, "reset", lambda: None)
        with pytest.raises(FailOnRecompileLimitHit):  # the control: graphs of the events before would be kept
            change_timelines()


@pytest.mark.usefixtures("counter")
def test_methods_may_change_more_often_than_a_block_may_be_compiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder, compiled=True)
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, num_steps=1, guidance_scale=1.0))

    def change_methods() -> None:
        for window_frames in (2, 3):
            engine.use_method(MethodConfig(name="sliding_window", window_frames=window_frames))
            engine.denoise(PROMPT)

    with contextlib.closing(LongVideoEngine(config)) as engine, torch._dynamo.config.patch(recompile_limit=1):
        change_methods()
        monkeypatch.setattr(torch.compiler, "reset", lambda: None)
        with pytest.raises(FailOnRecompileLimitHit):  # the control: graphs of the methods before would be kept
            change_methods()


class Stop(Exception):  # noqa: N818 - how a run ends here
    """The first block has been compiled."""


# Ultravico has freespec's operator, and the slow ones those of others. Of LTX-Video one method of each: the models differ in width and
# heads alone.
@pytest.mark.parametrize(
    ("make", "method"),
    [
        *((random_wan, name) for name in METHODS if name not in ("ultravico", "freenoise", "lvsa")),
        *(pytest.param(random_wan, name, marks=pytest.mark.slow) for name in ("freenoise", "lvsa")),
        *((random_ltx, name) for name in ("sliding_window", "freespec", "freeloc", "freelong_pp")),
    ],
)
def test_no_block_writes_windows_out(make: Callable[[], Any], method: str) -> None:
    """Inductor's code for the first block of the first step: no buffer is larger than the feed-forward part's."""
    pipe = make()
    video = {"height": 32, "width": 48, "num_frames": 29} if make is random_wan else LTX_VIDEO
    call = video | {"prompt": PROMPT, "num_inference_steps": 2, "max_sequence_length": 20, "guidance_scale": 1.0}
    code = ""

    def keep(block: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal code
        hook.remove()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = code_of(lambda args, kwargs: block(*args, **kwargs), args, kwargs)
        raise Stop

    blocks = pipe.transformer.blocks if make is random_wan else pipe.transformer.transformer_blocks
    window = 3 if make is random_wan else 7
    with torch.no_grad(), apply_method(pipe, method=method, window_frames=window) as handle:
        hook = blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
        with pytest.raises(Stop):
            pipe(**call)
        grid = handle.state.last.grid
    operators = {"local": "local", "dual": "branches", "frames": "frames", "tiers": "tiers"}
    operator = operators.get(handle.state.last.mode, "dense")
    assert f"torch.ops.freespec.{operator}.default(" in code
    width = pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim
    widest = 4 * width if make is random_ltx else width
    assert max(buffers(code)) <= grid.tokens * widest
    assert (
        grid.window_frames * (grid.frames - 2) * grid.frame_tokens * width > grid.tokens * widest
    )  # all windows are more


def test_what_cannot_be_compiled_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model.compile cannot compile layers that model.weights zero3 brings"):
        ModelConfig(path="somewhere", weights="zero3", compile=True)
    with pytest.raises(
        UserError, match=r"do not expose branches for a trace .*; set model.compile false, or do not trace"
    ):
        dataclasses.replace(config_of(folder, compiled=True), output=OutputConfig(trace=True))
