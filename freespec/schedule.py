"""When and how strongly the global branch guides: progress, time, rank and residual weights (method.md, eq. 6-8 and 12)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def fusion_progress(
    timesteps: Sequence[float], *, domain: str, fused_share: float, max_timestep: float = 1000.0
) -> list[float | None]:
    """Progress p of each denoising step in the fusion stage, 0 at its start; None for a late step (local branch only).

    The fusion stage is `fused_share` of the run, counted from noise.
    `timestep`: with s = (1 - fused_share) T, step t fuses if t >= s, at p = (T - t) / (T - s) (eq. 6).
    `step`: of n steps the first n_d = `first_steps` fuse, step i at p = i / n_d.
    """
    if not 0.0 <= fused_share <= 1.0:
        raise ValueError(f"fused_share must lie in [0, 1], got {fused_share}")
    if domain == "step":
        num_dual = first_steps(fused_share, len(timesteps))
        return [i / num_dual if i < num_dual else None for i in range(len(timesteps))]
    if domain != "timestep":
        raise ValueError(f"unknown domain {domain!r}; choose timestep or step")
    if fused_share == 0.0:
        return [None] * len(timesteps)
    stop = last_timestep(fused_share, max_timestep)
    span = max_timestep - stop
    return [((max_timestep - t) / span if span else 0.0) if t >= stop else None for t in timesteps]


def first_steps(share: float, num_steps: int) -> int:
    """ceil(share n) steps; the product is rounded first, or 0.56 * 50 = 28.000000000000004 would make a 29th."""
    return math.ceil(round(share * num_steps, 9))


def last_timestep(share: float, max_timestep: float = 1000.0) -> float:
    """(1 - share) T: where the noisy share of the timesteps ends; rounded, or 1 - 0.9 would let a step at 100 go."""
    return round((1.0 - share) * max_timestep, 9)


def time_weight(progress: float, alpha: float) -> float:
    """w = exp(-alpha p), eq. 7."""
    return math.exp(-alpha * progress)


def rank_weight(num_ranks: int, beta: float, device: torch.device | None = None) -> Tensor:
    """exp(-beta (r - 1) / (R - 1)) for r = 1..R, the rank factor of eq. 8: [R] fp64."""
    index = torch.arange(num_ranks, dtype=torch.float64, device=device)
    return torch.exp(-beta * index / max(num_ranks - 1, 1))


def residual_weight(progress: float, *, start: float, end: float, alpha: float) -> float:
    """lam = lam_end + (lam_start - lam_end) exp(-alpha p), eq. 12."""
    return end + (start - end) * math.exp(-alpha * progress)
