"""Views, and FreeNoise over them, against the published loop."""

import pytest
import torch
from torch import Tensor

from engine.config import MethodConfig
from freespec.methods import FreeNoise, FreePCA, Grid, StepPlan
from freespec.views import triangle, view_starts, view_weights
from freespec.windows import default_stride
from tests.freespec.cases import assert_same_math
from tests.freespec.layers import draw_qkv, run_layer
from tests.freespec.published import freenoise as published

# frames, window, stride: the stride divides, misses one frame, misses several, odd and even windows, one view, stride 1
CASES = [(12, 4, 2), (11, 4, 3), (13, 5, 3), (9, 5, 5), (6, 5, 4), (7, 3, 1), (8, 1, 3)]
VIEWS = StepPlan(mode="views")


def grid_of(frames: int, window: int) -> Grid:
    return Grid(frames=frames, rows=2, columns=3, window_frames=window)


@pytest.mark.parametrize(("frames", "window", "stride"), CASES)
@pytest.mark.parametrize("tail", ["shifted", "new_frames", "none"])
def test_freenoise_is_the_published_loop(frames: int, window: int, stride: int, tail: str) -> None:
    grid = grid_of(frames, window)
    qkv = draw_qkv(grid)
    settings = {"compat": True} if tail == "none" else {"last_view": tail}
    made = run_layer(FreeNoise(stride=stride, **settings), grid, qkv, VIEWS)
    assert_same_math(made, published(qkv, grid, stride, tail))


def test_the_tails_differ_where_the_stride_misses_frames_only() -> None:
    """Negative control of the test above: it would tell the rules apart."""
    for frames, differ in ((12, False), (11, True)):
        grid = grid_of(frames, 4)
        stride = 2 if frames == 12 else 3
        qkv = draw_qkv(grid)
        shifted, new, none = (
            run_layer(method, grid, qkv, VIEWS)
            for method in (
                FreeNoise(stride=stride),
                FreeNoise(stride=stride, last_view="new_frames"),
                FreeNoise(stride=stride, compat=True),
            )
        )
        assert torch.equal(shifted, new) != differ
        assert torch.equal(shifted, none) != differ
        assert (none[:, -grid.frame_tokens :].abs().max().item() == 0.0) == differ  # published: no output at all
        assert new[:, -grid.frame_tokens :].abs().max().item() > 0.0


def test_negative_control_wrong_weights() -> None:
    grid = grid_of(12, 4)
    qkv = draw_qkv(grid)
    method, right = FreeNoise(stride=2), published(qkv, grid, 2, "none")

    class Uniform(FreeNoise):
        def weights(self, *args: object) -> Tensor:
            return view_weights(self.view_starts(grid), grid.frames, [1] * 4)

    assert_same_math(run_layer(method, grid, qkv, VIEWS), right)
    with pytest.raises(AssertionError):
        assert_same_math(run_layer(Uniform(stride=2), grid, qkv, VIEWS), right)


def test_starts_and_strides() -> None:
    assert view_starts(12, 4, 2, cover=True) == (0, 2, 4, 6, 8)
    assert view_starts(11, 4, 3, cover=True) == (0, 3, 6, 7)
    assert view_starts(11, 4, 3, cover=False) == (0, 3, 6)
    assert view_starts(4, 4, 3, cover=True) == view_starts(3, 4, 1, cover=True) == (0,)
    assert view_starts(5, 4, 9, cover=True) == (0, 1)
    assert [default_stride(window) for window in (16, 21, 9, 7, 3, 1)] == [4, 5, 2, 2, 1, 1]
    assert triangle(4) == [1, 2, 2, 1]
    assert triangle(5) == [1, 2, 3, 2, 1]


@pytest.mark.parametrize(("frames", "window", "stride"), CASES)
def test_the_weights_of_a_frame_sum_to_one(frames: int, window: int, stride: int) -> None:
    starts = view_starts(frames, window, stride, cover=True)
    weights = view_weights(starts, frames, triangle(window))
    total = torch.zeros(frames, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + window] += weight
    covered = torch.zeros(frames, dtype=torch.float64)
    for start in starts:
        covered[start : start + window] = 1.0
    assert_same_math(total, covered)
    assert covered.min() == (1.0 if stride <= window else 0.0)


def test_window_attention_and_errors() -> None:
    assert FreeNoise(attention="window").plan([900.0, 1.0]) == [StepPlan(mode="local")] * 2
    assert FreeNoise().plan([900.0, 1.0]) == [VIEWS] * 2
    assert FreeNoise().refused_axes.keys() == {"ring"}
    assert FreeNoise(attention="window").refused_axes == {}
    assert FreeNoise.noise == "freenoise"
    for settings, message in (
        ({"stride": 0}, "freenoise: stride must be 1 or more frames, got 0"),
        ({"attention": "rows"}, "freenoise: attention must be one of views, window, got 'rows'"),
        ({"last_view": "none"}, "freenoise: last_view must be one of shifted, new_frames, got 'none'"),
        (
            {"compat": True, "last_view": "new_frames"},
            "freenoise: compat has no last view, and last_view is new_frames",
        ),
        ({"attention": "window", "compat": True}, "freenoise: attention window has no views for compat true"),
        ({"attention": "window", "last_view": "new_frames"}, "attention window has no views for last_view new_frames"),
    ):
        with pytest.raises(ValueError, match=message):
            FreeNoise(**settings)
    FreeNoise(compat=True, last_view="shifted")  # the default is never refused


@pytest.mark.parametrize("kind", [FreeNoise, FreePCA])
def test_views_that_leave_frames_between_them_are_refused(kind: type[FreeNoise | FreePCA]) -> None:
    """Such frames would be zeros, with `compat` or without: the cover is for the end of the video alone."""
    grid = grid_of(13, 4)
    gaps = run_layer(kind(stride=6), grid, draw_qkv(grid), VIEWS)
    assert gaps[:, 4 * grid.frame_tokens : 6 * grid.frame_tokens].abs().max().item() == 0.0
    name = kind.__name__.lower()
    for compat in (False, True):
        message = f"{name}: stride 6 is more than the 4 frames of a view, so that 2 between two views would get no"
        with pytest.raises(ValueError, match=message):
            kind(stride=6, compat=compat).check_window(4)
        with pytest.raises(ValueError, match=message):
            MethodConfig(name=name, window_frames=4, **{name: kind(stride=6, compat=compat)})
    MethodConfig(name=name, window_frames=6, **{name: kind(stride=6)})
    MethodConfig(name="direct", window_frames=4, **{name: kind(stride=6)})  # not read by this method
    MethodConfig(name="freenoise", window_frames=4, freenoise=FreeNoise(stride=6, attention="window"))
