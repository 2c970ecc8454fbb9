"""Attention to texts over time: each frame attends to the texts of its events, as `freespec.events` plans it.

Tokens are frame-major, so the frames of an event are a slice of the queries, and each text is attended by dense calls over
its own slices: no mask of tokens x text is made. A relay's penalty depends on frame and event alone, so it is a merge by
log-sum-exp with each event's lse lowered by its penalty.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from freespec.attention import merge
from freespec.events import Event, Piece, Share

Partial = tuple[Tensor, Tensor]  # out [B, s, N, D], lse [B, s, N]


def place(pieces: Sequence[Piece], device: torch.device, dtype: torch.dtype) -> tuple[Piece, ...]:
    """Pieces whose weights and penalties are tensors [frames of the piece] on a device, in fp32 at least, for outputs of `dtype`.

    Called once a video: copying a number to a device within a forward makes the host wait.
    """
    compute_dtype = torch.promote_types(dtype, torch.float32)

    def numbers(values: tuple[float, ...] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=compute_dtype, device=device)

    return tuple(
        replace(
            piece,
            shares=tuple(
                Share(
                    weights=numbers(share.weights),
                    events=tuple((index, numbers(penalties)) for index, penalties in share.events),
                )
                for share in piece.shares
            ),
        )
        for piece in pieces
    )


def attend(
    q: Tensor,
    pieces: Sequence[Piece],
    *,
    q_start: int,
    frame_tokens: int,
    one: Callable[[int, Tensor], Tensor],
    several: Callable[[int, Tensor], Partial],
) -> Tensor:
    """Attention of the queries [B, s, N, D] from token `q_start` on, each to the texts of its frame: [B, s, N, D].

    Args:
        q: queries of a contiguous part of the video; it may begin and end inside a frame.
        pieces: of the whole video, from `freespec.events.plan` and `place`.
        q_start: absolute token of the first query.
        frame_tokens: tokens per latent frame.
        one: attention of some queries to the text of an event, by its index.
        several: the same with the log-sum-exp of the logits, natural logarithm.
    """
    outs = []
    for piece in pieces:
        start = max(piece.start * frame_tokens, q_start)
        stop = min(piece.stop * frame_tokens, q_start + q.shape[1])
        if start >= stop:
            continue
        rows = q[:, start - q_start : stop - q_start]
        frames = torch.arange(start, stop, device=q.device) // frame_tokens - piece.start
        outs.append(_attend_piece(rows, piece, frames, one, several))
    if not outs:  # a rank without tokens
        return torch.zeros_like(q)
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _attend_piece(
    q: Tensor,
    piece: Piece,
    frames: Tensor,
    one: Callable[[int, Tensor], Tensor],
    several: Callable[[int, Tensor], Partial],
) -> Tensor:
    """`frames` [s] is the frame of each query, counted from the piece's first."""
    total = None
    for share in piece.shares:
        if len(share.events) == 1:
            out = one(share.events[0][0], q)
        else:
            out = _relayed(q, share, frames, several)
        if share.weights is None:
            return out
        weighted = out * share.weights[frames, None, None]
        total = weighted if total is None else total + weighted
    assert total is not None, "a piece has a share"
    return total.to(q.dtype)


def _relayed(q: Tensor, share: Share, frames: Tensor, several: Callable[[int, Tensor], Partial]) -> Tensor:
    """One softmax over the texts of several events, from a call for each."""
    parts: Iterator[Partial] = (
        (out, lse - penalties[frames, None])
        for (out, lse), penalties in ((several(index, q), penalties) for index, penalties in share.events)
    )
    merged = next(parts)
    for part in parts:
        merged = merge(*merged, *part)
    return merged[0]


def timeline_ref(
    q: Tensor, texts: Sequence[tuple[Tensor, Tensor]], events: Sequence[Event], *, frame_tokens: int
) -> Tensor:
    """Reference on a whole video [B, S, N, D] in fp64: every frame attends to every text, by explicit logits and weights."""
    outs = []
    runs: list[list[int]] = []
    for index, event in enumerate(events):
        if index and event.transition == "relay":
            runs[-1].append(index)
        else:
            runs.append([index])
    for token in range(q.shape[1]):
        at = token // frame_tokens + 0.5
        total = torch.zeros_like(q[:, 0], dtype=torch.float64)
        for number, run in enumerate(runs):
            weight = 1.0
            if number > 0:
                first = events[run[0]]
                width = first.width if first.transition == "fade" else 1e-9
                weight *= min(max((at - first.start) / width + 0.5, 0.0), 1.0)
            if number + 1 < len(runs):
                after = events[runs[number + 1][0]]
                width = after.width if after.transition == "fade" else 1e-9
                weight *= 1.0 - min(max((at - after.start) / width + 0.5, 0.0), 1.0)
            logits, values = [], []
            for index in run:
                middle = (events[index].start + events[index].stop) / 2
                beyond = max(abs(at - middle) - (events[index].stop - events[index].start) / 2, 0.0)
                side = index if at < middle else index + 1
                inner = run[0] < side <= run[-1]
                penalty = beyond**2 / (2 * events[side].width ** 2) if inner else 0.0
                k, v = texts[index]
                scores = torch.einsum("bnd,bknd->bnk", q[:, token].double(), k.double()) / q.shape[-1] ** 0.5
                logits.append(scores - penalty)
                values.append(v.double())
            probabilities = torch.cat(logits, dim=-1).softmax(-1)
            total += weight * torch.einsum("bnk,bknd->bnd", probabilities, torch.cat(values, dim=1))
        outs.append(total)
    return torch.stack(outs, dim=1)
