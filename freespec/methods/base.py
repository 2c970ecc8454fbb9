"""What a method tells the engine: the mode of each denoising step, and how the two branches become one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Mode = Literal["global", "local", "dual"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One denoising step: which branches every self-attention layer computes, and the progress of its fusion."""

    mode: Mode
    progress: float = 0.0


class Method(Protocol):
    """A method for long videos. Its fields are its hyperparameters; it holds no tensor and no state of a run."""

    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        """The mode of each step, from the scheduler's timesteps (1000 = pure noise), first step first."""

    def weights(self, step: StepPlan, head_dim: int, device: torch.device) -> Any:
        """Tensors that `fuse` needs in this step. Made once per step, because numbers would recompile a compiled block."""

    def fuse(self, o_local: Tensor, o_global: Tensor, weights: Any, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """One layer's output from both branches, all [B, s, N, D]; `reduce` sums a tensor over the shards of the tokens."""
