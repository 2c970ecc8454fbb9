"""The golden test on LTX-Video: one video over any arrangement of ranks is the video of one rank."""

import dataclasses

import pytest
from torch import Tensor

from engine.adapters.ltx import LtxAdapter
from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.errors import UserError
from engine.ranks.layouts import Ranks, check_layout
from freespec.methods import METHODS, FreeSpec
from tests.engine.golden import (
    TIMELINE,
    Case,
    all_degrees,
    assert_same_video,
    latents_of,
    mesh_of,
    on_one_rank,
    relative,
)
from tests.ranks import run_ranks
from tests.tiny_pipelines import save_random_ltx


def config_of(folder: str, method: str) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=folder, device="cpu"),
        # 7 latent frames of 6 x 3 tokens: no number of ranks below divides the 126 tokens into whole frames.
        video=VideoConfig(num_frames=49, height=96, width=64, fps=24),
        sampler=SamplerConfig(num_steps=2, guidance_scale=4.0, seed=3, negative_prompt="bad", max_text_tokens=20),
        method=MethodConfig(name=method, window_frames=3, freespec=FreeSpec(domain="step", fused_share=0.5)),
        output=OutputConfig(progress="off"),
    )


def latents_on_ranks(rank: int, case: Case) -> Tensor:
    """This rank's latents; runs on every rank."""
    with pytest.MonkeyPatch.context() as patch:
        if case.fault == "rotary of the first tokens":
            patch.setattr(
                LtxAdapter, "shard_rotary", lambda self, tables, start, length: tuple(t[:, :length] for t in tables)
            )
        if case.fault == "swapped passes":
            guide = LtxAdapter.guide
            patch.setattr(LtxAdapter, "guide", lambda self, parts, scale: guide(self, parts[::-1], scale))
        return latents_of(
            config_of(case.folder, case.method), Ranks(mesh=mesh_of(case.degrees), local_route=case.route), case.prompt
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_random_ltx(tmp_path_factory.mktemp("ltx")))


def serves(method: str, degrees: tuple[int, int, int]) -> bool:
    try:
        check_layout(method, config_of("", method).method.method, degrees)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_arrangement_of_ranks_makes_the_same_video(folder, ranks, tmp_path):
    # Every method on two ranks, those of any arrangement on four; on three, which divide neither tokens nor heads, the one that has both branches.
    methods = {2: tuple(METHODS), 3: ("freespec",), 4: ("direct", "sliding_window", "freespec")}[ranks]
    cases = [
        Case(folder, degrees, method) for degrees in all_degrees(ranks) for method in methods if serves(method, degrees)
    ]
    assert {case.method for case in cases} == set(methods)
    cases += [Case(folder, all_degrees(ranks)[0], "freespec", "all_to_all")]
    cases += [Case(folder, degrees, "freespec", prompt=TIMELINE["ltx"]) for degrees in all_degrees(ranks)]
    for case, by_rank in zip(cases, run_ranks(ranks, latents_on_ranks, cases, tmp_path), strict=True):
        assert_same_video(by_rank, config_of(case.folder, case.method), case)


def test_what_is_broken_is_seen(folder, tmp_path):
    cases = [
        Case(folder, (1, 2, 1), "freespec", fault="rotary of the first tokens"),
        Case(folder, (2, 1, 1), "freespec", fault="swapped passes"),
    ]
    for [first, _] in run_ranks(2, latents_on_ranks, cases, tmp_path):
        assert relative(first, on_one_rank(config_of(folder, "freespec"))) > 1e-3


def test_another_seed_is_another_video(folder):
    """Negative control: the tolerance distinguishes videos."""
    config = config_of(folder, "freespec")
    other = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, seed=4))
    assert relative(on_one_rank(other), on_one_rank(config)) > 0.1
