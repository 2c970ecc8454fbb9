"""The golden test on the embedded model: its 4x-long video over any arrangement of ranks is the video of one rank."""

import dataclasses
from pathlib import Path

import pytest
from torch import Tensor

from engine.apply import Ranks
from engine.config import RunConfig
from engine.engine import LongVideoEngine
from launch.cli import parse_run
from tests.engine.golden import PROMPT, Case, all_degrees, assert_same_video, mesh_of, on_one_rank, relative
from tests.engine.test_ranks import METHODS
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent.parent
STEPS = 4


def config_of(method: str) -> RunConfig:
    """The preset of the embedded model, 129 frames in 4 steps, with half of them dual."""
    words = [
        f"--config={ROOT / 'configs' / 'tiny-wan.yaml'}",
        f"--method.name={method}",
        "--method.freespec.domain=step",
        "--method.freepca.domain=step",
        f"--sampler.num_steps={STEPS}",
        "--output.progress=off",
        "--model.device=cpu",
    ]
    return parse_run(words, name="golden", description="", add_arguments=lambda parser: None)[1]


def latents_on_ranks(rank: int, case: Case) -> Tensor:
    """This rank's latents; runs on every rank."""
    return LongVideoEngine(config_of(case.method), Ranks(mesh=mesh_of(case.degrees))).denoise(PROMPT).latents


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_any_arrangement_of_ranks_makes_the_same_video(ranks, tmp_path):
    # The other methods are in test_ranks, on a smaller model.
    cases = [Case("", degrees, method) for degrees in all_degrees(ranks) for method in METHODS]
    for case, by_rank in zip(cases, run_ranks(ranks, latents_on_ranks, cases, tmp_path), strict=True):
        assert_same_video(by_rank, config_of(case.method), case)


def test_another_seed_is_another_video():
    """Negative control: the tolerance tells videos apart."""
    config = config_of("freespec")
    other = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, seed=config.sampler.seed + 1))
    assert relative(on_one_rank(other), on_one_rank(config)) > 0.1
