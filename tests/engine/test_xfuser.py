"""`direct` over ranks by xfuser's attention is `direct` by ours, and other methods and traces are refused in one line."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from engine.config import MethodConfig, ModelConfig, OutputConfig, ParallelConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.hooks.apply import apply_method
from engine.ranks.layouts import Ranks
from engine.spectra.trace import SpectralTrace
from parallel.mesh import build_mesh
from parallel.xfuser import XfuserAttention, xfuser_attention
from tests.parallel import xfuser_stand_in
from tests.ranks import PATIENCE, run_ranks
from tests.tiny_pipelines import random_wan, save_random_ltx, save_random_wan

PROMPT = "a red circle"


class Case(NamedTuple):
    folder: str
    provider: str
    degrees: tuple[int, int, int]
    fault: str = ""


def config_of(folder: str, provider: str) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=folder, device="cpu"),
        video=VideoConfig(num_frames=33, height=64, width=64),
        sampler=SamplerConfig(num_steps=3, guidance_scale=4.0, seed=3, max_text_tokens=20),
        method=MethodConfig(name="direct", window_frames=3),
        parallel=ParallelConfig(provider=provider),
        output=OutputConfig(progress="off"),
    )


def latents_on_ranks(_rank: int, case: Case) -> tuple[Tensor, str]:
    cfg, ring, ulysses = case.degrees
    mesh = build_mesh(cfg=cfg, ring=ring, ulysses=ulysses, device=torch.device("cpu"), timeout=PATIENCE)
    ranks = Ranks(mesh=mesh)
    if case.provider == "xfuser":
        with xfuser_stand_in.installed():
            ranks = Ranks(mesh=mesh, hybrid=xfuser_attention(mesh, kernel="auto"))
    if case.fault == "no ring":
        ranks.hybrid.layer.ring_pg = mesh.alone.group
    engine = LongVideoEngine(config_of(case.folder, case.provider), ranks)
    latents, said = engine.denoise(PROMPT).latents, ""
    if case.provider == "xfuser":
        said = refusals(engine)
        assert torch.equal(engine.denoise(PROMPT).latents, latents)  # what was refused changed nothing
    engine.close()
    return latents, said


def refusals(engine: LongVideoEngine) -> str:
    with pytest.raises(UserError, match=r"use it with method\.name direct, not freespec"):
        engine.use_method(dataclasses.replace(engine.config.method, name="freespec"))
    with pytest.raises(UserError, match="does not expose branches to trace") as caught:
        engine.denoise(PROMPT, trace=SpectralTrace())
    return str(caught.value)


@pytest.fixture(scope="module", params=["wan", "ltx"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    save = {"wan": save_random_wan, "ltx": save_random_ltx}[request.param]
    return str(save(tmp_path_factory.mktemp(request.param)))


def test_direct_by_xfuser_is_direct_by_us(folder: str, tmp_path: Path) -> None:
    layouts = [(1, 2, 1), (1, 1, 2), (2, 1, 1)]
    cases = [Case(folder, "torch", (1, 2, 1)), *(Case(folder, "xfuser", layout) for layout in layouts)]
    cases.append(Case(folder, "xfuser", (1, 2, 1), "no ring"))
    ours, *theirs, broken = run_ranks(2, latents_on_ranks, cases, tmp_path)
    for of_ranks in theirs:
        for latents, said in of_ranks:
            assert relative(latents, ours[0][0]) < 1e-5
            assert said
    assert relative(broken[0][0], ours[0][0]) > 1e-3  # negative control: each rank attends to its own tokens only


def relative(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.norm(a - b) / torch.linalg.norm(b))


@pytest.mark.parametrize("method", ["freespec", "sliding_window", "freenoise", "freelong", "freepca"])
def test_every_other_method_is_refused(method: str) -> None:
    config = config_of("nowhere", "xfuser")
    with pytest.raises(UserError, match=rf"use it with method\.name direct, not {method}"):
        dataclasses.replace(config, method=dataclasses.replace(config.method, name=method))
    with pytest.raises(UserError, match="does not expose branches to trace"):
        dataclasses.replace(config, output=OutputConfig(trace=True))


def test_ranks_that_were_joined_for_another_provider_are_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.provider is xfuser, but the ranks were joined for another one"):
        LongVideoEngine(config_of("nowhere", "xfuser"))


def refused_method(_rank: int, method: str) -> str:
    mesh = build_mesh(cfg=1, ring=1, ulysses=1, device=torch.device("cpu"), timeout=PATIENCE)
    ranks = Ranks(mesh=mesh, hybrid=XfuserAttention(layer=lambda *_args: pytest.fail("it must not be called")))
    with pytest.raises(UserError, match="computes full attention only, which is the method direct") as caught:
        apply_method(random_wan(), method=method, window_frames=3, ranks=ranks)
    return str(caught.value)


def test_a_pipeline_of_one_s_own_refuses_other_methods_too(tmp_path: Path) -> None:
    assert run_ranks(1, refused_method, ["freespec", "sliding_window"], tmp_path)
