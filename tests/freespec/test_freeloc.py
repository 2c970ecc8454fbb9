"""FreeLOC against a matrix of relative positions and a mask written out pair by pair; the published numbers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from freespec import tiers
from freespec.kernels import key_of, plain
from freespec.methods import FreeLOC, Grid
from tests.freespec.cases import assert_same_math
from tests.freespec.freeloc_twin import Pairs, anchored, attend, positions, seen_when_sparse
from tests.freespec.layers import QKV, draw_qkv

HEADS, DIM = 3, 8
WAN = Grid(frames=81, rows=30, columns=52, window_frames=21)
CASES = [
    (Grid(frames=23, rows=3, columns=2, window_frames=6), FreeLOC()),
    (Grid(frames=13, rows=1, columns=5, window_frames=5), FreeLOC(near_frames=2, middle_frames=4, far_group=3)),
    (Grid(frames=11, rows=4, columns=2, window_frames=7), FreeLOC(first_frames=2, last_frames=0, stripe=0.25)),
    (
        Grid(frames=10, rows=5, columns=1, window_frames=4),
        FreeLOC(dense_frames=1, striped_frames=6, anchor_near_frames=3),
    ),
]


def tables(grid: Grid) -> tuple[Tensor, Tensor]:
    """cos and sin [S, N, D] of a rotary table whose heads differ and whose first frame is nearer to the second, as in LTX-Video."""
    token = torch.arange(grid.tokens)
    frame = (token // grid.frame_tokens).double()
    frame = torch.where(frame == 0, 0.6, frame)
    row = (token % grid.frame_tokens // grid.columns).double()
    places = torch.stack((frame, row, frame, row), dim=-1)[:, None]
    frequencies = torch.linspace(0.9, 0.05, DIM // 2).double() * torch.linspace(1.0, 1.3, HEADS)[:, None].double()
    angles = (places * frequencies).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 2))
    return x * cos + torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2) * sin


def layer(method: FreeLOC, grid: Grid, qkv: QKV, index: int, num_layers: int = 2) -> Tensor:
    """The layer's output as the engine computes it, from q and k that are rotated."""
    q, k, v = qkv
    cos, sin = tables(grid)
    whole = (cos.flatten(1)[None], sin.flatten(1)[None])
    rotation = tiers.frame_rotation(whole, frame_tokens=grid.frame_tokens, head_dim=DIM)
    table = tiers.table_of(method.tiers(grid, num_layers)[index])
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return tiers.attend(q, k, v, table, *rotation, kernel=key_of(plain), columns=grid.columns)


@pytest.mark.parametrize(("grid", "method"), CASES, ids=str)
def test_position_layers_equal_a_matrix_of_relative_positions(grid: Grid, method: FreeLOC) -> None:
    qkv = draw_qkv(grid, heads=HEADS, dim=DIM)
    relative = positions(grid, method)
    assert max(each for row in relative for each in row if each is not None) < grid.window_frames
    out = layer(method, grid, qkv, 0)
    assert_same_math(out, attend(qkv, tables(grid), grid, relative))
    # The negative controls: one pair of frames one position off, and the positions of direct.
    relative[-1][0] -= 1
    with pytest.raises(AssertionError):
        assert_same_math(out, attend(qkv, tables(grid), grid, relative))
    with pytest.raises(AssertionError):
        assert_same_math(out, layer(replace(method, position_layers=()), grid, qkv, 0))


@pytest.mark.parametrize(("grid", "method"), CASES, ids=str)
def test_sparse_layers_equal_a_mask_written_out(grid: Grid, method: FreeLOC) -> None:
    qkv = draw_qkv(grid, heads=HEADS, dim=DIM)
    mask, relative = seen_when_sparse(grid, method), anchored(grid, method)
    out = layer(replace(method, sparse_layers=(1,)), grid, qkv, 1)
    assert_same_math(out, attend(qkv, tables(grid), grid, relative, mask))
    # The negative control: the last query sees one key more.
    mask[-1, int((~mask[-1]).nonzero()[0])] = True
    with pytest.raises(AssertionError):
        assert_same_math(out, attend(qkv, tables(grid), grid, relative, mask))


def test_layers_in_no_list_have_full_attention() -> None:
    grid, method = CASES[0]
    qkv = draw_qkv(grid, heads=HEADS, dim=DIM)
    method = replace(method, position_layers=(1,), sparse_layers=(2,))
    nothing: Pairs = [[None] * grid.frames] * grid.frames
    assert_same_math(layer(method, grid, qkv, 0, 3), attend(qkv, tables(grid), grid, nothing))
    of_each = method.tiers(grid, 3)
    assert of_each[1] == FreeLOC().tiers(grid, 1)[0]
    assert of_each[2] == FreeLOC(sparse_layers=(0,)).tiers(grid, 1)[0]


def distances(grid: Grid, method: FreeLOC, query: int) -> dict[int, int]:
    """Relative position of the keys of each frame of a query in a position layer."""
    found = {}
    for tier in method.tiers(grid, 1)[0]:
        for key in range(tier.start[query], tier.stop[query]):
            assert key not in found
            q_position = query if tier.q_positions is None else tier.q_positions[query]
            k_position = key if tier.k_positions is None else tier.k_positions[key]
            found[key] = q_position - k_position
    assert len(found) == grid.frames
    return found


def test_wan_has_the_published_numbers() -> None:
    """At 4 times the length distances are exact below 10 frames, in pairs below 14, and in groups of 8; at 2 times below 12 and 20."""
    last = distances(WAN, FreeLOC(), 80)
    assert [last[80 - distance] for distance in (0, 9, 10, 12, 13, 14, 79, 80)] == [0, 9, 10, 11, 12, 12, 20, 20]
    first = distances(WAN, FreeLOC(), 0)
    assert [first[distance] for distance in (9, 10, 13, 14, 80)] == [-9, -10, -11, -12, -20]
    twice = distances(replace(WAN, frames=41), FreeLOC(), 40)
    assert [twice[40 - distance] for distance in (11, 12, 19, 20, 40)] == [11, 12, 16, 17, 19]
    for frames in (22, 41, 62, 63, 81, 161, 321):  # groups grow with the length
        grid = replace(WAN, frames=frames)
        for query in (0, frames // 2, frames - 1):
            assert max(map(abs, distances(grid, FreeLOC(), query).values())) <= 20


def test_wan_sparse_layers_see_a_third_of_the_keys() -> None:
    [sparse] = FreeLOC(sparse_layers=(0,)).tiers(WAN, 1)
    tokens = 0
    for tier in sparse:
        rows = 30 if tier.rows is None else 2 * tier.rows + 1
        tokens += max(tier.stop[40] - tier.start[40], 0) * rows * 52
    # 15 frames whole, 32 in stripes of 9 rows, 4 anchors
    assert tokens == 15 * 1560 + 32 * 9 * 52 + 4 * 1560


def test_runs_cover_every_frame_that_has_keys() -> None:
    """Frames that see the same are one call, those whose keys slide by a frame another."""
    starts, stops = [0, 0, 0, 1, 2, 5, 6], [3, 3, 3, 4, 5, 5, 9]
    assert list(tiers._runs(starts, stops)) == [(0, 3, 0, 3, 0), (3, 2, 1, 3, 1), (6, 1, 6, 3, 0)]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="layer 3 is in position_layers and in sparse_layers"):
        FreeLOC(position_layers=(1, 3), sparse_layers=(3,))
    with pytest.raises(ValueError, match="layers are counted from 0, got -1"):
        FreeLOC(sparse_layers=(-1,))
    with pytest.raises(ValueError, match="near_frames must be 1 or more, got 0"):
        FreeLOC(near_frames=0)
    with pytest.raises(ValueError, match="middle_group and far_group must be 2 or more, got 1 and 8"):
        FreeLOC(middle_group=1)
    with pytest.raises(
        ValueError,
        match="near_frames 20, middle_frames 22 and middle_group 2 take 21 positions of a native length of 21",
    ):
        FreeLOC(near_frames=20, middle_frames=22).check_window(21)
    with pytest.raises(ValueError, match="near_frames 30 must be less than the native length of 9 frames"):
        FreeLOC(near_frames=30).check_window(9)
    with pytest.raises(ValueError, match="near_frames 18 is more than middle_frames 14 \\(default\\); lower it"):
        FreeLOC(near_frames=18).check_window(21)
    with pytest.raises(ValueError, match="anchor_near_frames must be less than the native length of 9 frames, got 9"):
        FreeLOC(anchor_near_frames=9).check_window(9)
    with pytest.raises(ValueError, match="striped_frames 2 is less than dense_frames 3"):
        FreeLOC(striped_frames=2).check_window(9)
    with pytest.raises(ValueError, match="sparse_layers has layer 6, and the model has 6, 0 to 5"):
        FreeLOC(sparse_layers=(0, 6)).check_layers(6)
    for window in range(2, 40):
        FreeLOC().check_window(window)
    assert FreeLOC().refused_axes.keys() == {"ring"}
