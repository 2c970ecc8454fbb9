"""`direct`: the frozen model on the long sequence, every query sees every key."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freespec.methods.base import StepPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Direct:
    """Full attention in every layer and step; nothing to set."""

    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        """The global branch alone, in every step."""
        return [StepPlan(mode="global") for _ in timesteps]

    def weights(self, step: StepPlan, head_dim: int, device: torch.device) -> None:
        """No step fuses, so there is nothing to prepare."""

    def fuse(self, o_local: Tensor, o_global: Tensor, weights: None, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Never called: no step of this method is dual."""
        raise AssertionError("direct has no dual step")
