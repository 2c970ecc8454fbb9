"""The golden test on LTX-Video: one video over any arrangement of ranks is the video of one rank."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import engine.engine
from engine.adapters.ltx import LtxAdapter
from engine.apply import Ranks
from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.load import load_pipeline
from engine.supported_layouts import check_layout
from freespec.methods import METHODS, FreeSpec
from parallel.mesh import build_mesh
from tests.engine.test_ranks import TIMEOUT, all_degrees, attend_in_chunks, relative
from tests.ranks import run_ranks
from tests.tiny_pipelines import save_random_ltx


class Case(NamedTuple):
    """One arrangement of the ranks, one method, and what is broken on purpose."""

    folder: str
    degrees: tuple[int, int, int]
    method: str
    route: str = "auto"
    fault: str = ""


def config_of(folder: str, method: str) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=folder, device="cpu"),
        # 7 latent frames of 6 x 3 tokens: no number of ranks below divides the 126 tokens into whole frames.
        video=VideoConfig(num_frames=49, height=96, width=64, fps=24),
        sampler=SamplerConfig(num_steps=4, guidance_scale=4.0, seed=3, negative_prompt="bad", max_text_tokens=20),
        method=MethodConfig(name=method, window_frames=3, freespec=FreeSpec(domain="step", split=0.5)),
        output=OutputConfig(progress="off"),
    )


def latents_on_ranks(rank: int, case: Case) -> Tensor:
    """This rank's latents; runs on every rank."""
    engine.engine.load_pipeline = functools.cache(load_pipeline)
    cfg, ring, ulysses = case.degrees
    mesh = build_mesh(cfg=cfg, ring=ring, ulysses=ulysses, device=torch.device("cpu"), timeout=TIMEOUT)
    made = LongVideoEngine(config_of(case.folder, case.method), Ranks(mesh=mesh, local_route=case.route))
    with pytest.MonkeyPatch.context() as patch:
        if case.fault == "rotary of the first tokens":
            patch.setattr(
                LtxAdapter, "shard_rotary", lambda self, tables, start, length: tuple(t[:, :length] for t in tables)
            )
        if case.fault == "swapped passes":
            guide = LtxAdapter.guide
            patch.setattr(LtxAdapter, "guide", lambda self, parts, scale: guide(self, parts[::-1], scale))
        latents = made.denoise("a red circle").latents
    made.close()
    return latents


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_random_ltx(tmp_path_factory.mktemp("ltx")))


@functools.cache
def on_one_rank(folder: str, method: str) -> Tensor:
    made = LongVideoEngine(config_of(folder, method))
    latents = made.denoise("a red circle").latents
    made.close()
    return latents


@functools.cache
def noise_floor(folder: str, method: str) -> float:
    """Relative change of one rank's latents when each attention call takes its keys in three chunks."""
    made = LongVideoEngine(config_of(folder, method))
    select = engine.engine.select_kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.hooks.select_kernel", lambda *arguments: attend_in_chunks(select(*arguments)))
        latents = made.denoise("a red circle").latents
    made.close()
    return relative(latents, on_one_rank(folder, method))


def serves(method: str, degrees: tuple[int, int, int]) -> bool:
    try:
        check_layout(method, config_of("", method).method.method, degrees)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_arrangement_of_ranks_makes_the_same_video(folder, ranks, tmp_path):
    # Every method on two ranks; on three, which divide neither tokens nor heads, and on four those whose paths differ.
    methods = {2: tuple(METHODS), 3: ("freespec",), 4: ("direct", "freespec")}[ranks]
    cases = [
        Case(folder, degrees, method) for degrees in all_degrees(ranks) for method in methods if serves(method, degrees)
    ]
    assert {case.method for case in cases} == set(methods)
    cases += [Case(folder, all_degrees(ranks)[0], "freespec", "all_to_all")]
    for case, by_rank in zip(cases, run_ranks(ranks, latents_on_ranks, cases, tmp_path), strict=True):
        for latents in by_rank[1:]:
            assert torch.equal(latents, by_rank[0]), case
        error = relative(by_rank[0], on_one_rank(folder, case.method))
        assert error <= 1e-5, (case, error)
        assert error <= 10 * noise_floor(folder, case.method), (case, error, noise_floor(folder, case.method))


def test_what_is_broken_is_seen(folder, tmp_path):
    cases = [
        Case(folder, (1, 2, 1), "freespec", fault="rotary of the first tokens"),
        Case(folder, (2, 1, 1), "freespec", fault="swapped passes"),
    ]
    for [first, _] in run_ranks(2, latents_on_ranks, cases, tmp_path):
        assert relative(first, on_one_rank(folder, "freespec")) > 1e-3


def test_another_seed_is_another_video(folder: Path):
    """Negative control: the tolerance tells videos apart."""
    config = config_of(str(folder), "freespec")
    made = LongVideoEngine(dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, seed=4)))
    assert relative(made.denoise("a red circle").latents, on_one_rank(folder, "freespec")) > 0.1
    made.close()
