"""`freespec`: singular-spectrum reconstruction in the early steps, the local branch alone after (method.md, eq. 4-13)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import freespec
from freespec.methods.base import Branches, Grid, Layer, Method, StepPlan
from freespec.types import Device, Tensor


class FusionWeights(NamedTuple):
    """One step's weights: `rank` is g [D] fp64, strongest direction first; `residual` is lam, 0-dim fp64."""

    rank: Tensor
    residual: Tensor


@dataclass(frozen=True, kw_only=True)
class FreeSpec(Method):
    """Settings of FreeSpec; the switches give every row of the paper's ablation table.

    Attributes:
        domain: whether progress and `fused_share` are measured in `timestep` (1000 = pure noise) or in `step` numbers.
        fused_share: share of the run that fuses, counted from noise; the rest is the local branch alone.
        basis: singular vectors that are kept: `local` (LB) or `global` (GB).
        time: time-aware weight exp(-alpha p) (TA); off: 1.
        rank: rank-aware weight exp(-beta (r - 1) / (R - 1)) (RA); off: 1.
        fixed: the weight of the global spectrum if both `time` and `rank` are off.
        alpha: decay of the time weight and of the time-aware residual over the fusion stage.
        beta: decay of the rank weight from the first to the last singular direction.
        residual: global residual that is added: `time` (T-GR), `fixed` (F-GR) or `none`.
        residual_form: `lerp` (returns the base model at native length) or `add`.
        lam_start: residual weight at the first step (`time`).
        lam_end: residual weight that `time` decays to.
        lam_fixed: residual weight of `fixed`.
    """

    domain: Literal["timestep", "step"] = "timestep"
    fused_share: float = 0.5
    basis: Literal["local", "global"] = "local"
    time: bool = True
    rank: bool = True
    fixed: float = 0.5
    alpha: float = 5.0
    beta: float = 3.0
    residual: Literal["time", "fixed", "none"] = "time"
    residual_form: Literal["lerp", "add"] = "lerp"
    lam_start: float = 0.2
    lam_end: float = 0.05
    lam_fixed: float = 0.1

    def __post_init__(self) -> None:
        """Check every number and word, since a wrong one would give a plausible video."""
        for name in ("fused_share", "fixed", "lam_start", "lam_end", "lam_fixed"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"freespec: {name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("alpha", "beta"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"freespec: {name} must be a finite number, 0 or more, got {getattr(self, name)}")
        choices = {
            "domain": ("timestep", "step"),
            "basis": ("local", "global"),
            "residual": ("time", "fixed", "none"),
            "residual_form": ("lerp", "add"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"freespec: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        """Dual while the fusion stage lasts, local after."""
        progress = freespec.schedule.fusion_progress(timesteps, domain=self.domain, fused_share=self.fused_share)
        return [StepPlan(mode="local") if p is None else StepPlan(mode="dual", progress=p) for p in progress]

    def weights(self, step: StepPlan, grid: Grid, head_dim: int, device: Device) -> FusionWeights:
        """g_r (eq. 8) and lam (eq. 12) of one dual step."""
        g = freespec.schedule.rank_weight(head_dim, self.beta if self.rank else 0.0, device)
        if self.time:
            g = g * freespec.schedule.time_weight(step.progress, self.alpha)
        elif not self.rank:
            g = g * self.fixed
        lam = {
            "time": freespec.schedule.residual_weight(
                step.progress, start=self.lam_start, end=self.lam_end, alpha=self.alpha
            ),
            "fixed": self.lam_fixed,
            "none": 0.0,
        }[self.residual]
        return FusionWeights(rank=g, residual=g.new_tensor(lam))

    def fuse(self, branches: Branches, weights: FusionWeights, layer: Layer) -> Tensor:
        """Eq. 9-13 on [B, s, N, D]; the Gram matrices of both branches are summed over the tokens in one call."""
        o_local, o_global = branches.o_local, branches.o_global
        assert o_local is not None and o_global is not None, "freespec fuses two branches"
        gram_local, gram_global = freespec.spectrum.summed_grams(
            o_local,
            o_global,
            num_tokens=layer.grid.tokens,
            sum_tokens=layer.sum_tokens,
            max_tokens=layer.max_tokens,
        )
        local_basis, spectrum = self.basis == "local", freespec.spectrum
        basis = spectrum.local_basis_matrix if local_basis else spectrum.global_basis_matrix
        make = partial(basis, weight=weights.rank, eps=spectrum.guard(o_local.dtype))
        matrix, base = layer.share_heads(make, gram_local, gram_global), o_local if local_basis else o_global
        return freespec.spectrum.reconstruct(base, matrix, o_global, weights.residual, self.residual_form)
