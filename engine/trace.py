"""Effective rank and fusion weights of every layer and step of a run, for plots."""

from dataclasses import dataclass, field

from torch import Tensor

from freespec import spectrum
from freespec.methods.freespec import FusionWeights


@dataclass
class Trace:
    """Rows of numbers, one per step, layer and branch; `enabled` lets a run record its conditional pass only.

    Attributes:
        rows: dicts with step, layer, branch (`local` or `global`), effective_rank (mean over heads, of at most D), and for
            dual steps weight_first and weight_last (g of the first and last singular direction) and residual (lam).
        enabled: whether `record` adds rows.
    """

    rows: list[dict] = field(default_factory=list)
    enabled: bool = True

    def record(
        self, layer: int, step: int, out_local: Tensor | None, out_global: Tensor | None, weights: FusionWeights | None
    ) -> None:
        """Add one row per branch that was computed; outputs are [B, S, N, D]."""
        if not self.enabled:
            return
        fusion = {}
        if isinstance(weights, FusionWeights):
            fusion = {
                "weight_first": float(weights.rank[0]),
                "weight_last": float(weights.rank[-1]),
                "residual": float(weights.residual),
            }
        for branch, out in (("local", out_local), ("global", out_global)):
            if out is None:
                continue
            sigma, _ = spectrum.spectrum(spectrum.gram(out))
            rank = float(spectrum.effective_rank(sigma).mean())
            self.rows.append({"step": step, "layer": layer, "branch": branch, "effective_rank": rank, **fusion})
