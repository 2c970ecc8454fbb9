"""Checkpoints with two transformers: which of them a file is for (`high:FILE`, `low:FILE`), and which is on the device, idle or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.adapters.base import EXPERTS, says_expert, says_one_of_two
from engine.config import split_expert
from engine.errors import UserError


def expert_of(given: str) -> str:
    """The transformer that FILE, high:FILE or low:FILE is for, as a part of the pipeline."""
    return EXPERTS[split_expert(given)[0] == "low"]


def check_side(name: str, side: str | None, what: str) -> None:
    """Refuse a file, `what` in messages, whose name says that it is for another one of two transformers than `side`."""
    if side is None and says_one_of_two(name):
        raise UserError(
            f"the {what} {name} is of one of the two transformers of Wan2.2 A14B, by its name: give it as high:{name} or low:{name}, to a "
            "checkpoint that has two"
        )
    if side is not None and says_expert(name) not in (None, side):
        raise UserError(
            f"{side}:{name} puts a {what} of the other transformer there, by its name; give it as {says_expert(name)}:{name}"
        )


def check_sides(files: Sequence[str], experts: Sequence[str], what: str = "LoRA", does: str = "changes") -> None:
    """Raise UserError unless files name their transformer (`high:`, `low:`) exactly if there are two."""
    for given in files:
        side, name = split_expert(given)
        if side is None and len(experts) > 1:
            raise UserError(
                f"this checkpoint has two transformers: say which of them the {what} {name} {does}, high:{name} (noisy steps, transformer) or "
                f"low:{name} (the others, transformer_2)"
            )
        if side is not None and len(experts) == 1:
            raise UserError(
                f"this checkpoint has one transformer, and the {what} {given} names one of two; give it as {name}"
            )


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
