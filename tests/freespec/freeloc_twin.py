"""FreeLOC written out pair by pair: relative positions of frames, masks of tokens, and attention from unrotated q and k."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from freespec.methods import FreeLOC, Grid
from tests.freespec.layers import QKV

Pairs = list[list[int | None]]
FIRST = 1  # a row of the rotary table from which on its frames are equally far apart, in LTX-Video too


def positions(grid: Grid, method: FreeLOC) -> Pairs:
    """Relative position of each pair of frames (query, key) in a layer of `position_layers`; None: their own."""
    frames, native = grid.frames, grid.window_frames
    long = frames >= 3 * native
    w1 = _share(method.near_frames, 10 if long else 12, native)
    g1 = method.middle_group
    w2 = method.middle_frames or min(round((14 if long else 20) * native / 21), w1 + (native - 1 - w1) * g1)
    taken = w1 + math.ceil((w2 - w1) / g1)
    g2 = max(method.far_group, math.ceil((frames - w2) / (native - taken)))

    def relative(late: int, early: int) -> int | None:
        if late - early < w1:
            return None
        if late - early < w2:
            return late // g1 + w1 - w1 // g1 - early // g1
        return min(late // g2 + taken - w2 // g2, native - 1) - early // g2

    return _signed(relative, frames)


def anchored(grid: Grid, method: FreeLOC) -> Pairs:
    """The same in a layer of `sparse_layers`, for pairs with a first or last frame; the others that are seen are nearer."""
    frames, native = grid.frames, grid.window_frames
    dense, exact = _share(method.dense_frames, 8, native), _share(method.anchor_near_frames, 12, native)
    group = max(method.far_group, math.ceil((frames - exact) / (native - exact)))

    def relative(late: int, early: int) -> int | None:
        if late - early < max(exact, dense):
            return None
        return min(late // group + exact - exact // group, native - 1) - early // group

    pairs, ends = _signed(relative, frames), _ends(grid, method)
    return [[each if key in ends else None for key, each in enumerate(row)] for row in pairs]


def seen_when_sparse(grid: Grid, method: FreeLOC) -> Tensor:
    """[S, S]: which keys a query sees in a layer of `sparse_layers`, token by token."""
    dense, striped = (
        _share(given, published, grid.window_frames)
        for given, published in ((method.dense_frames, 8), (method.striped_frames, 24))
    )
    reach, ends = math.ceil(method.stripe * grid.rows), _ends(grid, method)
    seen = torch.zeros(grid.tokens, grid.tokens, dtype=torch.bool)
    places = [(token // grid.frame_tokens, token % grid.frame_tokens // grid.columns) for token in range(grid.tokens)]
    for query, (frame, row) in enumerate(places):
        for key, (other, beside) in enumerate(places):
            distance = abs(frame - other)
            striped_here = distance < striped and abs(row - beside) <= reach
            seen[query, key] = other in ends or distance < dense or striped_here
    return seen


def attend(qkv: QKV, tables: tuple[Tensor, Tensor], grid: Grid, relative: Pairs, mask: Tensor | None = None) -> Tensor:
    """Attention [B, S, N, D] of unrotated q and k whose pairs of frames are as far apart as `relative` says.

    `tables` are cos and sin [S, 1 or N, D] of the model. A pair at distance d is rotated by the rows of frames `FIRST` + d and `FIRST`.
    """
    q, k, v = (x.double() for x in qkv)
    cos, sin = (table.double().unflatten(0, (grid.frames, -1)) for table in tables)
    q_frames, k_frames = (x.unflatten(1, (grid.frames, -1)) for x in (q, k))
    rows = []
    for query in range(grid.frames):
        logits = []
        for key in range(grid.frames):
            distance = relative[query][key]
            at, other = (query, key) if distance is None else (FIRST + max(distance, 0), FIRST + max(-distance, 0))
            turned_q, turned_k = (
                _rotate(x, cos[to], sin[to]) for x, to in ((q_frames[:, query], at), (k_frames[:, key], other))
            )
            logits.append(torch.einsum("bsnd,btnd->bnst", turned_q, turned_k) / q.shape[-1] ** 0.5)
        rows.append(torch.cat(logits, dim=-1))
    logits = torch.cat(rows, dim=-2)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return torch.einsum("bnst,btnd->bsnd", logits.softmax(-1), v)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    c, s = cos[..., ::2], sin[..., ::2]
    return torch.stack((even * c - odd * s, odd * c + even * s), dim=-1).flatten(-2)


def _ends(grid: Grid, method: FreeLOC) -> set[int]:
    return {*range(method.first_frames), *range(grid.frames - method.last_frames, grid.frames)}


def _share(given: int | None, published: int, native: int) -> int:
    return given or max(1, round(published * native / 21))


def _signed(relative: Callable[[int, int], int | None], frames: int) -> Pairs:
    pairs: Pairs = []
    for query in range(frames):
        found = [relative(max(query, key), min(query, key)) for key in range(frames)]
        pairs.append([each if each is None or key <= query else -each for key, each in enumerate(found)])
    return pairs
