"""What ranks add to a video of the embedded model: at most three times what they add to direct, with every preset.

Of a prompt that the model does not know, with which it makes any difference a hundred times larger, and more with some presets.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.ranks.layouts import Ranks
from freespec import spectrum
from freespec.attention import WindowedAttention
from tests.engine.golden import LIMIT, PRESETS, Degrees, latents_of, mesh_of, on_one_rank, relative, with_method
from tests.ranks import run_ranks

PROMPT = "a_red_circle"
FUSED = tuple(f"freespec:{path.stem}" for path in sorted(PRESETS.glob("*.yaml")))
CONFIG = RunConfig(
    model=ModelConfig(path=str(Path(__file__).parents[2] / "tiny" / "wan"), device="cpu"),
    video=VideoConfig(num_frames=65, height=32, width=32),
    sampler=SamplerConfig(num_steps=10, guidance_scale=5.0, max_text_tokens=32),
    method=MethodConfig(window_frames=9),
    output=OutputConfig(progress="off"),
)


class Case(NamedTuple):
    """One method on one layout, and what is broken on purpose."""

    method: str
    degrees: Degrees
    fault: str = ""


def grams_in_fp32(o_local: Tensor, o_global: Tensor, **layer) -> tuple[Tensor, Tensor]:
    """`summed_grams` whose noise lies above the guard, where this model has features."""
    products = [o.transpose(1, 2).mT @ o.transpose(1, 2) for o in (o_local, o_global)]
    gram_local, gram_global = layer["sum_tokens"](torch.stack(products)).double().unbind(0)
    return gram_local, gram_global


FAULTS = {
    "grams": (spectrum, "summed_grams", grams_in_fp32),
    "branches": (WindowedAttention, "dual_dtype", lambda _self, q: q.dtype),
}


def run_case(_rank: int, case: Case) -> Tensor:
    """This rank's latents; runs on every rank."""
    with pytest.MonkeyPatch.context() as patch:
        if case.fault:
            patch.setattr(*FAULTS[case.fault])
        return latents_of(with_method(CONFIG, case.method), Ranks(mesh=mesh_of(case.degrees)), prompt=PROMPT)


@pytest.mark.parametrize("degrees", [(1, 3, 1), (1, 2, 2)])
def test_ranks_add_no_more_than_three_times_what_they_add_to_direct(degrees, tmp_path):
    cases = [
        Case("direct", degrees),
        *(Case(method, degrees) for method in ("sliding_window", *FUSED)),
        *(Case("freespec:lb_fixed", degrees, fault) for fault in FAULTS),
    ]
    cfg, ring, ulysses = degrees
    found = run_ranks(cfg * ring * ulysses, run_case, cases, tmp_path)
    errors = {
        case: relative(by_rank[0], on_one_rank(with_method(CONFIG, case.method), PROMPT))
        for case, by_rank in zip(cases, found, strict=True)
    }
    direct = errors.pop(cases[0])
    without_fault = {case: error for case, error in errors.items() if not case.fault}
    assert max(without_fault.values()) <= LIMIT * direct, (direct, errors)
    # The negative controls: both are needed for what the presets show.
    assert errors[Case("freespec:lb_fixed", degrees, "grams")] > LIMIT * direct
    assert errors[Case("freespec:lb_fixed", degrees, "branches")] > max(without_fault.values())
