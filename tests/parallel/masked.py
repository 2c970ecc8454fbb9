"""Attention by explicit masks, in the dtype given: the simple twin of everything that the layouts compute."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskedKernels:
    """parallel.attention.BranchKernels written out. It refuses calls without queries, heads or keys."""

    frames: int
    frame_tokens: int
    window: int

    def window_mask(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> Tensor:
        """[queries, keys]: is the key's frame in the query's window?"""
        q_frame = torch.arange(q_start, q_stop) // self.frame_tokens
        k_frame = torch.arange(k_start, k_stop) // self.frame_tokens
        first = (q_frame - self.window // 2).clamp(0, max(self.frames - self.window, 0))[:, None]
        return (k_frame >= first) & (k_frame < first + self.window)

    def halo(self, q_start: int, q_stop: int) -> tuple[int, int]:
        mask = self.window_mask(q_start, q_stop, 0, self.frames * self.frame_tokens)
        seen = mask.any(dim=0).nonzero().flatten().tolist()
        return (seen[0], seen[-1] + 1) if seen else (0, 0)

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return masked_attention(q, k, v, torch.ones(q.shape[1], k.shape[1], dtype=torch.bool))

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.dense(q, k, v)[0]

    def far(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.dense(q, k, v)

    def local(self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int) -> tuple[Tensor, Tensor]:
        mask = self.window_mask(q_start, q_start + q.shape[1], k_start, k_start + k.shape[1])
        whole = self.window_mask(q_start, q_start + q.shape[1], 0, self.frames * self.frame_tokens)
        assert torch.equal(mask.sum(dim=1), whole.sum(dim=1)), "the keys do not cover the windows"
        return masked_attention(q, k, v, mask)

    def rest(self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int) -> tuple[Tensor, Tensor]:
        return masked_attention(
            q, k, v, ~self.window_mask(q_start, q_start + q.shape[1], k_start, k_start + k.shape[1])
        )

    def dual(
        self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int, *, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        local = self.local(q, k, v, q_start, k_start)
        out, lse = local[0].to(dtype, copy=True), local[1].clone()
        if k.shape[1] > self.window * self.frame_tokens:
            self.merge_into(out, lse, *self.rest(q, k, v, q_start, k_start))
        return local, (out, lse)

    def merge_into(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        total = torch.logaddexp(lse, part_lse)
        weights = [torch.exp(part - total).nan_to_num(0.0)[..., None] for part in (lse, part_lse)]
        out.copy_(out * weights[0] + part * weights[1])
        lse.copy_(total)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, S, N, D] and lse [B, S, N] of queries that see the keys where mask [S, K] is True."""
    assert q.numel() > 0 and k.numel() > 0, "a kernel was called for nothing"
    logits = torch.einsum("bqnd,bknd->bqnk", q, k) / q.shape[-1] ** 0.5
    logits = logits.masked_fill(~mask[None, :, None, :], float("-inf"))
    lse = logits.logsumexp(dim=-1)
    weights = torch.exp(logits - lse[..., None]).nan_to_num(0.0)
    return torch.einsum("bqnk,bknd->bqnd", weights, v), lse
