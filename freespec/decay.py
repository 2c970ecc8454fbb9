"""UltraViCo's attention to keys outside the windows: positive logits times a constant below 1, negative ones as they are."""

import functools
import itertools

import torch
from torch import Tensor

from freespec.kernels import Kernel

LOGITS = 1 << 24  # of a chunk of queries of one head; they are written out in fp32 at least


@functools.cache  # one kernel for one number: a compiled block is compiled again for another
def decayed(alpha: float) -> Kernel:
    """A kernel (freespec.kernels) with logits z, or alpha z where z > 0, on any device; memory is bounded by LOGITS."""

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        compute_dtype = torch.promote_types(q.dtype, torch.float32)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=compute_dtype)
        rows = max(
            1, LOGITS // k.shape[2]
        )  # as many for any share of the heads, so that each head has the same bits in all
        for item, head in itertools.product(range(q.shape[0]), range(q.shape[1])):
            keys, values = k[item, head].to(compute_dtype).mT, v[item, head].to(compute_dtype)
            for start in range(0, q.shape[2], rows):
                some = item, head, slice(start, start + rows)
                logits = q[some].to(compute_dtype) @ keys * q.shape[-1] ** -0.5
                logits = torch.where(logits > 0, alpha * logits, logits)
                lse[some] = logits.logsumexp(-1)
                out[some] = (logits.softmax(-1) @ values).to(q.dtype)
        return out, lse

    return kernel


def begin_with(o_first: Tensor, o_rest: Tensor, rows: int) -> Tensor:
    """The first rows of one tensor and the others of another, [B, S, N, D] each."""
    return torch.cat((o_first[:, :rows], o_rest[:, rows:]), dim=1)


def decayed_ref(
    q: Tensor, k: Tensor, v: Tensor, *, frame_tokens: int, window_frames: int, alpha: float, first_frame: bool
) -> Tensor:
    """Reference of UltraViCo on the whole sequence in fp64, by explicit masks; shares nothing with the kernel."""
    num_tokens = q.shape[1]
    frame = torch.arange(num_tokens, device=q.device) // frame_tokens
    start = (frame - window_frames // 2).clamp(0, max(num_tokens // frame_tokens - window_frames, 0))
    outside = (frame < start[:, None]) | (frame >= start[:, None] + window_frames)
    logits = torch.einsum("bsnd,bknd->bnsk", q.double(), k.double()) / q.shape[-1] ** 0.5
    logits = torch.where(outside & (logits > 0), alpha * logits, logits)
    if first_frame:
        logits = logits.masked_fill(outside & (frame[:, None] == 0), float("-inf"))
    return torch.einsum("bnsk,bknd->bsnd", logits.softmax(-1), v.double())
