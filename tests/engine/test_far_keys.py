"""Runs with far keys: another video, by little; the record and ids say so; any layout of ranks, scenes, compiled blocks."""

import warnings
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from engine import apply_method, read_preset
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
from engine.ranks.layouts import Ranks
from freespec.methods import FreeSpec
from tests.engine.applied import applied, latents_of, refused
from tests.engine.golden import Degrees, mesh_of, relative
from tests.engine.golden import latents_of as engine_latents_of
from tests.ranks import run_ranks
from tests.tiny_pipelines import random_ltx, random_wan, save_random_wan

PROMPT = "a red circle"
SCENES = "a red circle [0-9] | a star [9-, scene]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_wan(tmp_path_factory.mktemp("wan"))


def config_of(folder: Path, far: int | str, method: str = "freespec", *, compiled: bool = False) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(folder), device="cpu", compile=compiled),
        video=VideoConfig(num_frames=29, height=48, width=32),
        sampler=SamplerConfig(num_steps=3, guidance_scale=3.0, seed=3, max_text_tokens=20),
        method=MethodConfig(name=method, window_frames=3, freespec=FreeSpec(domain="step", fused_share=0.5)),
        attention=AttentionConfig(far=far),
        output=OutputConfig(progress="off"),
    )


def test_the_video_is_another_by_little_and_the_record_and_the_id_say_so(folder: Path) -> None:
    records, latents = {}, {}
    for far in ("all", "1/2", 10000):
        engine = LongVideoEngine(config_of(folder, far))
        result = engine.generate(PROMPT)
        engine.close()
        records[far], latents[far] = result.record, result.latents
    assert torch.equal(latents[10000], latents["all"])  # that is more than there are
    assert 0 < relative(latents["1/2"], latents["all"]) < 0.05
    assert {far: record["far"] for far, record in records.items()} == {far: far for far in records}
    assert len({record["identity"]["id"] for record in records.values()}) == 3


@pytest.mark.parametrize("method", ["freelong", "direct_far"])
def test_other_methods_with_dual_steps(folder: Path, method: str) -> None:
    """direct_far with all keys is direct."""
    exact, near = (engine_latents_of(config_of(folder, far, method)) for far in ("all", "1/2"))
    assert 0 < relative(near, exact) < 0.1
    if method == "direct_far":
        assert relative(exact, engine_latents_of(config_of(folder, "all", "direct"))) < 1e-5


@pytest.mark.parametrize("model", [random_wan, random_ltx])
def test_a_pipeline_of_ones_own(model) -> None:
    pipe = model()
    native = latents_of(pipe, num_frames=9)
    with applied(pipe, far="1/3"):
        far = latents_of(pipe)
        assert torch.equal(latents_of(pipe, num_frames=9), native)
    with applied(pipe):
        assert 0 < relative(far, latents_of(pipe)) < 0.1
    with applied(pipe, far=4):
        refused(lambda: latents_of(pipe), match="attention.far 4 is less than one key for each of the 5 frames")
    refused(lambda: apply_method(pipe, method="direct", window_frames=3, far="1/8"), match="direct_far is direct with")


def test_wrong_settings_end_in_one_line(folder: Path) -> None:
    for method in ("sliding_window", "direct"):
        refused(lambda name=method: config_of(folder, "1/8", name), match=f"method {method} has steps of other kinds")
    settings = {"method.name": "ultravico", "attention.dual": "triton"}
    refused(lambda: read_preset("tiny-wan", settings=settings), match="attention.dual triton would leave that out")
    for far in ("1/0", 0.125):
        refused(lambda far=far: read_preset("tiny-wan", settings={"attention.far": far}), match="attention.far must be")
    refused(
        lambda: LongVideoEngine(config_of(folder, 4)), match="attention.far 4 is less than one key for each of the 5"
    )


def on_ranks(rank: int, case: tuple[str, Degrees, str, str, str]) -> Tensor:
    folder, degrees, far, method, prompt = case
    return engine_latents_of(config_of(Path(folder), far, method), Ranks(mesh=mesh_of(degrees)), prompt)


def test_any_layout_of_ranks_makes_the_same_video(folder: Path, tmp_path: Path) -> None:
    layouts = [
        ((1, 3, 1), "1/3", "freespec", SCENES),
        ((1, 3, 1), 11, "direct_far", PROMPT),
        ((1, 1, 3), "1/3", "freespec", PROMPT),
    ]
    cases = [(str(folder), *each) for each in layouts]
    for case, by_rank in zip(cases, run_ranks(3, on_ranks, cases, tmp_path), strict=True):
        _, _, far, method, prompt = case
        alone = engine_latents_of(config_of(folder, far, method), prompt=prompt)
        for latents in by_rank:
            assert torch.equal(latents, alone), case


def test_a_compiled_block_has_one_graph_for_all_layers_and_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine_latents_of(config_of(folder, "1/3"))
    counter = CompileCounter()
    whole = WanTransformer3DModel.compile_repeated_blocks
    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", lambda model: whole(model, backend=counter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised by dynamo about torch's own code
        engine = LongVideoEngine(config_of(folder, "1/3", compiled=True))
        made = engine.denoise(PROMPT).latents
    engine.close()
    torch.compiler.reset()
    assert counter.frame_count == 2  # dual and local steps
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
