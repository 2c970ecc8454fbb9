"""Every scheduler of the installed diffusers is right on a model, on any number of ranks and after an interruption, or refused."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers.schedulers
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LTXEulerAncestralRFScheduler,
    SASolverScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from engine import apply_method
from engine.adapters import ModelAdapter
from engine.adapters.ltx import LTX, pack, unpack
from engine.adapters.ltx_condition import LTX_CONDITION
from engine.adapters.wan import WAN
from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.ranks.layouts import Ranks
from engine.schedulers import SchedulerState, restore_scheduler
from freespec.methods import FreeSpec
from tests.engine.golden import PROMPT, mesh_of, relative, stop_run
from tests.ranks import run_ranks
from tests.tiny_pipelines import random_ltx, random_wan, save_random_ltx, save_random_wan

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SDE = FLOW | {"algorithm_type": "sde-dpmsolver++"}
# Classes that the stock pipelines run with and that integrate a flow: the whole list, held against all classes below.
RIGHT = {
    WAN: {
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
        FlowMapEulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
        FlowMatchLCMScheduler,
        LTXEulerAncestralRFScheduler,
        SASolverScheduler,
        UniPCMultistepScheduler,
    },
    LTX: {FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler},
}
MAKE: dict[ModelAdapter, Callable[[], DiffusionPipeline]] = {WAN: random_wan, LTX: random_ltx}
SAVE = {WAN: save_random_wan, LTX: save_random_ltx}
SIZE = {WAN: (29, 32, 48), LTX: (57, 64, 32)}  # frames, height, width: 8 latent frames of 24 and of 2 tokens


class Variant(NamedTuple):
    """A scheduler that a model can have, and whether it draws noise while it steps."""

    adapter: ModelAdapter
    kind: type[SchedulerMixin]
    settings: dict[str, Any]
    draws: bool

    def make(self) -> SchedulerMixin:
        return self.kind(**self.settings)

    def __str__(self) -> str:
        settings = ",".join(str(value) for value in self.settings.values() if value not in FLOW.values())
        return f"{self.adapter.index_names[0]}-{self.kind.__name__}{settings and '-'}{settings}"


def variants() -> list[Variant]:
    """Every class of `RIGHT` as the model wants it, and the settings that make some of them draw noise."""
    always = {FlowMatchLCMScheduler, LTXEulerAncestralRFScheduler, SASolverScheduler}
    extra: dict[type, list[tuple[dict[str, Any], bool]]] = {
        FlowMatchEulerDiscreteScheduler: [({"stochastic_sampling": True}, True), ({"shift_terminal": 0.1}, False)],
        DPMSolverMultistepScheduler: [(SDE, True), (FLOW | {"solver_order": 3}, False)],
        DPMSolverSinglestepScheduler: [(SDE, True)],
        LTXEulerAncestralRFScheduler: [({"eta": 0.0}, False)],
        UniPCMultistepScheduler: [(FLOW | {"solver_order": 3, "flow_shift": 5.0}, False)],
    }
    return [
        Variant(adapter, kind, settings, draws)
        for adapter, kinds in RIGHT.items()
        for kind in sorted(kinds, key=lambda kind: kind.__name__)
        for settings, draws in [(flow_settings(kind), kind in always), *extra.get(kind, [])]
    ]


def flow_settings(kind: type) -> dict[str, Any]:
    return FLOW if "use_flow_sigmas" in inspect.signature(kind.__init__).parameters else {}


# What some classes want to be made at all.
REQUIRED = {
    "AmusedScheduler": {"mask_token_id": 7},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0},
}


def all_kinds() -> list[type[SchedulerMixin]]:
    """The scheduler classes of the installed diffusers whose own requirements are installed."""
    found = [getattr(diffusers.schedulers, name) for name in dir(diffusers.schedulers)]
    kinds = {kind for kind in found if isinstance(kind, type) and issubclass(kind, SchedulerMixin)}
    return sorted(kinds - {SchedulerMixin}, key=lambda kind: kind.__name__)


def made(kind: type) -> list[SchedulerMixin]:
    """The class as it comes, and for a flow where it has that choice."""
    required = REQUIRED.get(kind.__name__, {})
    return [kind(**required | settings) for settings in ({}, flow_settings(kind))]


def call(pipe: DiffusionPipeline, adapter: ModelAdapter, **overrides: Any) -> Tensor:
    """Latents of the pipeline's own loop, with torch's own generator at 5."""
    frames, height, width = SIZE[adapter]
    arguments = {"prompt": PROMPT, "negative_prompt": "bad", "num_frames": frames, "height": height, "width": width}
    arguments |= {"num_inference_steps": 4, "guidance_scale": 4.0, "max_sequence_length": 20, "output_type": "latent"}
    arguments |= {"generator": torch.Generator().manual_seed(3)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return pipe(**arguments | overrides).frames


def config_of(adapter: ModelAdapter, folder: Path, method: str = "direct") -> RunConfig:
    frames, height, width = SIZE[adapter]
    return RunConfig(
        model=ModelConfig(path=str(folder), device="cpu"),
        video=VideoConfig(num_frames=frames, height=height, width=width, fps=25),
        sampler=SamplerConfig(
            num_steps=4, guidance_scale=4.0, seed=3, negative_prompt="bad", max_text_tokens=20, shift="native"
        ),
        method=MethodConfig(name=method, window_frames=3, freespec=FreeSpec(domain="step", fused_share=0.5)),
        output=OutputConfig(progress="off"),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[ModelAdapter, Path]:
    return {adapter: SAVE[adapter](tmp_path_factory.mktemp("model")) for adapter in SAVE}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' code with numpy 2
@pytest.mark.parametrize("adapter", [*RIGHT, LTX_CONDITION], ids=lambda adapter: adapter.index_names[0])
def test_each_class_is_right_or_refused_in_one_line(adapter):
    found = set()
    for kind in all_kinds():
        for scheduler in made(kind):
            try:
                adapter.check_scheduler(scheduler)
            except UserError as error:
                assert "\n" not in str(error)
                assert kind.__name__ in str(error)
                assert "UniPCMultistepScheduler" in str(error)  # what to use instead
            else:
                found.add(kind)
    assert found == RIGHT.get(adapter, RIGHT[LTX] | {FlowMapEulerDiscreteScheduler})  # which takes no `mu`


every_variant = pytest.mark.parametrize("variant", variants(), ids=str)
numpy_2 = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' code with numpy 2


@numpy_2
@every_variant
def test_a_method_on_the_pipeline_is_the_stock_pipeline_at_native_length_and_with_direct(variant):
    pipe = MAKE[variant.adapter]()
    pipe.scheduler = variant.make()
    stock = call(pipe, variant.adapter)
    assert torch.isfinite(stock).all()
    with apply_method(pipe, method="direct", window_frames=3):
        assert torch.equal(call(pipe, variant.adapter), stock)
    with apply_method(pipe, method="freespec", window_frames=8):
        assert torch.equal(call(pipe, variant.adapter), stock)
    with apply_method(pipe, method="freespec", window_frames=3):
        assert not torch.equal(call(pipe, variant.adapter), stock)


def engine_with(variant: Variant, folder: Path, ranks: Ranks | None = None, method: str = "direct") -> LongVideoEngine:
    """An engine whose pipeline has the variant's scheduler in place of the checkpoint's."""
    engine = LongVideoEngine(config_of(variant.adapter, folder, method), ranks)
    engine.pipe.scheduler = variant.make()
    return engine


def in_the_latents_layout(step: Callable[..., Any], *tensors: Tensor, **arguments: Any) -> tuple[Tensor]:
    """A scheduler's step on [1, z, F, h, w], as the engine's, where the stock LTX pipeline steps on packed latents."""
    prediction, timestep, sample = tensors
    if sample.dim() == 5:
        return step(prediction, timestep, sample, **arguments)
    rows, columns = SIZE[LTX][1] // 16, SIZE[LTX][2] // 16
    prediction, sample = (unpack(x, x.shape[1] // rows // columns, rows, columns) for x in (prediction, sample))
    return (pack(step(prediction, timestep, sample, **arguments)[0]),)


@numpy_2
@every_variant
def test_the_engine_is_the_stock_loop_whose_steps_draw_from_its_generator(variant, folders):
    pipe = MAKE[variant.adapter]()
    pipe.scheduler = variant.make()
    generator = torch.Generator().manual_seed(3)
    if variant.draws:
        pipe.scheduler.step = functools.partial(in_the_latents_layout, pipe.scheduler.step, generator=generator)
    native = {"num_frames": {WAN: 9, LTX: 17}[variant.adapter]}  # where the timesteps of LTX are the stock pipeline's
    expected = call(pipe, variant.adapter, generator=generator, **native)
    engine = engine_with(variant, folders[variant.adapter])
    latents = engine.denoise(PROMPT, **native).latents
    engine.close()
    assert torch.equal(latents if variant.adapter is WAN else pack(latents), expected)


@numpy_2
@every_variant
def test_the_engine_makes_the_same_video_again_and_after_an_interruption(variant, folders, tmp_path):
    path = tmp_path / "run.safetensors"
    with torch.random.fork_rng(devices=[]):
        engine = engine_with(variant, folders[variant.adapter], method="freespec")
        whole = engine.denoise(PROMPT).latents
        torch.manual_seed(99)  # torch's own generator has no part in it
        assert torch.equal(engine.denoise(PROMPT).latents, whole)
        assert not torch.equal(engine.denoise(PROMPT, seed=4).latents, whole)
        stop_run(engine, path)
        resumed = engine.denoise(PROMPT, snapshot=path)
        path.unlink()
        stop_run(engine, path)
        engine.close()
        # As in another process: some schedulers make attributes in their first step.
        fresh = engine_with(variant, folders[variant.adapter], method="freespec")
        anew = fresh.denoise(PROMPT, snapshot=path)
        fresh.close()
    assert resumed.resumed_at == anew.resumed_at == 2
    assert torch.equal(anew.latents, whole)
    assert torch.equal(resumed.latents, whole)


@numpy_2
def test_an_interrupted_run_needs_the_state_of_its_generator(folders, tmp_path, monkeypatch):
    variant = next(variant for variant in variants() if variant.draws)
    engine = engine_with(variant, folders[variant.adapter])
    whole = engine.denoise(PROMPT).latents
    stop_run(engine, tmp_path / "run")

    def forget(scheduler: SchedulerMixin, state: SchedulerState, device: torch.device, _: torch.Generator) -> None:
        restore_scheduler(scheduler, state, device, torch.Generator())

    monkeypatch.setattr("engine.denoise.snapshot.restore_scheduler", forget)
    assert relative(engine.denoise(PROMPT, snapshot=tmp_path / "run").latents, whole) > 1e-2
    engine.close()


class RanksCase(NamedTuple):
    """A variant, by its place in `variants()`, over an arrangement of ranks; `fault` breaks it on purpose."""

    index: int
    folder: str
    degrees: tuple[int, int, int]
    fault: bool = False


def latents_on_ranks(rank: int, case: RanksCase) -> Tensor:
    """This rank's latents with a method that mixes both branches; runs on every rank."""
    torch.manual_seed(rank)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore", DeprecationWarning)
        if case.fault:
            patch.setattr("engine.denoise.denoise.step_noise", lambda *_: {})
        engine = engine_with(variants()[case.index], Path(case.folder), Ranks(mesh=mesh_of(case.degrees)), "freespec")
        latents = engine.denoise(PROMPT).latents
        engine.close()
    return latents


@numpy_2
@pytest.mark.parametrize(("ranks", "layouts"), [(2, [(1, 2, 1), (2, 1, 1)]), (3, [(1, 3, 1), (1, 1, 3)])])
def test_any_number_of_ranks_draws_the_same_noise(ranks, layouts, folders, tmp_path):
    @functools.cache
    def on_one_rank(index: int) -> Tensor:
        variant = variants()[index]
        with contextlib.closing(engine_with(variant, folders[variant.adapter], method="freespec")) as engine:
            return engine.denoise(PROMPT).latents

    drawing = [(index, variant) for index, variant in enumerate(variants()) if variant.draws]
    cases = [RanksCase(index, str(folders[each.adapter]), degrees) for index, each in drawing for degrees in layouts]
    for case, by_rank in zip(cases, run_ranks(ranks, latents_on_ranks, cases, tmp_path), strict=True):
        alone = on_one_rank(case.index)
        assert all(torch.equal(latents, by_rank[0]) for latents in by_rank), case
        assert relative(by_rank[0], alone) < 1e-5, case


def test_negative_control_noise_of_the_global_generator(folders, tmp_path):
    index = next(i for i, variant in enumerate(variants()) if variant.draws and variant.adapter is WAN)
    case = RanksCase(index, str(folders[WAN]), (1, 2, 1), fault=True)
    [[first, second]] = run_ranks(2, latents_on_ranks, [case], tmp_path)
    assert relative(first, second) > 1e-2
