"""`sliding_window`: every query sees the native number of frames around its own, in every layer and step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freespec.methods.base import StepPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class SlidingWindow:
    """The local branch alone; nothing to set beyond the window itself."""

    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        """The local branch alone, in every step."""
        return [StepPlan(mode="local") for _ in timesteps]

    def weights(self, step: StepPlan, head_dim: int, device: torch.device) -> None:
        """No step fuses, so there is nothing to prepare."""

    def fuse(self, o_local: Tensor, o_global: Tensor, weights: None, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Never called: no step of this method is dual."""
        raise AssertionError("sliding_window has no dual step")
