"""What ranks add to a video of the embedded model: nothing where a ring's keys are gathered, in each step rounding where they are passed on.

Of a prompt that the model does not know. It lets any difference grow a hundredfold over a run, and with some presets more than
with others.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import engine.hooks.step_hook
from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.ranks.layouts import Ranks
from freespec import spectrum
from tests.engine.golden import (
    LIMIT,
    PRESETS,
    Degrees,
    keys_in_three_chunks,
    latents_of,
    mesh_of,
    on_one_rank,
    relative,
    with_method,
)
from tests.ranks import run_ranks

PROMPT = "a_red_circle"  # words that the model does not know, with which rounding grows
METHODS = ("direct", "sliding_window", "freespec:ta", "freespec:gb")
OTHERS = tuple(row for path in sorted(PRESETS.glob("*.yaml")) if (row := f"freespec:{path.stem}") not in METHODS)
CONFIG = RunConfig(
    model=ModelConfig(path=str(Path(__file__).parents[2] / "tiny" / "wan"), device="cpu"),
    video=VideoConfig(num_frames=65, height=32, width=32),
    sampler=SamplerConfig(num_steps=2, guidance_scale=5.0, max_text_tokens=32),
    method=MethodConfig(window_frames=9),
    output=OutputConfig(progress="off"),
)
UNEVEN = replace(CONFIG, video=replace(CONFIG.video, height=48, width=48))  # 9 tokens of a frame, 153 in all


def grams_in_fp32(o_local: Tensor, o_global: Tensor, **layer: Any) -> tuple[Tensor, Tensor]:
    """`summed_grams` whose noise lies above the guard, where this model has features."""
    products = [o.transpose(1, 2).mT @ o.transpose(1, 2) for o in (o_local, o_global)]
    gram_local, gram_global = layer["sum_tokens"](torch.stack(products)).double().unbind(0)
    return gram_local, gram_global


class Forward(NamedTuple):
    """One call of the transformer: the latents that it was given, and its prediction."""

    latents: Tensor
    prediction: Tensor


class Case(NamedTuple):
    """One method on one layout, which gathers a ring's keys or passes them on as a GPU does; the file of its undisturbed forwards."""

    method: str
    degrees: Degrees
    file: str = ""
    gathers: bool = True
    exact_grams: bool = True

    @contextmanager
    def arranged(self) -> Iterator[Ranks]:
        """The ranks of this case."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.hooks.step_hook, "gathers_keys", lambda _device: self.gathers)
            if not self.exact_grams:
                patch.setattr(spectrum, "summed_grams", grams_in_fp32)
            yield Ranks(mesh=mesh_of(self.degrees))


@contextmanager
def observed(transformer: nn.Module, given: Sequence[Forward] = ()) -> Iterator[list[Forward]]:
    """The forwards inside the block; where they are given, each gets the latents of that number in place of its own."""
    seen: list[Forward] = []

    def put(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | ({"hidden_states": given[len(seen)].latents} if given else {})

    def keep(_module: nn.Module, _args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        seen.append(Forward(kwargs["hidden_states"].clone(), output[0].clone()))

    hooks = [
        transformer.register_forward_pre_hook(put, with_kwargs=True, prepend=True),
        transformer.register_forward_hook(keep, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def forwards(method: str, ranks: Ranks | None = None, given: Sequence[Forward] = ()) -> list[Forward]:
    """Every forward of a run of this method."""
    engine = LongVideoEngine(with_method(CONFIG, method), ranks)
    try:
        with observed(engine.pipe.transformer, given) as seen:
            engine.denoise(PROMPT)
    finally:
        engine.close()
    return seen


def errors_on_ranks(rank: int, case: Case) -> list[float]:
    """Relative error of every prediction from the latents of the undisturbed run; runs on every rank."""
    given = [Forward(*pair) for pair in torch.load(case.file)]
    with case.arranged() as ranks:
        found = forwards(case.method, ranks, given)
    return [relative(a.prediction, b.prediction) for a, b in zip(found, given, strict=True)]


class Undisturbed(dict[str, str]):
    """Files with the forwards of one rank by method, made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, method: str) -> str:
        self[method] = str(self._folder / f"{method.replace(':', '-')}.pt")
        torch.save([tuple(each) for each in forwards(method)], self[method])
        return self[method]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("forwards"))


@pytest.fixture(scope="module")
def floor(undisturbed: Undisturbed) -> float:
    """The error of direct when each attention call takes its keys in three chunks, a mean over the forwards."""
    given = [Forward(*pair) for pair in torch.load(undisturbed["direct"])]
    with keys_in_three_chunks():
        found = forwards("direct", given=given)
    return mean([relative(a.prediction, b.prediction) for a, b in zip(found, given, strict=True)])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("methods", [METHODS, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["some", "others"])
def test_a_step_on_ranks_adds_no_more_than_rounding_does_to_direct(undisturbed, floor, tmp_path, methods):
    cases = [Case(method, (1, 2, 2), undisturbed[method], gathers=False) for method in methods]
    for case, by_rank in zip(cases, run_ranks(4, errors_on_ranks, cases, tmp_path), strict=True):
        assert len(by_rank[0]) == 4
        assert mean(by_rank[0]) <= LIMIT * floor, (case, mean(by_rank[0]), floor)


def test_negative_control_grams_in_fp32(undisturbed, floor, tmp_path):
    """The negative control: their noise lies above the guard, where this model has features."""
    case = Case("freespec:gb", (1, 2, 1), undisturbed["freespec:gb"], gathers=False, exact_grams=False)
    [[errors, _]] = run_ranks(2, errors_on_ranks, [case], tmp_path)
    assert mean(errors) > 2 * LIMIT * floor


def latents_on_ranks(_rank: int, case: Case) -> Tensor:
    """This rank's latents of a whole run; runs on every rank."""
    with case.arranged() as ranks:
        return latents_of(with_method(UNEVEN, case.method), ranks, prompt=PROMPT)


def test_a_run_on_ranks_has_the_bits_of_one(tmp_path):
    degrees = (1, 3, 1)
    control = Case("direct", degrees, gathers=False)
    cases = [
        *(Case(method, degrees) for method in ("direct", "freespec:ta", "freespec:gb")),
        control,
    ]
    for case, by_rank in zip(cases, run_ranks(3, latents_on_ranks, cases, tmp_path), strict=True):
        same = torch.equal(by_rank[0], on_one_rank(with_method(UNEVEN, case.method), PROMPT))
        assert same == (case is not control), case


def test_negative_control_another_method(undisturbed, floor):
    """The negative control of the comparison itself."""
    given = [Forward(*pair) for pair in torch.load(undisturbed["sliding_window"])]
    found = forwards("direct", given=given)
    assert min(relative(a.prediction, b.prediction) for a, b in zip(found, given, strict=True)) > 1e-3
