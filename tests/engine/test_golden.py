"""The golden test on the embedded model: its 4x-long video over any arrangement of ranks is the video of one rank."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import engine.engine
from engine.apply import Ranks
from engine.config import RunConfig
from engine.engine import LongVideoEngine
from engine.load import load_pipeline
from launch.cli import parse_run
from parallel.mesh import build_mesh
from tests.engine.test_ranks import METHODS, TIMEOUT, Case, all_degrees, attend_in_chunks, relative
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent.parent
PROMPT = "a red circle bounces over a blue background"
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
    engine.engine.load_pipeline = functools.cache(load_pipeline)
    cfg, ring, ulysses = case.degrees
    mesh = build_mesh(cfg=cfg, ring=ring, ulysses=ulysses, device=torch.device("cpu"), timeout=TIMEOUT)
    return LongVideoEngine(config_of(case.method), Ranks(mesh=mesh)).denoise(PROMPT).latents


@functools.cache
def on_one_rank(method: str) -> Tensor:
    made = LongVideoEngine(config_of(method))
    latents = made.denoise(PROMPT).latents
    made.close()
    return latents


@functools.cache
def noise_floor(method: str) -> float:
    """Relative change of one rank's latents when each attention call takes its keys in three chunks."""
    made = LongVideoEngine(config_of(method))
    with pytest.MonkeyPatch.context() as patch:
        select = engine.engine.select_kernel
        patch.setattr("engine.hooks.select_kernel", lambda *arguments: attend_in_chunks(select(*arguments)))
        latents = made.denoise(PROMPT).latents
    made.close()
    return relative(latents, on_one_rank(method))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_any_arrangement_of_ranks_makes_the_same_video(ranks, tmp_path):
    # The other methods are in test_ranks, on a smaller model.
    cases = [Case("", degrees, method) for degrees in all_degrees(ranks) for method in METHODS]
    for case, by_rank in zip(cases, run_ranks(ranks, latents_on_ranks, cases, tmp_path), strict=True):
        for latents in by_rank[1:]:
            assert torch.equal(latents, by_rank[0]), case
        error = relative(by_rank[0], on_one_rank(case.method))
        assert error <= min(1e-5, 10 * noise_floor(case.method)), (case, error, noise_floor(case.method))


def test_another_seed_is_another_video():
    """Negative control: the tolerance tells videos apart."""
    config = config_of("freespec")
    other = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, seed=config.sampler.seed + 1))
    made = LongVideoEngine(other)
    assert relative(made.denoise(PROMPT).latents, on_one_rank("freespec")) > 0.1
    made.close()
