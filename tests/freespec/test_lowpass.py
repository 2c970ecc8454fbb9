"""FreeLong's filter and fusion against the published FFT."""

import pytest
import torch

from freespec import lowpass
from freespec.methods import FreeLong, Grid, StepPlan
from tests.freespec.cases import assert_low_precision, assert_same_math
from tests.freespec.layers import draw_qkv, run_layer
from tests.freespec.published import branches_of
from tests.freespec.published import freelong as published

# frames, rows, columns, window: odd and even axes, one of a single token, one shorter than 11 taps
CASES = [(8, 6, 4, 3), (9, 5, 7, 4), (13, 4, 3, 5), (7, 1, 2, 3)]
DUAL = StepPlan(mode="dual")


def grid_of(frames: int, rows: int, columns: int, window: int) -> Grid:
    return Grid(frames=frames, rows=rows, columns=columns, window_frames=window)


@pytest.mark.parametrize("sizes", CASES)
@pytest.mark.parametrize("compat", [False, True])
def test_freelong_is_the_published_fft(sizes: tuple[int, int, int, int], compat: bool) -> None:
    grid = grid_of(*sizes)
    qkv = draw_qkv(grid)
    made = run_layer(FreeLong(compat=compat), grid, qkv, DUAL)
    assert_same_math(made, published(*branches_of(grid, qkv), grid, uncentred=compat))


def test_the_grids_differ_for_odd_axes_only() -> None:
    """Negative control of the test above: the wrong grid and the wrong cut-off are seen."""
    for sizes, differ in (((8, 6, 4, 3), False), ((9, 6, 4, 3), True)):
        grid = grid_of(*sizes)
        qkv = draw_qkv(grid)
        centred, compat = (run_layer(FreeLong(compat=each), grid, qkv, DUAL) for each in (False, True))
        assert ((centred - compat).abs().max().item() > 1e-3) == differ
    right = published(*branches_of(grid, qkv), grid, uncentred=False)
    for wrong in (FreeLong(cutoff_time=0.24), FreeLong(cutoff_space=0.26)):
        with pytest.raises(AssertionError):
            assert_same_math(run_layer(wrong, grid, qkv, DUAL), right)
    other = run_layer(FreeLong(cutoff_time=0.3, cutoff_space=0.4), grid, qkv, DUAL)
    assert_same_math(other, published(*branches_of(grid, qkv), grid, uncentred=False, d_t=0.3, d_s=0.4))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 10, 11, 12, 15, 30, 52, 61, 81])
def test_eleven_taps_are_the_filter_to_a_thousandth(size: int) -> None:
    """On axes shorter than the taps they are folded round it."""
    exact, taps = lowpass.blur_matrix(size, 0.25), lowpass.tap_matrix(size, 0.25, 11)
    assert (exact - taps).abs().max().item() < 1e-3
    assert_same_math(taps.sum(1), torch.ones(size, dtype=torch.float64))  # a still picture passes
    assert_same_math(exact.sum(1), torch.ones(size, dtype=torch.float64))
    if size > 11:
        assert (exact - lowpass.tap_matrix(size, 0.25, 3)).abs().max().item() > 1e-3
        assert (taps[0] != 0).sum().item() == 11


def test_the_kernel_is_a_gaussian_of_a_little_more_than_a_token() -> None:
    row = lowpass.blur_matrix(81, 0.25)[0]
    expected = torch.tensor([0.3133, 0.2302, 0.0912, 0.0195, 0.0022, 0.0001], dtype=torch.float64)
    torch.testing.assert_close(row[:6], expected, rtol=0, atol=1e-4)


def test_taps_in_the_method() -> None:
    grid = grid_of(9, 4, 3, 3)
    qkv = draw_qkv(grid)
    exact, taps = (run_layer(FreeLong(taps=each), grid, qkv, DUAL) for each in (None, 11))
    assert 0 < (exact - taps).abs().max().item() < 1e-3
    assert (exact - run_layer(FreeLong(taps=3), grid, qkv, DUAL)).abs().max().item() > 1e-3  # the control


def test_a_low_precision_is_as_good_as_the_fft_in_it() -> None:
    grid = grid_of(9, 5, 4, 3)
    qkv = draw_qkv(grid)
    reference = published(*branches_of(grid, qkv), grid, uncentred=False)
    q, k, v = (x.float() for x in qkv)
    made = run_layer(FreeLong(), grid, (q, k, v), DUAL)
    by_fft = published(*branches_of(grid, (q, k, v)), grid, uncentred=False).float()
    assert_low_precision(made, by_fft, reference)
    with pytest.raises(AssertionError):  # the control: 1e-5 is seen
        assert_low_precision(made * (1 + 1e-5), by_fft, reference)


def test_settings() -> None:
    assert FreeLong().plan([900.0, 1.0]) == [DUAL] * 2
    assert FreeLong.noise == "freenoise"
    assert FreeLong().refused_axes.keys() == {"ring"}
    for settings, message in (
        ({"cutoff_time": 0.0}, "freelong: cutoff_time must be a finite number, more than 0, got 0.0"),
        ({"cutoff_space": float("nan")}, "freelong: cutoff_space must be a finite number"),
        ({"taps": 4}, "freelong: taps must be an odd number, 1 or more, got 4"),
        ({"taps": 11, "compat": True}, "set one of taps and compat"),
    ):
        with pytest.raises(ValueError, match=message):
            FreeLong(**settings)
