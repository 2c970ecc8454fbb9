"""Every method on two ranks, with and without a timeline, on the models whose own tests of ranks run few of them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from engine.config import RunConfig
from engine.given.frames import GivenFrames, parse_given
from engine.ranks.layouts import Ranks
from freespec.methods import LVSA, METHODS
from tests.engine import test_ltx_pictures, test_pictures, test_token_timesteps, test_two_experts
from tests.engine.golden import PROMPT, first_picture, latents_of, mesh_of, on_one_rank, relative
from tests.launch.test_presets_on_ranks import as_condition, random_ltx_condition
from tests.ranks import run_ranks
from tests.tiny_pipelines import random_i2v, random_ti2v, random_wan22

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' code with numpy 2

TIMELINE = "a circle [0-12] | a star [12-18, cut] | a square [18-, relay 5]"


class Kind(NamedTuple):
    """A small model, the configuration of a run of 8 latent frames, and the places of its pictures."""

    make: Callable[[], DiffusionPipeline]
    config_of: Callable[..., RunConfig]
    pictures: tuple[str, ...] = ()


KINDS = {
    "a14b": Kind(random_wan22, test_two_experts.config_of),
    "5b": Kind(random_ti2v, test_token_timesteps.config_of, ("first",)),
    "i2v": Kind(random_i2v, test_pictures.config_of, ("first",)),
    "flf2v": Kind(lambda: random_i2v("flf2v"), test_pictures.config_of, ("first", "last")),
    "a14b-i2v": Kind(lambda: random_i2v("a14b"), test_pictures.config_of, ("first",)),
    "ltx": Kind(random_ltx_condition, test_ltx_pictures.config_of, ("first", "last")),
}


class Case(NamedTuple):
    folder: str
    kind: str
    method: str
    prompt: str

    @property
    def config(self) -> RunConfig:
        config = KINDS[self.kind].config_of(Path(self.folder), method=self.method)
        lvsa = LVSA(half_width=0)  # by default it sees all frames of so short a video
        return dataclasses.replace(config, method=dataclasses.replace(config.method, lvsa=lvsa))

    @property
    def given(self) -> GivenFrames | None:
        """The pictures; to freeloc, which refuses those at later frames of LTX-Video, the first alone."""
        places = KINDS[self.kind].pictures[: 1 if (self.kind, self.method) == ("ltx", "freeloc") else None]
        words = [f"{place}={Path(self.folder) / place}.png" for place in places]
        return parse_given(words, None) if words else None

    @property
    def alone(self) -> Tensor:
        """The latents of one rank."""
        return on_one_rank(self.config, self.prompt, self.given)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        KINDS[kind].make().save_pretrained(folder)
        video = KINDS[kind].config_of(folder).video
        for seed, place in enumerate(KINDS[kind].pictures):
            first_picture(folder / f"{place}.png", video.height, video.width, where=place, seed=seed)
    as_condition(made["ltx"])
    return made


def on_ranks(_rank: int, case: Case) -> Tensor:
    return latents_of(case.config, Ranks(mesh=mesh_of((1, 1, 2))), case.prompt, case.given)


@pytest.mark.parametrize(
    ("kinds", "methods", "prompts"),
    [
        (("a14b", "5b", "i2v", "ltx"), ("freepca",), (PROMPT,)),
        pytest.param(tuple(KINDS), tuple(METHODS), (PROMPT, TIMELINE), marks=pytest.mark.slow),
    ],
    ids=["one", "every"],
)
def test_two_ranks_make_the_video_of_one(
    folders: dict[str, Path],
    kinds: tuple[str, ...],
    methods: tuple[str, ...],
    prompts: tuple[str, ...],
    tmp_path: Path,
) -> None:
    """To the bit; and each method and timeline makes another video."""
    cases = [
        Case(str(folders[kind]), kind, method, prompt) for kind in kinds for method in methods for prompt in prompts
    ]
    for case, by_rank in zip(cases, run_ranks(2, on_ranks, cases, tmp_path), strict=True):
        assert all(torch.equal(latents, case.alone) for latents in by_rank), case
        if case.method != "direct":
            assert relative(case.alone, case._replace(method="direct").alone) > 1e-4, case
        if case.prompt != PROMPT:
            assert relative(case.alone, case._replace(prompt=PROMPT).alone) > 1e-4, case
