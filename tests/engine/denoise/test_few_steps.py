"""Steps given one by one, and schedulers by name: as the settings say, the same on ranks and after an interruption, or refused."""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from engine.adapters import ModelAdapter
from engine.adapters.ltx import LTX
from engine.adapters.wan import WAN
from engine.batch.identity import config_tree
from engine.batch.variants import Variant
from engine.config import MethodConfig, RunConfig, SamplerConfig
from engine.denoise.denoise import denoise
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.identity import latents_settings
from engine.planner.gpu import read_gpu
from engine.planner.model import read_model
from engine.planner.plan import Case
from engine.planner.split import describe_splits, describe_unused_cache
from engine.ranks.layouts import Ranks
from engine.schedulers import check_levels, make_scheduler, set_timesteps
from freespec.methods import FreeSpec
from launch.video.prompts import look_at_prompts
from tests.engine.golden import PROMPT, mesh_of, relative, stop_run
from tests.engine.test_schedulers import FLOW, SAVE, config_of
from tests.loras import random_lora, save_lora
from tests.ranks import run_ranks
from tests.tiny_pipelines import random_ltx, random_wan

LEVELS = (1.0, 0.9375, 5 / 6, 0.57)  # 1000 x 0.57 is less than 570 in float64
KINDS = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": FlowMatchLCMScheduler,
}
MISTAKES = {
    "sampler.timesteps and sampler.sigmas are alternatives": {"timesteps": (1000.0,), "sigmas": (1.0,)},
    "sampler.timesteps must name 1 to 10000 steps, got 0": {"timesteps": ()},
    r"sampler.timesteps must lie in \(0, 1000\], got 1001": {"timesteps": (1001.0, 3.0)},
    r"sampler.timesteps must lie in \(0, 1000\], got nan": {"timesteps": (1000.0, math.nan)},
    r"sampler.sigmas must lie in \(0, 1\], got 0.0, without the final 0": {"sigmas": (1.0, 0.5, 0.0)},
    r"sampler.sigmas must lie in \(0, 1\], got 1000": {"sigmas": (1000.0, 500.0)},
    "sampler.timesteps must begin at 1000, pure noise, .* got 625": {"timesteps": (625.0, 1000.0)},
    "must fall from step to step, and 750 is followed by 750": {"timesteps": (1000.0, 750.0, 750.0)},
    "sampler.num_steps is 20 and sampler.timesteps are 2; leave": {"timesteps": (1000.0, 750.0), "num_steps": 20},
    "sampler.flow_shift 5.0 has no effect on sampler.timesteps": {"timesteps": (1000.0, 750.0), "flow_shift": 5.0},
    "sampler.shift actual has no effect on sampler.sigmas": {"sigmas": (1.0, 0.75), "shift": "actual"},
}


@pytest.mark.parametrize("told", MISTAKES)
def test_a_mistake_is_one_line(told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        SamplerConfig(**MISTAKES[told])
    assert "\n" not in str(caught.value)


def made(adapter: ModelAdapter, scheduler: Any, sampler: SamplerConfig) -> tuple[Any, dict[str, Any]]:
    """The scheduler of a run with its timesteps set."""
    new = make_scheduler(scheduler, sampler)
    told = set_timesteps(adapter, new, sampler, (8, 4, 6), window_frames=3, device=torch.device("cpu"))
    return new, told


def straight(x: Tensor, timestep: Tensor) -> Tensor:
    """Some velocity."""
    return torch.sin(2 * x + timestep / 300)


@pytest.mark.parametrize("adapter", [WAN, LTX], ids=["wan", "ltx"])
@pytest.mark.parametrize("name", ["checkpoint", *KINDS])
def test_steps_are_taken_as_they_are_given(name: str, adapter: ModelAdapter) -> None:
    stock = {WAN: random_wan, LTX: random_ltx}[adapter]().scheduler
    levels = tuple(1000 * level for level in LEVELS)
    scheduler, told = made(adapter, stock, SamplerConfig(scheduler=name, timesteps=levels))
    assert told == {"shift": "given", "value": None}
    assert type(scheduler) is KINDS.get(name, type(stock))
    torch.testing.assert_close(scheduler.timesteps, torch.tensor(levels), rtol=0, atol=0)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor((*LEVELS, 0.0)), rtol=0, atol=2e-6)
    again, _ = made(adapter, stock, SamplerConfig(scheduler=name, sigmas=LEVELS))
    torch.testing.assert_close(again.timesteps, scheduler.timesteps, rtol=1e-7, atol=0)
    adapter.check_scheduler(make_scheduler(stock, SamplerConfig(scheduler=name)))  # integrates a flow


@pytest.mark.parametrize("name", ["euler", "lcm"])
def test_a_run_is_the_published_rule_written_out(name: str) -> None:
    scheduler, _ = made(WAN, random_wan().scheduler, SamplerConfig(scheduler=name, sigmas=LEVELS))
    x = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    run = denoise(x, scheduler, straight, generator=torch.Generator().manual_seed(7))
    draw = torch.Generator().manual_seed(7)
    for level, after in zip(LEVELS, (*LEVELS[1:], 0.0), strict=True):
        velocity = straight(x, torch.tensor(1000 * level))
        clean = x - level * velocity
        noise = torch.randn(x.shape, generator=draw) if name == "lcm" else clean + velocity  # x at sigma 1
        x = (1 - after) * clean + after * noise
    assert relative(run, x) < 1e-6


def test_a_named_scheduler_has_the_shift_of_the_checkpoint() -> None:
    wan, ltx = random_wan().scheduler, random_ltx().scheduler
    ours = make_scheduler(wan, SamplerConfig(scheduler="euler"))
    ours.set_timesteps(5)
    plain = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain.set_timesteps(5)
    assert torch.equal(ours.timesteps, plain.timesteps)
    assert make_scheduler(wan, SamplerConfig(scheduler="lcm", flow_shift=5.0)).config.shift == 5.0
    assert make_scheduler(wan, SamplerConfig()).config.flow_shift == 3.0
    dynamic, told = made(LTX, ltx, SamplerConfig(scheduler="unipc", num_steps=5))
    own, told_own = made(LTX, ltx, SamplerConfig(num_steps=5))
    assert told == told_own
    assert float((dynamic.timesteps - own.timesteps).abs().max()) < 2  # UniPC rounds down
    with pytest.raises(UserError, match="shift follows from the number of tokens"):
        make_scheduler(ltx, SamplerConfig(scheduler="lcm", flow_shift=5.0))


def test_a_scheduler_that_takes_no_list_is_refused_before_and_after_loading() -> None:
    sampler, solver = SamplerConfig(timesteps=(1000.0, 500.0)), DPMSolverMultistepScheduler(**FLOW)
    told = (
        "DPMSolverMultistepScheduler, does not take the 2 steps one by one; choose sampler.scheduler euler, unipc, lcm"
    )
    with pytest.raises(UserError, match=told):
        check_levels(sampler, dict(solver.config) | {"_class_name": "DPMSolverMultistepScheduler"})
    with pytest.raises(UserError, match=told):
        made(WAN, solver, sampler)
    made(WAN, solver, dataclasses.replace(sampler, scheduler="euler"))


class RanksCase(NamedTuple):
    """A checkpoint's folder, the sampler's settings and LoRAs, and the arrangement of the ranks."""

    folder: str
    settings: dict[str, Any]
    degrees: tuple[int, int, int]


def few(adapter: ModelAdapter, folder: Path | str, loras: tuple[str, ...] = (), **settings: Any) -> RunConfig:
    """A long video in a few steps without guidance."""
    config = config_of(adapter, Path(folder), "freespec")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, loras=loras))
    sampler = dataclasses.replace(config.sampler, guidance_scale=1.0, num_steps=None, **settings)
    return dataclasses.replace(config, sampler=sampler)


def latents_on_ranks(rank: int, case: RanksCase) -> Tensor | str:
    """This rank's latents, or why there are none; runs on every rank."""
    torch.manual_seed(rank)
    config = few(LTX if case.folder.endswith("ltx") else WAN, case.folder, **case.settings)
    try:
        with contextlib.closing(LongVideoEngine(config, Ranks(mesh=mesh_of(case.degrees)))) as engine:
            return engine.denoise(PROMPT).latents
    except UserError as error:
        return str(error)


def test_ranks_an_interruption_and_the_planner_agree_on_the_steps(tmp_path: Path) -> None:
    folders = {WAN: SAVE[WAN](tmp_path / "wan"), LTX: SAVE[LTX](tmp_path / "ltx")}
    lora = save_lora(tmp_path / "a.safetensors", random_lora(random_wan().transformer))
    settings = {
        WAN: {"scheduler": "lcm", "sigmas": LEVELS, "loras": (f"{lora}@0.5",)},
        LTX: {"scheduler": "unipc", "timesteps": (1000.0, 700.0)},
    }
    cases = [RanksCase(str(folders[each]), settings[each], (1, 2, 1)) for each in folders]
    *made_on_ranks, refused = run_ranks(2, latents_on_ranks, [*cases, cases[0]._replace(degrees=(2, 1, 1))], tmp_path)
    assert all("sampler.guidance_scale 1.0 runs one pass only; use parallel.cfg 1" in each for each in refused)
    for adapter, by_rank in zip(folders, made_on_ranks, strict=True):
        config, path = few(adapter, folders[adapter], **settings[adapter]), tmp_path / "run"
        with contextlib.closing(LongVideoEngine(config)) as engine:
            whole = engine.denoise(PROMPT)
            stop_run(engine, path, after=1)
            resumed = engine.denoise(PROMPT, snapshot=path)
        path.unlink()
        assert resumed.resumed_at == 1
        assert torch.equal(resumed.latents, whole.latents)
        assert torch.equal(by_rank[0], by_rank[1])
        assert relative(by_rank[0], whole.latents) < 1e-5
        case = Case.of(config, read_model(config.model), gpu=read_gpu("h200"), world_size=2)
        modes = [step["mode"] for step in whole.steps]
        assert case.count_steps()["freespec"] == {mode: modes.count(mode) for mode in dict.fromkeys(modes)}
        assert case.layout((1, 1, 1)).passes == 1  # without guidance
        assert {degrees[0] for degrees in case.support.possible(2)} == {1}  # no cfg axis


def ids(config: RunConfig) -> tuple[Any, Any]:
    """What identifies the latents of a run, and the videos of a batch."""
    given = {"checkpoint": "c", "dtype": "d"}
    return latents_settings(config, device="cpu", with_rate=False, **given), config_tree(config, **given)


def test_ids_have_the_steps_and_those_of_older_versions_stay() -> None:
    config = config_of(WAN, Path("x"))
    for tree in ids(config):
        assert not {"scheduler", "timesteps", "sigmas"} & tree["sampler"].keys()
    others = [
        few(WAN, "x", timesteps=(1000.0, 500.0)),
        few(WAN, "x", timesteps=(1000.0, 501.0)),
        few(WAN, "x", scheduler="lcm"),
    ]
    found = [str(ids(each)) for each in (config, *others)]
    assert len(set(found)) == len(found)


def test_split_with_all_steps_on_one_side_is_reported(tmp_path: Path) -> None:
    folder = SAVE[WAN](tmp_path / "wan")
    config = few(WAN, folder, timesteps=(1000.0, 937.5, 833.3, 625.0))

    def said(name: str, settings: RunConfig = config, **method: Any) -> list[str]:
        window = settings.method.window_frames
        changed = MethodConfig(name=name, window_frames=window, freespec=FreeSpec(**method))
        return list(describe_splits(dataclasses.replace(settings, method=changed)))

    [note] = said("freespec")
    assert note == (
        "with freespec each of the 4 steps (timesteps 1000 to 625) fuses, and none is local; method.freespec.domain step "
        "splits by the number of steps"
    )
    assert said("freespec", domain="step") == []
    assert said("freespec", fused_share=0.2) == []  # 625 is late
    assert said("freespec", fused_share=1.0) == []  # as asked for
    assert said("direct") == []
    assert "fuses, and none is local" in said("freepca")[0]
    assert said("freespec", few(WAN, folder, timesteps=(950.0,)), domain="step") == [
        "with freespec the only step (timestep 950) fuses, and none is local"
    ]
    [none] = said("freespec", few(WAN, folder, timesteps=(950.0, 800.0)), fused_share=0.01)
    assert "is local, and none fuses" in none
    native = dataclasses.replace(config, video=dataclasses.replace(config.video, num_frames=9))
    assert said("freespec", native) == []
    variants = [
        Variant.of(config, "direct"),
        Variant(label="mine", config=dataclasses.replace(config, method=MethodConfig(window_frames=3))),
    ]
    assert [
        note.partition(" each")[0]
        for note in describe_splits(config, {each.label: each.config.method for each in variants})
    ] == ["with mine"]


def test_a_schedule_that_skips_no_step_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TaylorSeer computes three steps of a kind before it skips one; FreeSpec has two kinds here, `direct` one."""
    few_steps, folder = {"timesteps": (1000.0, 937.5, 625.0, 500.0)}, SAVE[WAN](tmp_path / "wan")
    config = few(WAN, folder, **few_steps, cache="taylorseer")
    [note] = describe_unused_cache(config)
    assert note == (
        "sampler.cache taylorseer reuses nothing with freespec: its schedule computes each of the 4 steps, and it is emptied where the "
        "kind of step changes; use more steps, or sampler.cache none"
    )
    methods = {"mine": config.method, "direct": MethodConfig(name="direct", window_frames=3)}
    [of_two] = describe_unused_cache(config, methods)
    assert "reuses nothing with mine:" in of_two
    assert describe_unused_cache(config, {"direct": methods["direct"]}) == []
    for ratios, said in ((1.0, 0), (3.0, 1)):  # whose errors are none, or beyond the threshold
        assert (
            len(describe_unused_cache(few(WAN, folder, **few_steps, cache="mag", cache_ratios=(ratios,) * 4))) == said
        )
    for cache in ("none", "first_block"):  # the latter decides by values
        assert describe_unused_cache(few(WAN, folder, **few_steps, cache=cache)) == []
    look_at_prompts(config, [("a prompt", PROMPT)])
    assert capsys.readouterr().out.count(f"note: {note}\n") == 1
