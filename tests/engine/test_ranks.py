"""The golden test: one video over any arrangement of ranks is the video of one rank."""

import dataclasses
import math
import re

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor

import engine.hooks.cross_attention
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
from engine.errors import UserError
from engine.ranks.agreement import raise_together
from engine.ranks.layouts import Ranks, refused_axes
from freespec.methods import LVSA, FreeLOC, FreePCA, FreeSpec, Method, make_method
from freespec.riflex import Riflex
from freespec.timeline import attend
from tests.engine.golden import (
    PRESETS,
    PROMPT,
    TIMELINE,
    Case,
    all_degrees,
    assert_same_video,
    latents_of,
    mesh_of,
    on_one_rank,
    relative,
    with_method,
)
from tests.ranks import run_ranks
from tests.tiny_pipelines import save_random_wan

METHODS = ("direct", "sliding_window", "freespec")  # in any arrangement
ROWS = tuple(f"freespec:{path.stem}" for path in sorted(PRESETS.glob("*.yaml")))
WHOLE_HEADS = ("freenoise", "freelong", "freelong_pp", "freepca", "ultravico", "lvsa", "freeloc")  # where ring is 1


def config_of(folder: str, method: str) -> RunConfig:
    method, _, riflex = method.partition("+")
    config = RunConfig(
        model=ModelConfig(path=folder, device="cpu"),
        # 8 latent frames of 5 x 3 tokens: no number of ranks below divides the 120 tokens into whole frames.
        video=VideoConfig(num_frames=29, height=80, width=48),
        sampler=SamplerConfig(num_steps=2, guidance_scale=4.0, seed=3, negative_prompt="bad", max_text_tokens=20),
        # FreePCA's default stride of 1 gives 6 views; half of the steps fuse them.
        method=MethodConfig(
            window_frames=3,
            freespec=FreeSpec(domain="step", fused_share=0.5),
            freepca=FreePCA(domain="step", fused_share=0.5),
            lvsa=LVSA(half_width=1),
            freeloc=FreeLOC(sparse_layers=(1,)),
        ),
        attention=AttentionConfig(riflex=Riflex(enabled=True, index=1) if riflex else Riflex()),
        output=OutputConfig(progress="off"),
    )
    return with_method(config, method)


def methods_on(degrees: tuple[int, int, int]) -> tuple[str, ...]:
    """The methods that are run on a layout.

    cfg asks nothing of a method, so the second kind is run with it on 4 ranks only; on 8, the one that has both branches.
    """
    for method in WHOLE_HEADS:
        assert bool(refused_axes(make_method(method).refused_axes, degrees)) == (degrees[1] > 1)
    if math.prod(degrees) == 8:
        return ("freespec",)
    return METHODS + WHOLE_HEADS if degrees[:2] == (1, 1) or degrees == (2, 1, 2) else METHODS


def latents_on_ranks(rank: int, case: Case) -> Tensor:
    """This rank's latents; runs on every rank."""
    ranks = Ranks(mesh=mesh_of(case.degrees), local_route=case.route)
    with pytest.MonkeyPatch.context() as patch:
        if case.fault == "frames of the first rank":
            patch.setattr(
                engine.hooks.cross_attention, "attend", lambda *args, **kwargs: attend(*args, **kwargs | {"q_start": 0})
            )
        return latents_of(config_of(case.folder, case.method), ranks, case.prompt)


def broken_on_ranks(rank: int, case: Case) -> Tensor | str:
    """This rank's latents or its one line; runs on every rank."""
    mesh = mesh_of(case.degrees)
    config = config_of(case.folder, case.method)
    if case.fault == "seed" and rank == 1:
        config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, seed=4))
    if case.fault == "no weights" and rank == 1:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=f"{case.folder}/none"))
    try:
        made = LongVideoEngine(config, Ranks(mesh=mesh, local_route=case.route))
    except UserError as error:
        return str(error)
    break_on_purpose(made, case.fault)
    try:
        return made.denoise(PROMPT).latents
    except UserError as error:
        return str(error)


def break_on_purpose(made: LongVideoEngine, fault: str) -> None:
    if fault == "first block cache":
        made.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    if fault == "overflow":
        values = made.pipe.transformer.blocks[0].attn1.to_v
        channel = torch.tensor([values.out_features - 1])
        values.register_forward_hook(lambda _module, _args, out: out.index_fill(2, channel, torch.inf))
    if fault == "unreduced Grams":
        replace_method(made, UnreducedFreeSpec(domain="step", fused_share=0.5))
    if fault == "heads not summed":
        replace_method(made, UnsummedFreePCA(domain="step", fused_share=0.5))


def replace_method(made: LongVideoEngine, method: Method) -> None:
    state = made.handle.state
    state.setup = dataclasses.replace(state.setup, method=method)


class UnreducedFreeSpec(FreeSpec):
    """FreeSpec that forgets the other ranks' tokens."""

    def fuse(self, branches, weights, layer):
        return super().fuse(branches, weights, dataclasses.replace(layer, sum_tokens=lambda total: total))


class UnsummedFreePCA(FreePCA):
    """FreePCA that forgets the other ranks' heads: each rank chooses components of its own."""

    def fuse(self, branches, weights, layer):
        return super().fuse(branches, weights, dataclasses.replace(layer, sum_heads=lambda total: total))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_random_wan(tmp_path_factory.mktemp("wan")))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_any_arrangement_of_ranks_makes_the_same_video(folder, ranks, tmp_path):
    every = all_degrees(ranks)
    cases = [Case(folder, degrees, method) for degrees in every for method in methods_on(degrees)]
    cases += [Case(folder, every[0], "freespec", route) for route in ("halo", "all_to_all")]
    layouts = {3: [(1, 3, 1)], 4: [(1, 2, 2)]}.get(ranks, [])
    cases += [Case(folder, degrees, row) for degrees in layouts for row in ROWS]
    timed = [(degrees, "freespec") for degrees in (every if ranks < 8 else every[-1:])]
    timed += [(every[-1], method) for method in METHODS if method != "freespec" and ranks < 8]
    cases += [Case(folder, *each, prompt=TIMELINE["wan"]) for each in timed]
    if ranks == 2:
        cases += [Case(folder, degrees, "freespec+riflex") for degrees in ((1, 1, 2), (1, 2, 1))]
    for case, by_rank in zip(cases, run_ranks(ranks, latents_on_ranks, cases, tmp_path), strict=True):
        assert_same_video(by_rank, config_of(case.folder, case.method), case)


def test_negative_control_rank_with_wrong_frames(folder, tmp_path):
    prompt = TIMELINE["wan"]
    case = Case(folder, (1, 1, 2), "freespec", fault="frames of the first rank", prompt=prompt)
    [[first, _]] = run_ranks(2, latents_on_ranks, [case], tmp_path)
    assert relative(first, on_one_rank(config_of(folder, "freespec"), prompt)) > 1e-3


def test_negative_control_wrong_sum_over_ranks(folder, tmp_path):
    cases = [Case(folder, (1, 2, 1), "freespec", fault="unreduced Grams")]
    [[first, _]] = run_ranks(2, broken_on_ranks, cases, tmp_path)
    assert relative(first, on_one_rank(config_of(folder, "freespec"))) > 1e-4  # thirty times the tolerance


def test_negative_control_components_chosen_per_rank(folder, tmp_path):
    cases = [Case(folder, (1, 1, 2), "freepca", fault="heads not summed")]
    [[first, _]] = run_ranks(2, broken_on_ranks, cases, tmp_path)
    assert relative(first, on_one_rank(config_of(folder, "freepca"))) > 1e-4


def test_riflex_makes_another_video(folder):
    """Negative control of the cases with it above."""
    assert (
        relative(on_one_rank(config_of(folder, "freespec+riflex")), on_one_rank(config_of(folder, "freespec"))) > 1e-3
    )


def test_a_layout_that_a_method_cannot_have_is_refused_by_all_ranks(folder, tmp_path):
    methods = ("freenoise", "freelong", "freelong_pp", "freepca", "freeloc")
    cases = [Case(folder, (1, 2, 1), method) for method in methods]
    for method, (first, second) in zip(methods, run_ranks(2, broken_on_ranks, cases, tmp_path), strict=True):
        assert first == second
        assert re.fullmatch(
            f"{method} cannot run as cfg 1 x ring 2 x ulysses 1: ring must be 1, as its [a-z -]+ all tokens of a "
            "head on one rank; the nearest layout that works is cfg 1 x ring 1 x ulysses 2",
            first,
        )


def test_ranks_that_disagree_all_say_so(folder, tmp_path):
    cases = [Case(folder, (1, 1, 2), "freespec", fault="seed"), Case(folder, (1, 1, 2), "freespec", fault="no weights")]
    seeds, weights = run_ranks(2, broken_on_ranks, cases, tmp_path)
    expected = "rank 1 has another seed than rank 0; start all ranks with the same command and files"
    assert seeds == [expected, expected]
    assert weights[0] == weights[1]
    assert weights[0].startswith("rank 1: model.path")


FAULTS = {
    "no words": TimeoutError(),
    "many words": UserError("ö" * 3000),
    "a name that is no text": FileNotFoundError(2, "No such file or directory", "a\udcff.safetensors"),
}


def fail_on_rank_1(rank: int, fault: str) -> str:
    """What this rank hears of a fault of rank 1."""

    def act() -> str:
        if rank == 1:
            raise FAULTS[fault]
        return "nothing"

    try:
        return raise_together(mesh_of((1, 1, 2)), act)
    except UserError as error:
        return str(error)


def test_a_fault_of_one_rank_reaches_all_whole(tmp_path):
    said = dict(zip(FAULTS, run_ranks(2, fail_on_rank_1, list(FAULTS), tmp_path), strict=True))
    assert said["no words"] == ["rank 1: TimeoutError"] * 2
    assert said["many words"] == ["rank 1: " + "ö" * 3000] * 2
    assert said["a name that is no text"] == ["rank 1: [Errno 2] No such file or directory: 'a\\udcff.safetensors'"] * 2


def test_a_cache_that_each_rank_would_decide_for_itself_is_refused(folder, tmp_path):
    cases = [Case(folder, degrees, "freespec", fault="first block cache") for degrees in ((1, 1, 2), (2, 1, 1))]
    for by_rank in run_ranks(2, broken_on_ranks, cases, tmp_path):
        for message in by_rank:
            assert message.startswith("FirstBlockCache: not known to decide the same on every rank"), message


def test_latents_that_are_not_finite_end_all_ranks_with_one_line(folder, tmp_path):
    """Values of the last head only: over ulysses another rank's, which must not leave the others waiting for it."""
    cases = [Case(folder, (1, 1, 2), method, fault="overflow") for method in ("freespec", "freepca")]
    cases += [Case(folder, degrees, "freespec", fault="overflow") for degrees in ((1, 2, 1), (2, 1, 1))]
    for first, second in run_ranks(2, broken_on_ranks, cases, tmp_path):
        assert first == second
        assert re.match(r"\d+ of 7680 numbers of the latents are not finite after step 1 of 2 in float32; try", first)
