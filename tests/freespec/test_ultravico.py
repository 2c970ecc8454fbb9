"""UltraViCo against masks written out, at uneven sizes; its kernel in chunks and in low precision; what it refuses."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from freespec import decay
from freespec.attention import WindowedAttention, masked_ref
from freespec.decay import decayed, decayed_ref
from freespec.kernels import plain
from freespec.methods import Branches, Grid, Layer, StepPlan, UltraViCo
from freespec.methods.base import check_rest_kernel
from tests.freespec.cases import assert_low_precision, assert_same_math
from tests.freespec.layers import draw_qkv, run_layer

GRIDS = [
    Grid(frames=frames, rows=2, columns=3, window_frames=window) for frames, window in ((9, 4), (8, 5), (7, 1), (4, 4))
]
STEP = StepPlan(mode="dual")


def twin(grid: Grid, qkv: tuple[Tensor, Tensor, Tensor], method: UltraViCo) -> Tensor:
    sizes = {"frame_tokens": grid.frame_tokens, "window_frames": grid.window_frames}
    return decayed_ref(*qkv, **sizes, alpha=method.alpha, first_frame=method.first_frame)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("method", [UltraViCo(), UltraViCo(alpha=0.3, first_frame=False)], ids=str)
def test_a_layer_equals_masks_written_out(grid: Grid, method: UltraViCo, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = draw_qkv(grid)
    assert_same_math(run_layer(method, grid, qkv, STEP), twin(grid, qkv, method))
    monkeypatch.setattr(decay, "LOGITS", 100)  # a few queries at a time
    assert_same_math(run_layer(method, grid, qkv, STEP), twin(grid, qkv, method))


def test_negative_controls() -> None:
    """Another factor, negative logits damped too, and a first frame that sees all."""
    grid, method = GRIDS[0], UltraViCo()
    qkv = draw_qkv(grid)
    expected = twin(grid, qkv, method)
    for other in (replace(method, alpha=0.91), replace(method, first_frame=False)):
        assert not torch.allclose(run_layer(other, grid, qkv, STEP), expected, rtol=0, atol=1e-6)
    q, k, v = qkv
    every = WindowedAttention(num_frames=9, frame_tokens=6, window_frames=4, kernel=plain, rest_kernel=damp_all)
    assert not torch.allclose(every.both(q, k, v)[1][:, 6:], expected[:, 6:], rtol=0, atol=1e-6)


def damp_all(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return plain(0.9 * q, k, v)


def test_alpha_1_is_full_attention() -> None:
    q, k, v = draw_qkv(GRIDS[0])
    found = run_layer(UltraViCo(alpha=1.0, first_frame=False), GRIDS[0], (q, k, v), STEP)
    assert_same_math(found, masked_ref(q, k, v, frame_tokens=6, window_frames=None))


def test_the_kernel_in_bf16_errs_as_plain_attention_does() -> None:
    q, k, v = (x.transpose(1, 2).bfloat16() for x in draw_qkv(GRIDS[1], dim=16))
    exact = decayed(0.9)(q.double(), k.double(), v.double())[0]
    undamped = plain(q.double(), k.double(), v.double())[0]
    allowed = exact + (plain(q, k, v)[0].double() - undamped)
    assert_low_precision(decayed(0.9)(q, k, v)[0], allowed.bfloat16(), exact)


def test_a_head_has_the_same_bits_in_any_share_of_the_heads() -> None:
    q, k, v = torch.randn(3, 2, 6, 64, 32, generator=torch.Generator().manual_seed(0))
    whole, parts = decayed(0.9)(q, k, v), [decayed(0.9)(q[:, s], k[:, s], v[:, s]) for s in (slice(0, 2), slice(2, 6))]
    assert all(
        torch.equal(torch.cat(two, dim=1), one) for two, one in zip(zip(*parts, strict=True), whole, strict=True)
    )


def test_kernels_that_would_replace_its_own_are_refused() -> None:
    for dual, complement, word in (("triton", "same", "dual triton"), ("auto", "sage", "complement sage")):
        with pytest.raises(ValueError, match=f"ultravico attends .* attention.{word} would leave that out"):
            check_rest_kernel(UltraViCo(), "ultravico", dual=dual, complement=complement)
    check_rest_kernel(UltraViCo(), "ultravico", dual="auto", complement="same")
    with pytest.raises(ValueError, match=r"ultravico: alpha must lie in \[0, 1\], got 1.1"):
        UltraViCo(alpha=1.1)


def test_the_first_frame_is_that_of_the_grid() -> None:
    grid = GRIDS[0]
    near, far = torch.zeros(1, 54, 1, 2), torch.ones(1, 54, 1, 2)
    layer = Layer(grid=grid, sum_tokens=lambda x: x, sum_heads=lambda x: x)
    out = UltraViCo().fuse(Branches(o_local=near, o_global=far), None, layer)
    assert out[0, :, 0, 0].tolist() == [0.0] * 6 + [1.0] * 48
