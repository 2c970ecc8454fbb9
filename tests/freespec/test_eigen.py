"""Matrices that are not finite: not a number out, no error, and nothing else changed."""

from collections.abc import Callable

import pytest
import torch

from freespec import eigen, spectrum
from freespec.methods import FreeSpec, Grid, StepPlan
from tests.freespec.cases import features
from tests.freespec.layers import fuse_spectra


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_that_is_not_finite_leaves_the_others_bit_for_bit(bad: float) -> None:
    grams = spectrum.gram(features(0, (2, 20, 3, 4)))
    expected = (*torch.linalg.eigh(grams), torch.linalg.eigvalsh(grams))
    broken = grams.clone()
    broken[1, 2, 3, 0] = bad
    for of_broken, whole in zip((*eigen.eigh(broken), eigen.eigvalsh(broken)), expected, strict=True):
        assert of_broken[1, 2].isnan().all()
        of_broken[1, 2] = whole[1, 2]
        assert torch.equal(of_broken, whole)
    decompositions: tuple[Callable, ...] = (torch.linalg.eigh, torch.linalg.eigvalsh)
    for decompose in decompositions:
        with pytest.raises(torch.linalg.LinAlgError):  # what this is for
            decompose(broken)


@pytest.mark.parametrize("basis", ["local", "global"])
@pytest.mark.parametrize("branch", [0, 1])
def test_a_head_that_overflowed_is_not_a_number_after_the_fusion(basis: str, branch: int) -> None:
    outputs = [features(seed, (1, 20, 3, 4)) for seed in (0, 1)]
    method = FreeSpec(basis=basis, residual="none")
    grid = Grid(frames=20, rows=1, columns=1, window_frames=5)
    weights = method.weights(StepPlan(mode="dual", progress=0.3), grid, 4, torch.device("cpu"))
    whole = fuse_spectra(method, *outputs, weights)
    outputs[branch][0, 7, 1, 2] = torch.inf
    fused = fuse_spectra(method, *outputs, weights)
    assert fused[:, :, 1].isnan().all()
    assert torch.equal(fused[:, :, ::2], whole[:, :, ::2])
