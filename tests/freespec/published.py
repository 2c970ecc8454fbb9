"""The compared methods as published, in fp64 and written out: the twins of freespec/methods on one layer's q, k, v."""

import math
from typing import Any

import torch
from torch import Tensor

from freespec.methods import Grid
from tests.freespec.layers import QKV, attend


def freenoise(qkv: QKV, grid: Grid, stride: int, tail: str) -> Tensor:
    """FreeNoise's loop in fp64: each view's attention times its weights is added up, then divided by the added weights."""
    q, k, v = qkv
    window, frame = grid.window_frames, grid.frame_tokens
    half = list(range(1, window // 2 + 1))
    weights = half + half[::-1] if window % 2 == 0 else [*half, window // 2 + 1, *half[::-1]]
    spans = [(start, start + window) for start in range(0, grid.frames - window + 1, stride)]
    fresh_from = dict.fromkeys(spans, 0)
    covered = spans[-1][1]
    if tail != "none" and covered < grid.frames:
        last = (grid.frames - window, grid.frames)
        fresh_from[last] = covered - last[0] if tail == "new_frames" else 0
        spans.append(last)
    value, count = torch.zeros_like(q), torch.zeros(grid.frames, dtype=q.dtype)
    for a, b in spans:
        rows = slice(a * frame, b * frame)
        out = attend(q[:, rows], k[:, rows], v[:, rows])
        for index in range(fresh_from[a, b], window):
            tokens = slice((a + index) * frame, (a + index + 1) * frame)
            value[:, tokens] += weights[index] * out[:, index * frame : (index + 1) * frame]
            count[a + index] += weights[index]
    count = count.repeat_interleave(frame)[None, :, None, None]
    return torch.where(count > 0, value / count.clamp_min(1), 0.0)


def freelong(
    o_local: Tensor, o_global: Tensor, grid: Grid, *, uncentred: bool, d_s: float = 0.25, d_t: float = 0.25
) -> Tensor:
    """FreeLong's mix in fp64: 3D FFT of both outputs, low frequencies of one and high ones of the other, back, real part.

    `uncentred` is the published grid arange(n) * 2/n - 1 after a shift; without it zero lies on a bin for odd n as well.
    """
    sizes = (grid.frames, grid.rows, grid.columns)
    axes = []
    for size, cutoff in zip(sizes, (d_t, d_s, d_s), strict=True):
        f = torch.arange(size, dtype=torch.float64) * 2 / size - 1
        axes.append((f if uncentred else f + (1 / size if size % 2 else 0)) / cutoff)
    t, h, w = torch.meshgrid(*axes, indexing="ij")
    mask = torch.exp(-0.5 * (t**2 + h**2 + w**2))[None, :, :, :, None, None]
    dims = (1, 2, 3)
    local, o_global = (
        torch.fft.fftshift(torch.fft.fftn(x.unflatten(1, sizes), dim=dims), dim=dims) for x in (o_local, o_global)
    )
    mixed = o_global * mask + local * (1 - mask)
    return torch.fft.ifftn(torch.fft.ifftshift(mixed, dim=dims), dim=dims).real.flatten(1, 3)


def branches_of(grid: Grid, qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both branches in a loop over frames: each sees the frames [clamp(f - W // 2), + W)."""
    q, k, v = qkv
    frame, window, local = grid.frame_tokens, grid.window_frames, torch.zeros_like(q)
    for f in range(grid.frames):
        a = min(max(f - window // 2, 0), grid.frames - window)
        keys, rows = slice(a * frame, (a + window) * frame), slice(f * frame, (f + 1) * frame)
        local[:, rows] = attend(q[:, rows], k[:, keys], v[:, keys])
    return local, attend(q, k, v)


def _fuse_view(local: Tensor, o_global: Tensor, window: int, count: int, *, compat: bool) -> Tensor:
    """One view of one batch item, [W * H*W, N, D]: rows are pixels and channels, columns are frames."""
    rows_l, rows_g = (x.unflatten(0, (window, -1)).flatten(1).T for x in (local, o_global))
    mean_l, mean_g = rows_l.mean(1, keepdim=True), rows_g.mean(1, keepdim=True)
    x_l, x_g = rows_l - mean_l, rows_g - mean_g
    values, vectors = torch.linalg.eigh(x_g.T @ x_g / rows_g.shape[0])
    p_l, p_g = x_l @ vectors, x_g @ vectors
    cosine = torch.nn.functional.cosine_similarity(p_l, p_g, dim=0)
    null = values <= 1e-12 * values.max()  # what is left of the vector of ones
    assert null.sum() == 1
    cosine[null] = 0.0 if compat else -math.inf
    chosen = cosine.argsort(descending=True)[:count]
    fused = p_l.clone()
    fused[:, chosen] = p_g[:, chosen]
    if not compat:
        fused[:, null] = p_l[:, null]
    return (fused @ vectors.T + mean_g).T.unflatten(1, (-1, *local.shape[1:])).flatten(0, 1)


def freepca(qkv: QKV, grid: Grid, stride: int, **how: Any) -> Tensor:
    """FreePCA's loop over views, components in fp64; the last frames that the stride misses have a view of their own but with compat."""
    q, k, v = qkv
    compat, scale = how.get("compat", False), how.get("scale", 1.0)
    most, fused = how.get("most", 3), how.get("fused", True)
    window, frame = grid.window_frames, grid.frame_tokens
    starts = list(range(0, grid.frames - window + 1, stride))
    if not compat and starts[-1] + window < grid.frames:
        starts.append(grid.frames - window)
    o_global = attend(q, k, v, scale)
    value, count = torch.zeros_like(q), torch.zeros(grid.frames, dtype=q.dtype)
    for m, start in enumerate(starts):
        rows = slice(start * frame, (start + window) * frame)
        out = attend(q[:, rows], k[:, rows], v[:, rows])
        if fused and m > 0:
            pairs = zip(out.double(), o_global[:, rows].double(), strict=True)
            fused_items = [_fuse_view(a, b, window, min(m, most), compat=compat) for a, b in pairs]
            out = torch.stack(fused_items).to(q.dtype)
        value[:, rows] += out
        count[start : start + window] += 1
    return value / count.clamp_min(1).repeat_interleave(frame)[None, :, None, None]


def token_scale(grid: Grid) -> float:
    return math.sqrt(math.log(grid.tokens) / math.log(grid.window_frames * grid.frame_tokens))
