"""`direct_far`: `direct` with fewer of the keys outside the window (`attention.far`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from freespec.methods.base import Branches, Layer, Method, StepPlan
from freespec.types import Tensor


@dataclass(frozen=True, kw_only=True)
class DirectFar(Method):
    """The global branch of dual steps in every layer and step; with `attention.far all` it is `direct` up to rounding."""

    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        """Dual in every step: the window's keys, and those of `attention.far` outside it."""
        return [StepPlan(mode="dual") for _ in timesteps]

    def fuse(self, branches: Branches, weights: Any, layer: Layer) -> Tensor:
        """The global branch, [B, s, N, D]."""
        assert branches.o_global is not None, "a dual step has both branches"
        return branches.o_global
