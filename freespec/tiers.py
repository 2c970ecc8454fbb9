"""Attention to keys in tiers by distance, each at temporal positions of its own, merged by log-sum-exp.

Queries and keys arrive rotated at their own positions. A tier turns them by the difference of two rows of the model's rotary table, so
that no tier needs them unrotated, and the parts of all tiers are merged without a mask.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from freespec.attention import dense_part, merge_into, merge_step
from freespec.kernels import Kernel, kernel_at
from freespec.methods.base import Tier

# Added to every position: the first latent frame of LTX-Video stands for one frame of the video, so it is nearer to the next than others.
FIRST_POSITION = 1
_NO = -1  # in a table: own positions, whole frames
Run = tuple[int, int, int, int, int]


def table_of(tiers: Sequence[Tier]) -> Tensor:
    """Tiers as `attend` takes them: [T, 5, F] int64 on the CPU, of each frame start, stop, positions and rows."""
    frames = len(tiers[0].start)
    none = (_NO,) * frames
    rows = [none if tier.rows is None else (tier.rows,) * frames for tier in tiers]
    return torch.tensor(
        [
            [tier.start, tier.stop, tier.q_positions or none, tier.k_positions or none, band]
            for tier, band in zip(tiers, rows, strict=True)
        ],
        device="cpu",
    )


def frame_rotation(tables: tuple[Tensor, Tensor], *, frame_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [F, 1 or N, D] of the first token of each frame, from rotary tables [1, S, 1, D] or [B, S, N D].

    Tokens at the same place of two frames differ in their temporal angles alone, so no one needs to know which columns those are.
    """
    cos, sin = (table[0, ::frame_tokens].flatten(1).unflatten(-1, (-1, head_dim)) for table in tables)
    return cos, sin


def attend(  # noqa: PLR0917 - the order of `tiers_op`
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiers: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    kernel: str,
    columns: int,
) -> Tensor:
    """Attention [B, S, N, D] of all tokens to the union of the tiers; `tiers` is a `table_of`, cos and sin a `frame_rotation`.

    `kernel` is a key of freespec.kernels.
    """
    if torch.compiler.is_compiling():
        return tiers_op(q, k, v, tiers, cos, sin, kernel, columns)
    if q.shape[2] == 0:  # a rank without heads
        return torch.empty_like(q)
    frames = tiers.shape[2]
    split = (frames, q.shape[1] // frames // columns, columns)
    out = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32)).unflatten(1, split)
    lse = torch.full(out.shape[:-1], float("-inf"), dtype=out.dtype, device=out.device)
    for tier in tiers.tolist():
        _add_tier(out, lse, (q, k, v), tier, (cos, sin), kernel_at(kernel))
    return out.flatten(1, 3).to(q.dtype)


@torch.library.custom_op("freespec::tiers", mutates_args=())
def tiers_op(  # noqa: PLR0917 - operators have no keyword-only arguments
    q: Tensor, k: Tensor, v: Tensor, tiers: Tensor, cos: Tensor, sin: Tensor, kernel: str, columns: int
) -> Tensor:
    """`attend` as an operator."""
    return attend(q, k, v, tiers, cos, sin, kernel=kernel, columns=columns)


@tiers_op.register_fake
def _shape(  # noqa: PLR0917
    q: Tensor, k: Tensor, v: Tensor, tiers: Tensor, cos: Tensor, sin: Tensor, kernel: str, columns: int
) -> Tensor:
    return q.new_empty(q.shape)


def _add_tier(  # noqa: PLR0917
    out: Tensor,
    lse: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    tier: Sequence[Sequence[int]],
    rotation: tuple[Tensor, Tensor],
    kernel: Kernel,
) -> None:
    """Merge the attention of q, k, v [B, S, N, D] to one tier into out [B, F, H, W, N, D]; its turned q and k end here."""
    starts, stops, q_positions, k_positions, rows = tier
    runs = list(_runs(starts, stops))
    if not runs:
        return
    q, k, v = qkv
    split = out.shape[1:4]
    turned = _turn(q, q_positions, *rotation), _turn(k, k_positions, *rotation), v
    parts = tuple(x.unflatten(1, split) for x in turned)
    for seeing, seen in _bands(split[1], rows[0]):
        q, k, v = (x[:, :, band].flatten(1, 3) for x, band in zip(parts, (seeing, seen, seen), strict=True))
        for run in runs:
            made = _attend_run(kernel, run, (q, k, v), split[0])
            _add(out[:, :, seeing], lse[:, :, seeing], *made, first=run[0])
            del made  # before the next run's


def _runs(starts: Sequence[int], stops: Sequence[int]) -> Iterator[Run]:
    """(frame, count, start, length, step) of frames side by side that see as many frames, each `step` (0 or 1) after the one before."""
    frame = 0
    while frame < len(starts):
        start, length = starts[frame], stops[frame] - starts[frame]
        stop, step = frame + 1, 0
        while length > 0 and stop < len(starts) and stops[stop] - starts[stop] == length:
            moved = starts[stop] - starts[stop - 1]
            if moved not in (0, 1) or (stop > frame + 1 and moved != step):
                break
            stop, step = stop + 1, moved
        if length > 0:
            yield frame, stop - frame, start, length, step
        frame = stop


def _bands(rows: int, reach: int) -> Iterator[tuple[slice, slice]]:
    """Rows of queries and the rows of keys that they see: all of all, or of each row those `reach` above and below, cut at the edges."""
    if reach == _NO:
        yield slice(0, rows), slice(0, rows)
        return
    for row in range(rows):
        yield slice(row, row + 1), slice(max(row - reach, 0), min(row + reach + 1, rows))


def _turn(x: Tensor, positions: Sequence[int], cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, S, N, D], rotated at its own frames, as if rotated at these positions: pairs side by side turn by the difference."""
    if positions[0] == _NO:
        return x
    at = torch.tensor(positions, device=cos.device) + FIRST_POSITION
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(torch.float64), sin.to(torch.float64)
    difference = cos[at] * cos + sin[at] * sin, sin[at] * cos - cos[at] * sin
    by_cos, by_sin = (table[:, None].to(dtype) for table in difference)
    frames = x.unflatten(1, (len(positions), -1))
    made = torch.empty_like(frames)
    step = max(1, merge_step(x.shape[1]) // frames.shape[2])  # bounds the copies in fp32
    for start in range(0, len(positions), step):
        some = slice(start, start + step)
        wide = frames[:, some].to(dtype)
        pairs = wide.unflatten(-1, (-1, 2))
        across = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
        made[:, some] = wide * by_cos[some] + across * by_sin[some]
    return made.flatten(1, 2)


def _attend_run(kernel: Kernel, run: Run, qkv: tuple[Tensor, Tensor, Tensor], num_frames: int) -> tuple[Tensor, Tensor]:
    """out [B, count, s, N, D] and lse of the frames of a run, s tokens each: one call, or one per batch item on strided keys."""
    frame, count, start, length, step = run
    q, k, v = qkv
    rows, keys = q.shape[1] // num_frames, k.shape[1] // num_frames
    q = q[:, frame * rows : (frame + count) * rows]
    span = slice(start * keys, (start + step * (count - 1) + length) * keys)
    if step == 0:
        part, part_lse = dense_part(kernel, q, k[:, span], v[:, span])
        return part.unflatten(1, (count, rows)), part_lse.unflatten(1, (count, rows))
    parts = []
    for item in range(q.shape[0]):
        # As in `WindowedAttention`: the batch stride is one frame, so overlapping keys are not copied.
        k_bnkd, v_bnkd = (x[item, span].unfold(0, length * keys, keys).transpose(-1, -2) for x in (k, v))
        part, part_lse = kernel(q[item].unflatten(0, (count, rows)).transpose(1, 2), k_bnkd, v_bnkd)
        parts.append((part.transpose(1, 2), part_lse.transpose(1, 2)))
    if len(parts) == 1:
        return parts[0][0][None], parts[0][1][None]
    outs, all_lse = zip(*parts, strict=True)
    return torch.stack(outs), torch.stack(all_lse)


def _add(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, *, first: int) -> None:
    """Merge frames of a part [B, n, s, N, D] from `first` on into out [B, F, r, W, N, D], some frames at a time."""
    count, tokens = part.shape[1:3]
    split = out.shape[2:4]
    step = max(1, merge_step(out.shape[1] * tokens) // tokens)
    for start in range(0, count, step):
        some, to = slice(start, start + step), slice(first + start, first + min(start + step, count))
        merge_into(out[:, to], lse[:, to], part[:, some].unflatten(2, split), part_lse[:, some].unflatten(2, split))
