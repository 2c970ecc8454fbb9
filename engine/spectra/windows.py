"""Spectra of attention at windows of several native lengths, measured beside an unchanged run (Fig. 2a-b)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.spectra.trace import SpectralTrace
from freespec import spectrum
from freespec.attention import WindowedAttention
from freespec.methods.freespec import FusionWeights
from parallel.attention import SequenceLayout
from parallel.shards import Mode, length

MULTIPLES = (1, 2, 3, 4)


@dataclass
class WindowSpectra(SpectralTrace):
    """A trace that computes, of each layer's q, k and v, attention at windows of m x native and its spectrum per head.

    Only Gram matrices leave the layer, so no tensor of all tokens is kept. Pass it as `trace` to `LongVideoEngine.denoise`,
    which calls it for the conditional pass. It costs up to one local attention per window and layer in the observed steps.

    Attributes:
        rows: dicts with step, layer, head, multiple (of the native window, to two decimals), window_frames (latent frames),
            effective_rank (at most D) and first_share (largest singular value over the sum of all).
        multiples: windows in native lengths. One longer than the video is the whole video, and its row holds its length in
            native lengths; one that would not widen the window is left out.
        steps: numbers of the observed steps; None is all.
    """

    multiples: Sequence[int] = MULTIPLES
    steps: frozenset[int] | None = None

    def record(
        self,
        layer: int,
        step: int,
        outputs: tuple[Tensor | None, Tensor | None],
        weights: FusionWeights | Any | None,
        layout: SequenceLayout,
    ) -> None:
        """Do nothing: the method's own branches are not measured."""

    def observe(
        self,
        layer: int,
        step: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        attention: WindowedAttention,
        layout: SequenceLayout,
    ) -> None:
        """Add a row per window and head; q, k, v [B, r, n, D] are those of the layer, on every rank of the pass."""
        if not self.enabled or (self.steps is not None and step not in self.steps):
            return
        # A model that runs both passes of guidance as one batch has the conditional one last.
        q, k, v = (x[-1:] for x in qkv)
        for multiple in self.multiples:
            if multiple > 1 and (multiple - 1) * attention.window_frames >= attention.num_frames:
                continue
            window = min(multiple * attention.window_frames, attention.num_frames)
            kernels = replace(attention, window_frames=window)
            mode: Mode = "global" if window == attention.num_frames else "local"
            local, o_global = layout.branches(q, k, v, mode, kernels)
            out = o_global if mode == "global" else local
            assert out is not None
            ranks, shares = head_spectra(out, layout)
            self.rows += [
                {
                    "step": step,
                    "layer": layer,
                    "head": head,
                    "multiple": multiple_of(window, attention.window_frames),
                    "window_frames": window,
                    "effective_rank": rank,
                    "first_share": share,
                }
                for head, (rank, share) in enumerate(zip(ranks, shares, strict=True))
            ]


def multiple_of(window_frames: int, native_frames: int) -> int | float:
    """A window in native lengths: a whole number, or one with two decimals."""
    whole, rest = divmod(window_frames, native_frames)
    return round(window_frames / native_frames, 2) if rest else whole


def head_spectra(out_BrnD: Tensor, layout: SequenceLayout) -> tuple[list[float], list[float]]:
    """Effective rank and share of the largest singular value of each of all N heads, the same on every rank.

    `out_BrnD` is one video's attention output, this rank's tokens and heads.
    """
    sigma, _ = spectrum.spectrum(layout.reduce(spectrum.gram(out_BrnD)))
    total = sigma.sum(-1)
    mine = torch.stack((spectrum.effective_rank(sigma), sigma[..., 0] / total.clamp_min(torch.finfo(total.dtype).tiny)))
    start, stop = share = layout.plan.head_shares[layout.mesh.ulysses.rank]
    every = mine.new_zeros(2, layout.plan.heads)
    if length(share):  # with more ranks than heads, some have none
        every[:, start:stop] = mine[:, 0]
    ranks, shares = layout.sum_heads(every).tolist()
    return ranks, shares
