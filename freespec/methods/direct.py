"""`direct`: the frozen model on the long sequence, every query sees every key."""

from collections.abc import Sequence
from dataclasses import dataclass

from freespec.methods.base import Method, StepPlan


@dataclass(frozen=True, kw_only=True)
class Direct(Method):
    """Full attention in every layer and step; nothing to set."""

    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        """The global branch alone, in every step."""
        return [StepPlan(mode="global") for _ in timesteps]
