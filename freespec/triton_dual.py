# mypy: allow-untyped-defs, allow-untyped-calls
# Triton reads annotations, so its kernels have none but constexpr.
"""Both branches in one walk over the keys: a query block attends to its window, writes O_l, then attends to the other keys and writes O_g.

Softmax attention over the window and then over the other keys is one running sum, so the global branch starts from where
the local one ends (method.md, eq. 1-2) and only keys at the edge of a block's windows are read twice. The keys of a
query block of rows in frames a..b fall into

    [left, core, core_stop, right): left and right are where the windows of a and b begin and end, the core is in all

The core is walked without a mask, the edges with each row's own window, and in the second part without it. A query block
may therefore cross frames: nothing is padded to whole tiles per frame. With far keys the second part walks over another
video, of fewer tokens a frame. Imported only where `attention.dual` asks for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Partial Gram matrices of a head, at most about this many: more take memory, fewer leave processors idle at the end.
GRAM_SLOTS = 256
SMALLEST_DOT = 16  # tl.dot takes no smaller tile
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """Queries and keys of a tile, warps of a program, and tiles of keys in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


# By padded head dim: what compiles for compute capability 9.0 in bf16, without Grams, with at most 12 registers spilled, and fits
# the shared memory from 8.0 on. benchmarks/gpu.py times others beside them.
TILES = {64: Tiles(queries=128, keys=64, warps=8, stages=3), 128: Tiles(queries=128, keys=64, warps=8, stages=3)}


class DualOutput(NamedTuple):
    """out_local [B, S, N, D] in q's dtype, out_global [B, S, N, D], their lse [B, S, N] fp32, and their Grams if asked for.

    `grams` is [2, B, N, D, D] fp64: O_lᵀO_l and O_gᵀO_g of the outputs as they were rounded.
    """

    out_local: Tensor
    lse_local: Tensor
    out_global: Tensor
    lse_global: Tensor
    grams: Tensor | None


def dual(  # noqa: PLR0913 - the numbers of a shard and of a video
    qkv: tuple[Tensor, Tensor, Tensor],
    *,
    q_start: int,
    k_start: int,
    num_frames: int,
    frame_tokens: int,
    window_frames: int,
    global_dtype: torch.dtype,
    far: tuple[Tensor, Tensor] | None = None,
    grams: bool = False,
    tiles: Tiles | None = None,
) -> DualOutput:
    """Each query's window, and all keys that are given: softmax(q kᵀ / sqrt D) v over either set, natural lse.

    q [B, S, N, D] begins with token `q_start`, k and v [B, K, N, D] with `k_start`, and these cover all windows; S, K, N
    and D are 1 or more, strides are free but for the last dimension's. Out of the global branch comes in `global_dtype`.
    With `far`, k and v [B, F * m, N, D] of m tokens of every frame, those outside the window take the place of k and v there,
    and each counts as frame_tokens / m keys.

    Raises ValueError for a dtype or a layout that the kernel does not take.
    """
    q, k, v = qkv
    _check(q, k, v, *(far or ()))
    tiles = tiles or tiles_for(_padded(q.shape[-1]), q.dtype)
    window = min(window_frames, num_frames)
    rest_start, rest_tokens = (k_start, frame_tokens) if far is None else (0, far[0].shape[1] // num_frames)
    numbers = [q_start, k_start, frame_tokens, rest_start, rest_tokens, window, num_frames - window]
    shape = [tiles.queries, tiles.keys, tiles.warps, tiles.stages]
    out_local, out_global, lse, partial = _dual(q, k, v, far or (), numbers, global_dtype, grams, shape)
    total = partial.sum(dim=3, dtype=torch.float64) if grams else None
    return DualOutput(out_local, lse[0], out_global, lse[1], total)


# A custom operator: a compiled block takes it as one call, and its numbers do not depend on the layer or the step.
@torch.library.custom_op("freespec::dual", mutates_args=())
def _dual(  # noqa: PLR0917 - operators have no keyword-only arguments
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: Sequence[Tensor],
    numbers: list[int],
    global_dtype: torch.dtype,
    grams: bool,
    shape: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out_local, out_global [B, S, N, D], lse [2, B, S, N] and partial Grams [2, B, N, slots, D, D] (or one zero)."""
    batch, num_queries, heads, dim = q.shape
    block_queries, block_keys, warps, stages = shape
    run, slots = _slots(num_queries, block_queries, grams)
    outputs = _outputs(q, global_dtype, slots if grams else 0)
    rest_k, rest_v = far or (k, v)
    frame_tokens, rest_tokens = numbers[2], numbers[4]
    with torch.cuda.device_of(q):  # Triton launches on the current device, which need not be that of the tensors
        _dual_kernel[(slots, heads, batch)](
            q,
            k,
            v,
            rest_k,
            rest_v,
            *outputs,
            *(stride for x in (q, k, v, rest_k, rest_v) for stride in x.stride()[:3]),
            num_queries,
            rest_k.shape[1],
            heads,
            *numbers,
            dim**-0.5 * LOG2_E,
            math.log2(frame_tokens / rest_tokens),
            D=dim,
            BLOCK_D=_padded(dim),
            BLOCK_M=block_queries,
            BLOCK_N=block_keys,
            RUN=run,
            GRAMS=grams,
            WIDEN=_interprets() and q.dtype == torch.bfloat16,
            num_warps=warps,
            num_stages=stages,
        )
    return outputs


@_dual.register_fake
def _dual_shapes(  # noqa: PLR0917
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: Sequence[Tensor],
    numbers: list[int],
    global_dtype: torch.dtype,
    grams: bool,
    shape: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, slots = _slots(q.shape[1], shape[0], grams)
    return _outputs(q, global_dtype, slots if grams else 0)


def _outputs(q: Tensor, global_dtype: torch.dtype, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, dim = q.shape
    partial = (2, batch, heads, slots, dim, dim) if slots else (1,)
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape, dtype=global_dtype),
        q.new_empty((2, *q.shape[:3]), dtype=torch.float32),
        q.new_zeros(partial, dtype=torch.float32),
    )


def _slots(num_queries: int, block_queries: int, grams: bool) -> tuple[int, int]:
    """Blocks that one program does, one after the other, adding up their Gram matrices; and the number of programs."""
    blocks = -(-num_queries // block_queries)
    run = -(-blocks // GRAM_SLOTS) if grams else 1
    return run, -(-blocks // run)


def _padded(dim: int) -> int:
    """Head dim of a tile: a power of two."""
    return max(1 << (dim - 1).bit_length(), SMALLEST_DOT)


def can_run(device: torch.device) -> bool:
    """Whether Triton has a compiler for the device; its interpreter (TRITON_INTERPRET=1) takes any, slowly."""
    return device.type == "cuda" or _interprets()


def tiles_for(padded_dim: int, dtype: torch.dtype) -> Tiles:
    """The tile of a head dim; half the keys and half the queries for fp32, which takes twice the shared memory."""
    tiles = TILES[64 if padded_dim <= 64 else 128]
    if dtype == torch.float32 or padded_dim > 128:
        return replace(tiles, queries=tiles.queries // 2, keys=tiles.keys // 2, stages=2)
    return tiles


def _interprets() -> bool:
    return bool(triton.knobs.runtime.interpret)


def _check(q: Tensor, k: Tensor, *others: Tensor) -> None:
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or any(x.dtype != q.dtype for x in (k, *others)):
        raise ValueError(f"the dual kernel takes q, k, v of one dtype: bf16, fp16 or fp32, got {q.dtype}, {k.dtype}")
    if q.shape[-1] > 256:
        raise ValueError(f"the dual kernel takes head dims up to 256, got {q.shape[-1]}")
    if any(x.stride(-1) != 1 for x in (q, k, *others)):
        raise ValueError("the dual kernel wants q, k and v with a contiguous last dimension")


@triton.jit
def _walk(  # noqa: PLR0913, PLR0917 - what a loop needs; Triton inlines it
    start,
    stop,
    q,
    running,  # acc, maximum and sum
    rows,  # where each row's window begins, and the tokens of a window
    keys,  # pointers to k and v, their strides from token to token
    scale,
    shift,  # log2 of the keys that each key stands for
    MASK: tl.constexpr,  # 0: all keys of whole tiles; 1: those in each row's window; 2: those outside of it
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Add the keys [start, stop) to a running softmax, the logits in base 2."""
    acc, m, l = running  # noqa: E741 - the sum of the softmax, as it is called everywhere
    row_window, window_tokens = rows
    k_base, v_base, stride_k, stride_v = keys
    column = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k_offset = column[None, :] * stride_k + d[:, None]
    v_offset = column[:, None] * stride_v + d[None, :]
    for first in range(start, stop, BLOCK_N):
        k_tile = k_base + tl.cast(first, tl.int64) * stride_k + k_offset
        v_tile = v_base + tl.cast(first, tl.int64) * stride_v + v_offset
        there = first + column < stop
        if MASK == 0 and D == BLOCK_D:
            k, v = tl.load(k_tile), tl.load(v_tile)
        else:
            k = tl.load(k_tile, mask=there[None, :] & (d[:, None] < D), other=0.0)
            v = tl.load(v_tile, mask=there[:, None] & (d[None, :] < D), other=0.0)
        if WIDEN:  # the interpreter's products do not know bf16; those of widened numbers are the same
            k, v = k.to(tl.float32), v.to(tl.float32)
        logits = tl.dot(q, k, input_precision="ieee") * scale + shift
        if MASK != 0:
            distance = (first + column)[None, :] - row_window[:, None]
            inside = (distance >= 0) & (distance < window_tokens)
            seen = (inside if MASK == 1 else inside == 0) & there[None, :]
            logits = tl.where(seen, logits, float("-inf"))
        new_m = tl.maximum(m, tl.max(logits, 1))
        # A row that has seen no key yet: exp2(-inf - 0) is 0, exp2(-inf + inf) is not a number.
        base = tl.where(new_m == float("-inf"), 0.0, new_m) if MASK != 0 else new_m
        p = tl.exp2(logits - base[:, None])
        fade = tl.exp2(m - base)
        l = l * fade + tl.sum(p, 1)  # noqa: E741
        if WIDEN:
            p = p.to(tl.bfloat16).to(tl.float32)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        m = new_m
    return acc, m, l


@triton.jit
def _edges(row_window, window_tokens):
    """Where the windows of a block's rows begin first and last, and end first and last: left, core, core_stop, right."""
    left, core = tl.min(row_window, 0), tl.max(row_window, 0)
    return left, core, tl.maximum(left + window_tokens, core), core + window_tokens


@triton.jit
def _finish(  # noqa: PLR0913, PLR0917
    out,
    lse,
    gram,
    running,
    row,
    num_queries,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GRAMS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Write the outputs of a block and their lse; add their Gram matrix to this program's own."""
    acc, m, l = running  # noqa: E741
    d = tl.arange(0, BLOCK_D)
    there = row < num_queries
    o = (acc / l[:, None]).to(out.dtype.element_ty)
    place = row.to(tl.int64) * heads
    tl.store(out + place[:, None] * D + d[None, :], o, mask=there[:, None] & (d[None, :] < D))
    tl.store(lse + place, (m + tl.log2(l)) * 0.6931471805599453, mask=there)
    if GRAMS:
        o = tl.where(there[:, None], o, 0.0).to(o.dtype)
        if WIDEN:
            o = o.to(tl.float32)
        tile = gram + d[:, None] * D + d[None, :]
        kept = (d[:, None] < D) & (d[None, :] < D)
        so_far = tl.load(tile, mask=kept, other=0.0)
        tl.store(tile, tl.dot(tl.trans(o), o, so_far, input_precision="ieee"), mask=kept)


@triton.jit
def _dual_kernel(  # noqa: PLR0913, PLR0915, PLR0917
    q_ptr,
    k_ptr,
    v_ptr,
    rest_k_ptr,
    rest_v_ptr,
    local_ptr,
    global_ptr,
    lse_ptr,
    gram_ptr,
    stride_qb,
    stride_qt,
    stride_qn,
    stride_kb,
    stride_kt,
    stride_kn,
    stride_vb,
    stride_vt,
    stride_vn,
    stride_rest_kb,
    stride_rest_kt,
    stride_rest_kn,
    stride_rest_vb,
    stride_rest_vt,
    stride_rest_vn,
    num_queries,
    num_rest,
    heads,
    q_start,
    k_start,
    frame_tokens,
    rest_start,  # as k_start and frame_tokens, of the keys that are attended to outside the windows
    rest_tokens,
    window_frames,
    last_window,  # frame that the last window starts with, F - F0
    scale,  # log2(e) / sqrt(D): logits in base 2
    rest_shift,  # log2(frame_tokens / rest_tokens)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RUN: tl.constexpr,
    GRAMS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Program (slot, head, item): RUN blocks of queries, one after the other."""
    slot = tl.program_id(0)
    head = tl.program_id(1)
    item = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    q_base = q_ptr + item * stride_qb + head.to(tl.int64) * stride_qn
    k_base = k_ptr + item * stride_kb + head.to(tl.int64) * stride_kn
    v_base = v_ptr + item * stride_vb + head.to(tl.int64) * stride_vn
    rest_k_base = rest_k_ptr + item * stride_rest_kb + head.to(tl.int64) * stride_rest_kn
    rest_v_base = rest_v_ptr + item * stride_rest_vb + head.to(tl.int64) * stride_rest_vn
    out_base = (item * num_queries * heads + head) * D
    lse_base = lse_ptr + item * num_queries * heads + head
    branch_lse = tl.num_programs(2).to(tl.int64) * num_queries * heads
    grams = tl.num_programs(0)
    gram_base = gram_ptr + ((item * heads + head) * grams + slot) * D * D
    branch_gram = tl.num_programs(2).to(tl.int64) * heads * grams * D * D

    for block in range(slot * RUN, min(slot * RUN + RUN, tl.cdiv(num_queries, BLOCK_M))):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        # Rows past the end get the last row's window, so that they do not extend the range of keys.
        frame = (q_start + tl.minimum(row, num_queries - 1)) // frame_tokens
        first_frame = tl.minimum(tl.maximum(frame - window_frames // 2, 0), last_window)

        q_offset = row.to(tl.int64)[:, None] * stride_qt + d[None, :]
        q = tl.load(q_base + q_offset, mask=(row[:, None] < num_queries) & (d[None, :] < D), other=0.0)
        if WIDEN:
            q = q.to(tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        running = (acc, tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32))

        row_window, window_tokens = first_frame * frame_tokens - k_start, window_frames * frame_tokens
        left, core, core_stop, right = _edges(row_window, window_tokens)
        rows, keys = (row_window, window_tokens), (k_base, v_base, stride_kt, stride_vt)
        whole = core + (core_stop - core) // BLOCK_N * BLOCK_N
        running = _walk(left, core, q, running, rows, keys, scale, 0.0, 1, D, BLOCK_D, BLOCK_N, WIDEN)
        running = _walk(core, whole, q, running, rows, keys, scale, 0.0, 0, D, BLOCK_D, BLOCK_N, WIDEN)
        running = _walk(whole, right, q, running, rows, keys, scale, 0.0, 1, D, BLOCK_D, BLOCK_N, WIDEN)
        _finish(local_ptr + out_base, lse_base, gram_base, running, row, num_queries, heads, D, BLOCK_D, GRAMS, WIDEN)

        row_window, window_tokens = first_frame * rest_tokens - rest_start, window_frames * rest_tokens
        left, core, core_stop, right = _edges(row_window, window_tokens)
        rows, keys = (row_window, window_tokens), (rest_k_base, rest_v_base, stride_rest_kt, stride_rest_vt)
        before = left // BLOCK_N * BLOCK_N
        after = tl.minimum(core_stop + tl.cdiv(right - core_stop, BLOCK_N) * BLOCK_N, num_rest)
        after_whole = after + (num_rest - after) // BLOCK_N * BLOCK_N
        running = _walk(0, before, q, running, rows, keys, scale, rest_shift, 0, D, BLOCK_D, BLOCK_N, WIDEN)
        running = _walk(before, core, q, running, rows, keys, scale, rest_shift, 2, D, BLOCK_D, BLOCK_N, WIDEN)
        running = _walk(core_stop, after, q, running, rows, keys, scale, rest_shift, 2, D, BLOCK_D, BLOCK_N, WIDEN)
        running = _walk(after, after_whole, q, running, rows, keys, scale, rest_shift, 0, D, BLOCK_D, BLOCK_N, WIDEN)
        running = _walk(after_whole, num_rest, q, running, rows, keys, scale, rest_shift, 2, D, BLOCK_D, BLOCK_N, WIDEN)
        global_lse, global_gram = lse_base + branch_lse, gram_base + branch_gram
        _finish(
            global_ptr + out_base, global_lse, global_gram, running, row, num_queries, heads, D, BLOCK_D, GRAMS, WIDEN
        )
