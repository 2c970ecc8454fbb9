"""`ultravico`: attention to keys outside the window is damped (arXiv 2511.20123)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import freespec
from freespec.methods.base import Branches, Layer, Method, StepPlan
from freespec.types import Tensor


@dataclass(frozen=True, kw_only=True)
class UltraViCo(Method):
    """Settings of UltraViCo: full attention whose positive logits of keys outside the window are multiplied by alpha, in every step.

    Attributes:
        alpha: factor of the positive logits outside the window; negative ones stay.
        first_frame: queries of the first frame see their window only.
    """

    alpha: float = 0.9
    first_frame: bool = True

    def __post_init__(self) -> None:
        """Check the number, since a wrong one would give a plausible video."""
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"ultravico: alpha must lie in [0, 1], got {self.alpha}")

    @property
    def refused_axes(self) -> Mapping[str, str]:
        """A shard does not know which of its queries are the first frame's."""
        return {"ring": "its rule for the first frame needs all tokens of a head on one rank"}

    @property
    def rest_kernel(self) -> Any:
        """Damped attention to the keys outside the windows."""
        return freespec.decay.decayed(self.alpha)

    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        """Both branches in every step."""
        return [StepPlan(mode="dual") for _ in timesteps]

    def fuse(self, branches: Branches, weights: Any, layer: Layer) -> Tensor:
        """The global branch, and for the first frame's queries the local one, [B, S, N, D]."""
        assert branches.o_global is not None and branches.o_local is not None, "a dual step has both branches"
        rows = layer.grid.frame_tokens if self.first_frame else 0
        return freespec.decay.begin_with(branches.o_local, branches.o_global, rows)
