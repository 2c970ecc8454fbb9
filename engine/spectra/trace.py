"""Effective rank and fusion weights of every layer and step of a run, for plots."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from freespec import spectrum
from freespec.attention import WindowedAttention
from freespec.methods.freespec import FusionWeights
from parallel.attention import SequenceLayout


@dataclass
class SpectralTrace:
    """Rows of numbers, one per step, layer and branch, the same on every rank that runs the conditional pass.

    Attributes:
        rows: dicts with step, layer, branch (`local` or `global`), effective_rank (mean over batch and heads, of at most D),
            and for dual steps weight_first and weight_last (g of the first and last singular direction) and residual (lam).
        enabled: whether `record` adds rows; a run with guidance records its conditional pass only.
    """

    rows: list[dict] = field(default_factory=list)
    enabled: bool = True

    def observe(
        self,
        layer: int,
        step: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        attention: WindowedAttention,
        layout: SequenceLayout,
    ) -> None:
        """Called before attention with q, k, v [B, r, n, D]; this trace looks at outputs only."""

    def record(
        self,
        layer: int,
        step: int,
        outputs: tuple[Tensor | None, Tensor | None],
        weights: FusionWeights | None,
        layout: SequenceLayout,
    ) -> None:
        """Add one row per branch that was computed; `outputs` are the local and the global one, [B, r, n, D]."""
        if not self.enabled:
            return
        fusion = {}
        if isinstance(weights, FusionWeights):
            fusion = {
                "weight_first": float(weights.rank[0]),
                "weight_last": float(weights.rank[-1]),
                "residual": float(weights.residual),
            }
        for branch, out in zip(("local", "global"), outputs, strict=True):
            if out is None:
                continue
            # A model that runs both passes of guidance as one batch has the conditional one last.
            sigma, _ = spectrum.spectrum(layout.reduce(spectrum.gram(out[-1:])))
            ranks = spectrum.effective_rank(sigma)
            total = layout.sum_heads(torch.stack((ranks.sum(), ranks.new_tensor(ranks.numel()))))
            row = {"step": step, "layer": layer, "branch": branch, "effective_rank": float(total[0] / total[1])}
            self.rows.append(row | fusion)
