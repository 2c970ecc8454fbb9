"""The golden test on the embedded models: their 3x-long video over any arrangement of ranks is the video of one rank."""

import dataclasses
from pathlib import Path

import pytest
from torch import Tensor

from engine.config import RunConfig
from engine.ranks.layouts import Ranks
from launch.cli.parser import parse_run
from tests.engine.golden import Case, all_degrees, assert_same_video, latents_of, mesh_of, on_one_rank, relative
from tests.engine.test_ranks import METHODS
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent.parent
STEPS = 2


def config_of(method: str, family: str = "wan") -> RunConfig:
    """The preset of an embedded model, 97 frames in 2 steps, the first of them dual; `tests/launch/test_ranks.py` makes 129."""
    words = [
        f"--config={ROOT / 'configs' / f'tiny-{family}.yaml'}",
        f"--method.name={method}",
        "--method.freespec.domain=step",
        "--method.freepca.domain=step",
        "--video.num_frames=97",
        f"--sampler.num_steps={STEPS}",
        "--output.progress=off",
        "--model.device=cpu",
    ]
    return parse_run(words, name="golden", description="", add_arguments=lambda parser: None)[1]


def latents_on_ranks(rank: int, case: Case) -> Tensor:
    """This rank's latents; runs on every rank."""
    return latents_of(config_of(case.method, case.folder), Ranks(mesh=mesh_of(case.degrees)))


# Four ranks have every kind of axis that two have. LTX-Video on other numbers of ranks, Wan on two and three, and the other methods of
# both are in test_ltx_ranks and test_ranks, on smaller models.
@pytest.mark.parametrize(
    ("family", "ranks"),
    [("wan", 4), ("ltx", 4), *(pytest.param("wan", ranks, marks=pytest.mark.slow) for ranks in (2, 3, 8))],
)
def test_any_arrangement_of_ranks_makes_the_same_video(family, ranks, tmp_path):
    methods = METHODS if ranks == 3 else ("freespec",)
    few = {"ltx": [(1, 2, 2), (2, 2, 1)]}  # each axis with each other one; all of four are in test_ltx_ranks
    few |= {"wan": [(1, 8, 1), (1, 2, 4), (2, 2, 2)]} if ranks == 8 else {}  # of 8 those that fewer ranks lack
    arrangements = few.get(family) or all_degrees(ranks)
    cases = [Case(family, degrees, method) for degrees in arrangements for method in methods]
    for case, by_rank in zip(cases, run_ranks(ranks, latents_on_ranks, cases, tmp_path), strict=True):
        assert_same_video(by_rank, config_of(case.method, family), case)


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_another_seed_is_another_video(family):
    """Negative control: the tolerance distinguishes videos."""
    config = config_of("freespec", family)
    other = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, seed=config.sampler.seed + 1))
    assert relative(on_one_rank(other), on_one_rank(config)) > 0.1
