"""FreeLong++ against masks and band-pass filters written out; the published windows and bands."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from freespec.methods import FreeLongPP, Grid, StepPlan
from tests.freespec.cases import assert_same_math
from tests.freespec.layers import QKV, draw_qkv, run_layer

STEP = StepPlan(mode="frames")
CASES = [
    (Grid(frames=13, rows=3, columns=4, window_frames=4), FreeLongPP(), (1, 2, 4)),
    (Grid(frames=9, rows=2, columns=5, window_frames=5), FreeLongPP(cutoff_time=0.7, cutoff_space=0.4), (1, 2)),
    (Grid(frames=11, rows=1, columns=3, window_frames=2), FreeLongPP(key_stride=2), (1, 2, 4, 8)),
]


def branch(qkv: QKV, grid: Grid, width: int, key_stride: int = 1) -> Tensor:
    """Attention in windows of so many frames, shifted at the ends, by a mask; over every `key_stride`-th frame if all are seen."""
    q, k, v = qkv
    frame = torch.arange(grid.tokens) // grid.frame_tokens
    start = (frame - width // 2).clamp(0, max(grid.frames - width, 0))
    seen = (frame >= start[:, None]) & (frame < start[:, None] + width)
    if width >= grid.frames:
        seen &= frame % key_stride == 0
    logits = torch.einsum("bsnd,btnd->bnst", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnst,btnd->bsnd", logits.masked_fill(~seen, float("-inf")).softmax(-1), v)


def bands(grid: Grid, method: FreeLongPP, scales: Sequence[int]) -> list[Tensor]:
    """The filter [F, H, W] of each scale: what the low-pass filter of its own cut-off passes, and that of the next wider one does not."""
    t, h, w = (2 * torch.fft.fftfreq(size, dtype=torch.float64) for size in (grid.frames, grid.rows, grid.columns))

    def low(scale: int) -> Tensor:
        time = (t / (method.cutoff_time / scale)) ** 2
        space = (h / method.cutoff_space)[:, None] ** 2 + (w / method.cutoff_space) ** 2
        return torch.exp(-0.5 * (time[:, None, None] + space))

    passed = [torch.ones(grid.frames, grid.rows, grid.columns, dtype=torch.float64), *map(low, scales[1:])]
    return [here - wider for here, wider in zip(passed, [*passed[1:], torch.zeros_like(passed[0])], strict=True)]


def fused(qkv: QKV, grid: Grid, method: FreeLongPP, scales: Sequence[int]) -> Tensor:
    total = torch.zeros_like(qkv[0])
    for scale, band in zip(scales, bands(grid, method, scales), strict=True):
        out = branch(qkv, grid, scale * grid.window_frames, method.key_stride)
        spectrum = torch.fft.fftn(out.unflatten(1, (grid.frames, grid.rows, grid.columns)), dim=(1, 2, 3))
        total += torch.fft.ifftn(band[..., None, None] * spectrum, dim=(1, 2, 3)).real.flatten(1, 3)
    return total


@pytest.mark.parametrize(("grid", "method", "scales"), CASES, ids=str)
def test_a_layer_equals_bands_written_out(grid: Grid, method: FreeLongPP, scales: tuple[int, ...]) -> None:
    qkv = draw_qkv(grid)
    out = run_layer(method, grid, qkv, STEP)
    assert_same_math(out, fused(qkv, grid, method, scales))
    # The negative controls: another cut-off, and windows whose bands are exchanged.
    with pytest.raises(AssertionError):
        assert_same_math(out, fused(qkv, grid, replace(method, cutoff_time=1.01 * method.cutoff_time), scales))
    with pytest.raises(AssertionError):
        assert_same_math(out, fused(qkv, grid, method, scales[::-1]))


def test_the_published_windows_and_bands() -> None:
    """At 4 times the length windows of 1, 2 and 4, at 8 times one of 8 more; of Wan the widest has all 81 frames."""
    wan = Grid(frames=81, rows=1, columns=1, window_frames=21)
    method = FreeLongPP()
    assert [method._scales(replace(wan, frames=frames)) for frames in (22, 81, 161)] == [
        [1, 2],
        [1, 2, 4],
        [1, 2, 4, 8],
    ]
    sets = method.frame_sets(STEP, wan)
    assert [{len(seen) for seen in each} for each in sets] == [{21}, {42}, {81}]
    assert [list(each[40])[:1] for each in sets] == [[30], [19], [0]]
    [*_, sparse] = replace(method, key_stride=2).frame_sets(STEP, wan)
    assert [*sparse[5]] == list(range(0, 81, 2))


def test_a_low_precision_sums_bands_in_fp32() -> None:
    grid, method, scales = CASES[0]
    qkv = draw_qkv(grid)
    reference = fused(qkv, grid, method, scales)
    q, k, v = (x.float() for x in qkv)
    made = run_layer(method, grid, (q, k, v), STEP)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), reference, rtol=0, atol=1e-5)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="freelong_pp: cutoff_time must be a finite number, more than 0, got 0"):
        FreeLongPP(cutoff_time=0.0)
    with pytest.raises(ValueError, match="freelong_pp: key_stride must be 1 or more frames, got 0"):
        FreeLongPP(key_stride=0)
    assert FreeLongPP().refused_axes.keys() == {"ring"}
