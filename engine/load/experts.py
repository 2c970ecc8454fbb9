"""Where the transformers of a checkpoint with two of them are: the one that denoises on the device, the idle one there or on the CPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class ExpertPlacement:
    """Moves transformers between CPU and device as steps come to them.

    Attributes:
        experts: the transformers by part of the pipeline.
        device: where they run.
        idle_stays: whether one that does not denoise stays there; it leaves for the CPU otherwise.
    """

    experts: Mapping[str, Any]
    device: torch.device
    idle_stays: bool

    def bring(self, active: str) -> None:
        """Bring this transformer to the device, after the others have left it."""
        if self.idle_stays or len(self.experts) == 1:
            return
        for name, expert in self.experts.items():
            if name != active:
                _move(expert, torch.device("cpu"))
        _move(self.experts[active], self.device)


def _move(expert: Any, device: torch.device) -> None:
    if expert.device.type != device.type:
        expert.to(device)
