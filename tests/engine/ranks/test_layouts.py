"""Layouts that a method cannot have: never chosen, refused with the reason and the nearest one that works."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from engine.config import (
    MethodConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SamplerConfig,
    VideoConfig,
)
from engine.errors import UserError
from engine.planner.arrange import choose_degrees
from engine.planner.gpu import read_gpu
from engine.planner.model import read_model
from engine.ranks.layouts import check_layout, nearest_layout, refused_axes
from freespec.methods import METHODS, Direct, FreeLong, Method, StepPlan, make_method
from tests.engine.planned import choose, plan
from tests.tiny_pipelines import save_random_wan

RING_ONLY_ONE = {"freenoise", "freelong", "freelong_pp", "freepca", "ultravico", "lvsa", "freeloc"}


@dataclass(frozen=True, kw_only=True)
class AllHeads(Method):
    """A method of a user's own that wants neither heads nor tokens split."""

    heads_only: bool = False

    @property
    def refused_axes(self) -> Mapping[str, str]:
        reasons = {"ulysses": "it mixes heads"}
        return reasons if self.heads_only else reasons | {"ring": "it sorts tokens"}

    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        return [StepPlan(mode="global") for _ in timesteps]


OWN = f"{__name__}:AllHeads"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_wan(tmp_path_factory.mktemp("wan"))


def config_of(folder: Path, name: str, **parallel: int) -> RunConfig:
    settings = {"heads_only": True} if name == "heads only" else {}
    return RunConfig(
        model=ModelConfig(path=str(folder), device="cpu"),
        video=VideoConfig(num_frames=29, height=80, width=48),
        sampler=SamplerConfig(num_steps=4),
        method=MethodConfig(name=OWN if settings or name == "own" else name, window_frames=3, settings=settings),
        parallel=ParallelConfig(**parallel),
    )


@pytest.mark.parametrize("name", [*METHODS, "own", "heads only"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_what_is_chosen_is_what_the_method_can_have(folder: Path, name: str, world: int) -> None:
    config = config_of(folder, name)
    if name == "own" and world > 2:
        with pytest.raises(UserError, match=r"ring must be 1, as it sorts tokens|ulysses must be 1, as it mixes heads"):
            choose_degrees(config, read_model(config.model), world, None)
        return
    degrees, _ = choose_degrees(config, read_model(config.model), world, None)
    assert degrees[0] * degrees[1] * degrees[2] == world
    assert not refused_axes(config.method.method.refused_axes, degrees)


def test_the_planner_does_not_offer_what_the_method_cannot_have(folder: Path) -> None:
    spec, gpu, (video, sampler) = read_model(ModelConfig(path=str(folder))), read_gpu("h200"), _run()
    for name in METHODS:
        plans = plan(spec, video, sampler, MethodConfig(name=name, window_frames=3), gpu=gpu, world_size=4)
        assert any(p.ring > 1 for p in plans) == (name not in RING_ONLY_ONE)
        # A kernel without a rate; and frames and tiers that a method names are counted for the planned one, or LVSA.
        timed = set(METHODS) - (
            {"ultravico", "freeloc", "freelong_pp", *(["lvsa"] if name == "freelong_pp" else [])} - {name}
        )
        for p in plans:  # and predicts nothing for a method on degrees that it cannot have
            assert set(p.run_seconds) == (timed - RING_ONLY_ONE if p.ring > 1 else timed)
            assert {"views", "views_global"} & set(p.step_seconds) == (
                {"views", "views_global"} if p.ring == 1 else set()
            )
    freelong = MethodConfig(name="freelong", window_frames=3)
    with pytest.raises(UserError, match="freelong cannot run as cfg 1 x ring 2 x ulysses 2: ring must be 1"):
        choose(spec, video, sampler, freelong, gpu=gpu, world_size=4, fixed=(1, 2, None))


def _run() -> tuple[VideoConfig, SamplerConfig]:
    return VideoConfig(num_frames=29, height=80, width=48), SamplerConfig(num_steps=4)


@pytest.mark.parametrize("name", sorted(RING_ONLY_ONE))
def test_degrees_that_were_asked_for_are_refused_before_weights_are_read(folder: Path, name: str) -> None:
    config = config_of(folder, name, ring=2)
    for file in folder.rglob("*.safetensors"):
        assert file.stat().st_size > 0
    with pytest.raises(UserError) as refused:
        choose_degrees(config, read_model(config.model), 4, None)
    line = str(refused.value)
    assert line.startswith(f"{name} cannot run as cfg 1 x ring 2 x ulysses 2: ring must be 1, as its ")
    assert line.endswith("; the nearest layout that works is cfg 1 x ring 1 x ulysses 4")
    allowed = replace(config, method=replace(config.method, name="freespec"))
    assert choose_degrees(allowed, read_model(config.model), 4, None)[0][1] == 2


def test_nearest_layouts() -> None:
    assert nearest_layout({"ring": ""}, (2, 3, 4)) == (2, 1, 12)
    assert nearest_layout({"ulysses": ""}, (1, 3, 4)) == (1, 12, 1)
    assert nearest_layout({"ulysses": "", "ring": ""}, (1, 3, 4)) is None
    for degrees in ((1, 1, 1), (2, 1, 1), (2, 1, 8)):
        check_layout("freelong", FreeLong(), degrees)
    check_layout("direct", Direct(), (2, 4, 4))
    with pytest.raises(
        UserError, match=r"x cannot run as .*: ring must be 1, as it sorts tokens; use cfg alone, or one rank"
    ):
        check_layout("x", AllHeads(), (1, 2, 1))
    with pytest.raises(
        UserError, match=r"ulysses must be 1, as it mixes heads; the nearest .* is cfg 2 x ring 6 x ulysses 1"
    ):
        check_layout("x", AllHeads(heads_only=True), (2, 2, 3))


def test_the_nearest_layout_is_one_that_the_provider_can_have_too(folder: Path) -> None:
    """Four heads on three ranks are uneven shares, which DeepSpeed cannot have; on eight ranks it needs cfg 2."""
    cases = {
        (3, "torch"): "the nearest layout that works is cfg 1 x ring 1 x ulysses 3",
        (3, "deepspeed"): "use cfg alone, or one rank",
        (8, "torch"): "the nearest layout that works is cfg 1 x ring 1 x ulysses 8",
        (8, "deepspeed"): "the nearest layout that works is cfg 2 x ring 1 x ulysses 4",
    }
    for (world, provider), advice in cases.items():
        config = config_of(folder, "freelong", ring=world)
        config = replace(config, parallel=replace(config.parallel, provider=provider))
        with pytest.raises(UserError) as refused:
            choose_degrees(config, read_model(config.model), world, None)
        assert str(refused.value).endswith(f"; {advice}")


def test_which_methods_can_split_tokens() -> None:
    assert {name for name in METHODS if make_method(name).refused_axes} == RING_ONLY_ONE
    assert not make_method("freenoise", attention="window").refused_axes
