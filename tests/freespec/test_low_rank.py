"""Low-rank reconstruction from Gram matrices is the truncated SVD, and all directions are the branch itself."""

import pytest
import torch

from freespec import spectrum
from freespec.attention import masked_ref
from freespec.methods import Branches, Grid, Layer, StepPlan
from freespec.methods.low_rank import LowRank, keep_directions, keep_directions_ref
from tests.freespec.cases import assert_same_math, features
from tests.freespec.layers import attend, draw_qkv, run_layer

GRID = Grid(frames=7, rows=1, columns=3, window_frames=3)


def kept(count: int, dim: int) -> torch.Tensor:
    return (torch.arange(dim) < count).double()


@pytest.mark.parametrize(("tokens", "dim", "count"), [(40, 8, 1), (41, 8, 3), (23, 5, 4), (40, 8, 8)])
def test_it_is_the_truncated_svd(tokens: int, dim: int, count: int) -> None:
    out = features(tokens, (2, tokens, 3, dim))
    mine = keep_directions(out, spectrum.gram(out), kept(count, dim))
    # Singular vectors come from the Gram matrix, whose condition number is the square: 1e-4 here.
    torch.testing.assert_close(mine, keep_directions_ref(out, count), rtol=0, atol=1e-12)
    assert (torch.linalg.matrix_rank(mine.transpose(1, 2), rtol=1e-6) == count).all()


def test_negative_control_the_weakest_directions_are_another_output() -> None:
    out = features(3, (1, 40, 2, 8))
    weakest = keep_directions(out, spectrum.gram(out), kept(3, 8).flip(0))
    assert (weakest - keep_directions_ref(out, 3)).abs().max() > 1e-2


@pytest.mark.parametrize("branch", ["global", "local"])
def test_with_every_direction_it_is_the_branch(branch: str) -> None:
    qkv = draw_qkv(GRID)
    out = run_layer(LowRank(ratio=1.0, branch=branch), GRID, qkv, StepPlan(mode="dual"))
    expected = {"global": attend(*qkv), "local": masked_ref(*qkv, frame_tokens=GRID.frame_tokens, window_frames=3)}
    assert_same_math(out, expected.pop(branch))
    for other in expected.values():
        assert (out - other).abs().max() > 1e-2


def test_sums_over_tokens_are_the_layer_s() -> None:
    """Two shards of the tokens with their Grams added are the whole; without the addition they are not."""
    out = features(5, (1, 40, 2, 8))
    method = LowRank(ratio=0.5)
    total = spectrum.gram(out)
    shards = out.split([17, 23], dim=1)

    def fuse(part: torch.Tensor, summed: bool) -> torch.Tensor:
        layer = Layer(grid=GRID, sum_tokens=lambda x: total if summed else x, sum_heads=lambda x: x)
        weights = method.weights(StepPlan(mode="dual"), GRID, 8, part.device)
        return method.fuse(Branches(o_local=part, o_global=part), weights, layer)

    whole = torch.cat([fuse(part, summed=True) for part in shards], dim=1)
    torch.testing.assert_close(whole, keep_directions_ref(out, 4), rtol=0, atol=1e-12)
    assert (torch.cat([fuse(part, summed=False) for part in shards], dim=1) - whole).abs().max() > 1e-3


def test_shares_become_whole_directions() -> None:
    step = StepPlan(mode="dual")
    counts = {
        ratio: int(LowRank(ratio=ratio).weights(step, GRID, 100, torch.device("cpu")).sum())
        for ratio in (0.07, 0.071, 1.0)
    }
    assert counts == {0.07: 7, 0.071: 8, 1.0: 100}
    assert LowRank(ratio=0.001).weights(step, GRID, 24, torch.device("cpu")).sum() == 1
    assert LowRank().plan([999.0, 500.0]) == [step, step]


@pytest.mark.parametrize(
    ("settings", "message"), [({"ratio": 0.0}, "ratio"), ({"ratio": 1.5}, "ratio"), ({"branch": "both"}, "branch")]
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRank(**settings)
