"""Progress and weights over the denoising steps."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freespec.methods import FreeSpec, Grid
from freespec.schedule import fusion_progress, rank_weight, residual_weight, time_weight
from tests.freespec.cases import SAME_MATH, assert_same_math, drawn

GRID = Grid(frames=9, rows=1, columns=1, window_frames=3)  # FreeSpec's weights do not look at it


def wan_timesteps(num_steps: int, shift: float) -> list[float]:
    """Timesteps of a flow-matching schedule, 1000 = pure noise."""
    sigmas = [1 - i / num_steps for i in range(num_steps)]
    return [1000 * shift * s / (1 + (shift - 1) * s) for s in sigmas]


def check_falling(weights: list[list[float]]) -> None:
    """g[step][rank] falls in both, from 1."""
    assert weights[0][0] == 1.0
    for step in weights:
        assert all(a > b for a, b in itertools.pairwise(step))
    for early, late in itertools.pairwise(weights):
        assert all(a > b for a, b in zip(early, late, strict=True))


def weights_over_steps(method: FreeSpec, num_steps: int, shift: float, dim: int) -> list[list[float]]:
    plan = [step for step in method.plan(wan_timesteps(num_steps, shift)) if step.mode == "dual"]
    return [method.weights(step, GRID, dim, torch.device("cpu")).rank.tolist() for step in plan]


@drawn
@given(
    num_steps=st.integers(2, 30),
    shift=st.sampled_from([1.0, 3.0, 8.0]),
    dim=st.integers(2, 16),
    fused_share=st.floats(0, 1),
)
@pytest.mark.parametrize("domain", ["timestep", "step"])
def test_weight_falls_in_rank_and_time(domain: str, num_steps: int, shift: float, dim: int, fused_share: float) -> None:
    weights = weights_over_steps(FreeSpec(domain=domain, fused_share=fused_share), num_steps, shift, dim)
    if weights:
        check_falling(weights)


@pytest.mark.parametrize("switch", ["time", "rank"])
def test_negative_control_of_falling_weights(switch: str) -> None:
    with pytest.raises(AssertionError):
        check_falling(weights_over_steps(FreeSpec(**{switch: False}), 10, 3.0, 8))


def test_progress_by_timestep() -> None:
    """p = (T - t) / (T - s), and t = s still fuses."""
    assert fusion_progress([1000, 900, 750, 500, 499, 0], domain="timestep", fused_share=0.5) == [
        0,
        0.2,
        0.5,
        1,
        None,
        None,
    ]
    assert fusion_progress([1000, 200], domain="timestep", fused_share=0.8) == [0, 1]
    assert fusion_progress([1000, 999], domain="timestep", fused_share=0.0) == [None, None]
    assert fusion_progress([1000, 0], domain="timestep", fused_share=1.0) == [0, 1]


def test_progress_by_step() -> None:
    """The first ceil(fused_share n) steps fuse, step i at p = i / n_d."""
    assert fusion_progress([9, 8, 7, 6, 5], domain="step", fused_share=0.5) == [0, 1 / 3, 2 / 3, None, None]
    assert fusion_progress([9, 8], domain="step", fused_share=0.0) == [None, None]
    assert fusion_progress([9, 8], domain="step", fused_share=1.0) == [0, 0.5]


@pytest.mark.parametrize(
    ("fused_share", "num_steps", "num_dual"), [(0.56, 50, 28), (0.07, 100, 7), (0.29, 100, 29), (0.5, 3, 2)]
)
def test_rounding_makes_no_extra_step(fused_share: float, num_steps: int, num_dual: int) -> None:
    progress = fusion_progress([0.0] * num_steps, domain="step", fused_share=fused_share)
    assert sum(p is not None for p in progress) == num_dual


def test_a_large_shift_makes_most_steps_dual() -> None:
    """Wan with shift 8: about 90 % of the steps lie above half of T, against half of the steps by number."""
    shifted = wan_timesteps(50, 8.0)
    assert sum(p is not None for p in fusion_progress(shifted, domain="timestep", fused_share=0.5)) in range(43, 47)
    assert sum(p is not None for p in fusion_progress(shifted, domain="step", fused_share=0.5)) == 25


@pytest.mark.parametrize(
    ("domain", "fused_share", "message"),
    [("sigma", 0.5, "unknown domain 'sigma'; choose timestep or step"), ("step", 1.5, r"\[0, 1\], got 1.5")],
)
def test_progress_errors(domain: str, fused_share: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fusion_progress([1000.0], domain=domain, fused_share=fused_share)


def test_time_weight() -> None:
    assert [time_weight(p, 5.0) for p in (0.0, 1.0)] == [1.0, math.exp(-5.0)]
    assert time_weight(0.7, 0.0) == 1.0


def test_rank_weight() -> None:
    expected = torch.tensor([math.exp(-3.0 * r / 4) for r in range(5)], dtype=torch.float64)
    assert_same_math(rank_weight(5, 3.0), expected)
    assert torch.equal(rank_weight(4, 0.0), torch.ones(4, dtype=torch.float64))
    assert torch.equal(rank_weight(1, 3.0), torch.ones(1, dtype=torch.float64))
    with pytest.raises(AssertionError):  # the control: normalised by R, not by R - 1
        assert_same_math(torch.exp(-3.0 * torch.arange(5, dtype=torch.float64) / 5), expected)


def test_residual_weight() -> None:
    assert residual_weight(0.0, start=0.2, end=0.05, alpha=5.0) == pytest.approx(0.2, abs=SAME_MATH)
    expected = 0.05 + 0.15 * math.exp(-5.0)
    assert residual_weight(1.0, start=0.2, end=0.05, alpha=5.0) == pytest.approx(expected, abs=SAME_MATH)
    assert residual_weight(0.4, start=0.2, end=0.05, alpha=0.0) == pytest.approx(0.2, abs=SAME_MATH)
