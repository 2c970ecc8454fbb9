"""LVSA against a mask of frames written out from the published rules; how many frames are seen; that anchors move."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from freespec.attention import table_of
from freespec.methods import LVSA, Grid, StepPlan
from tests.freespec.cases import assert_same_math
from tests.freespec.layers import draw_qkv, run_layer

WAN = Grid(frames=81, rows=1, columns=1, window_frames=21)
CASES = [
    (Grid(frames=23, rows=2, columns=3, window_frames=9), LVSA()),
    (Grid(frames=13, rows=1, columns=5, window_frames=5), LVSA(half_width=1, first_frames=2)),
    (Grid(frames=11, rows=2, columns=2, window_frames=4), LVSA(half_width=0)),
    (Grid(frames=9, rows=2, columns=2, window_frames=3), LVSA(half_width=1, first_frames=0, rotate=False)),
]


def seen_by_the_rules(method: LVSA, grid: Grid, number: int, interval: int) -> Tensor:
    """Which frames [F, F] each frame sees, frame by frame: anchors, and as many other frames around it as its window has."""
    frames, width = grid.frames, 2 * method.half_width + 1
    offset = number % interval if method.rotate else 0
    anchor = torch.zeros(frames, dtype=torch.bool)
    anchor[: method.first_frames] = True
    for index in range(-(-frames // interval)):
        anchor[(offset + index * interval) % frames] = True
    seen = anchor.repeat(frames, 1)
    if method.half_width == 0:
        return seen
    for frame in range(frames):
        start = min(max(frame - method.half_width, 0), max(frames - width, 0))
        stop = min(start + width, frames)
        turn = 0
        while int((~anchor[start:stop]).sum()) < min(width, frames - int(anchor.sum())):
            start, stop = (max(start - 1, 0), stop) if turn % 2 == 0 else (start, min(stop + 1, frames))
            turn += 1
        seen[frame, start:stop] = True
    return seen


def masked(qkv: Sequence[Tensor], seen: Tensor, frame_tokens: int) -> Tensor:
    q, k, v = qkv
    mask = seen.repeat_interleave(frame_tokens, 0).repeat_interleave(frame_tokens, 1)
    logits = torch.einsum("bsnd,bknd->bnsk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnsk,bknd->bsnd", logits.masked_fill(~mask, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize(("grid", "method"), CASES, ids=str)
def test_a_layer_equals_a_mask_written_out(grid: Grid, method: LVSA) -> None:
    qkv = draw_qkv(grid)
    for number in (0, 3):
        out = run_layer(method, grid, qkv, StepPlan(mode="frames", number=number))
        expected = masked(qkv, seen_by_the_rules(method, grid, number, method._interval(grid)), grid.frame_tokens)
        assert_same_math(out, expected)
    if method.rotate:  # the negative control: the anchors of the step before
        assert not torch.allclose(run_layer(method, grid, qkv, StepPlan(mode="frames", number=2)), expected, atol=1e-6)


def test_wan_at_four_times_its_length_has_the_published_numbers() -> None:
    """An anchor every 6 frames, 21 or 22 frames seen of 81: 74 % are left out. At 2 and 6 times an anchor every 3 and 9."""
    method = LVSA()
    assert [method._interval(replace(WAN, frames=frames)) for frames in (21, 41, 81, 121)] == [1, 3, 6, 9]
    for number in range(7):
        [frames] = method.frame_sets(StepPlan(mode="frames", number=number), WAN)
        assert {len(each) for each in frames} <= {21, 22}
        assert 0 in frames[50]
        assert number % 6 + 6 in frames[50]
    seen = {
        frame for number in range(6) for frame in method.frame_sets(StepPlan(mode="frames", number=number), WAN)[0][0]
    }
    assert seen == set(range(81))
    still = replace(method, rotate=False).frame_sets(StepPlan(mode="frames", number=5), WAN)
    assert still == method.frame_sets(StepPlan(mode="frames", number=0), WAN)


def test_larger_budget_sees_more_frames() -> None:
    steps = StepPlan(mode="frames")
    counts = [len(LVSA(budget=budget).frame_sets(steps, WAN)[0][40]) for budget in (0.5, 1.0, 2.0)]
    assert counts == sorted(set(counts))
    [native] = LVSA().frame_sets(steps, replace(WAN, frames=21))
    assert native == [list(range(21))] * 21


def test_settings_that_make_no_method_are_refused() -> None:
    with pytest.raises(ValueError, match="lvsa: half_width and first_frames must be 0 or more, got -1 and 1"):
        LVSA(half_width=-1)
    with pytest.raises(ValueError, match="lvsa: budget must be a finite number, more than 0, got 0"):
        LVSA(budget=0.0)
    assert LVSA().refused_axes.keys() == {"ring"}
    assert table_of([[0, 2], [1]]).tolist() == [[0, 2], [1, -1]]
