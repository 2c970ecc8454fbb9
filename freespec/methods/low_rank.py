"""Low-rank reconstruction, for analysis: a branch's strongest singular directions alone (App. B, Fig. 2c-d).

Not in METHODS, since it is no way to make better videos: hand the object to `apply_method`, or name it by import path,
`freespec.methods.low_rank:LowRank`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from freespec import spectrum
from freespec.methods.base import Branches, Grid, Layer, Method, StepPlan, check_choice


@dataclass(frozen=True, kw_only=True)
class LowRank(Method):
    """Every layer's output O = U S Vᵀ becomes U_k S_k V_kᵀ, per head, with k = ceil(ratio · D), in every step.

    At native length, F <= F0, the engine runs the base model and reconstructs nothing.

    Attributes:
        ratio: share of the singular directions that is kept, strongest first; 1 keeps all and is the branch itself.
        branch: the attention output that is reconstructed: `global` (as `direct`) or `local` (as `sliding_window`).
    """

    ratio: float = 0.25
    branch: Literal["global", "local"] = "global"

    def __post_init__(self) -> None:
        """Check both, since a wrong one would give a plausible video."""
        check_choice("low_rank", "branch", self.branch, ("global", "local"))
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"low_rank: ratio must lie in (0, 1], got {self.ratio}")

    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        """Dual in every step: a step that fuses is one whose output a method may change."""
        return [StepPlan(mode="dual") for _ in timesteps]

    def weights(self, step: StepPlan, grid: Grid, head_dim: int, device: torch.device) -> Tensor:
        """[D] fp64: 1 for the directions that are kept, strongest first, and 0 for the others."""
        # The product is rounded before ceil, or 0.07 * 100 = 7.000000000000001 would keep an eighth direction.
        count = math.ceil(round(self.ratio * head_dim, 9))
        return (torch.arange(head_dim, device=device) < count).double()

    def fuse(self, branches: Branches, weights: Tensor, layer: Layer) -> Tensor:
        """O V_k V_kᵀ of the chosen branch, [B, s, N, D]."""
        out = branches.o_global if self.branch == "global" else branches.o_local
        assert out is not None, "a dual step has both branches"
        return keep_directions(out, layer.sum_tokens(spectrum.gram(out)), weights)


def keep_directions(o_BSND: Tensor, gram_BNDD: Tensor, weight: Tensor) -> Tensor:
    """O V diag(weight) Vᵀ with V the right singular vectors of O, strongest first, from its Gram matrix OᵀO.

    [B, S, N, D] and [B, N, D, D] of all its tokens -> [B, S, N, D] in O's dtype; `weight` is [D].
    """
    _, vectors = spectrum.spectrum(gram_BNDD)
    projection = (vectors * weight) @ vectors.transpose(-1, -2)
    return spectrum.reconstruct(o_BSND, projection, o_BSND, torch.zeros_like(weight[0]), "lerp")


def keep_directions_ref(o_BSND: Tensor, count: int) -> Tensor:
    """Reference of `keep_directions` by SVD in fp64: the best approximation of rank `count`, per item and head."""
    u, s, vh = torch.linalg.svd(o_BSND.double().permute(0, 2, 1, 3), full_matrices=False)
    return torch.einsum("bnsr,bnr,bnrd->bsnd", u[..., :count], s[..., :count], vh[..., :count, :])
