"""When and how strongly the global branch guides: progress, time, rank and residual weights (method.md, eq. 6-8 and 12)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def fusion_progress(
    timesteps: Sequence[float], *, domain: str, split: float, max_timestep: float = 1000.0
) -> list[float | None]:
    """Progress p of each denoising step in the fusion stage, 0 at its start; None for a late step (local branch only).

    `timestep`: with s = split * T, step t fuses if t >= s, at p = (T - t) / (T - s) (eq. 6).
    `step`: of n steps the first n_d = ceil(split * n) fuse, step i at p = i / n_d.
    """
    if not 0.0 <= split <= 1.0:
        raise ValueError(f"split must lie in [0, 1], got {split}")
    if domain == "step":
        # The product is rounded before ceil, or 0.56 * 50 = 28.000000000000004 would make a 29th fusion step.
        num_dual = math.ceil(round(split * len(timesteps), 9))
        return [i / num_dual if i < num_dual else None for i in range(len(timesteps))]
    if domain != "timestep":
        raise ValueError(f"unknown domain {domain!r}; choose timestep or step")
    stop = split * max_timestep
    span = max_timestep - stop
    return [((max_timestep - t) / span if span else 0.0) if t >= stop else None for t in timesteps]


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
