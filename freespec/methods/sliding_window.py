"""`sliding_window`: every query sees the native number of frames around its own, in every layer and step."""

from collections.abc import Sequence
from dataclasses import dataclass

from freespec.methods.base import Method, StepPlan


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Method):
    """The local branch alone; nothing to set beyond the window itself."""

    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        """The local branch alone, in every step."""
        return [StepPlan(mode="local") for _ in timesteps]
