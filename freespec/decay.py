"""UltraViCo's attention to keys outside the windows: positive logits times a constant below 1, negative ones as they are."""

import functools

import torch
from torch import Tensor

from freespec.kernels import Kernel

LOGITS = 1 << 24  # of a chunk of queries; they are written out in fp32 at least


@functools.cache  # one kernel for one number: a compiled block is compiled again for another
def decayed(alpha: float) -> Kernel:
    """A kernel (freespec.kernels) with logits z, or alpha z where z > 0, on any device; memory is bounded by LOGITS."""

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        compute_dtype = torch.promote_types(q.dtype, torch.float32)
        keys, values = k.to(compute_dtype).mT, v.to(compute_dtype)
        rows = max(1, LOGITS // (k.shape[0] * k.shape[1] * k.shape[2]))
        outs, lses = [], []
        for some in q.split(rows, dim=2):
            logits = some.to(compute_dtype) @ keys * q.shape[-1] ** -0.5
            logits = torch.where(logits > 0, alpha * logits, logits)
            lses.append(logits.logsumexp(-1))
            outs.append((logits.softmax(-1) @ values).to(q.dtype))
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

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
