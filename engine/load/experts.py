"""Checkpoints with two transformers: which of them a file is for (`high:FILE`, `low:FILE`), and which is on the device, idle or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.adapters.base import EXPERTS, says_expert, says_one_of_two
from engine.config import ModelConfig, split_expert, split_scale
from engine.errors import UserError

SIDES = {"high": EXPERTS[0], "low": EXPERTS[1]}
"""The two transformers by the names that settings give them."""


def expert_of(given: str) -> str:
    """The transformer that FILE, high:FILE or low:FILE is for, as a part of the pipeline."""
    return SIDES[split_expert(given)[0] or "high"]


def check_side(name: str, side: str | None, what: str) -> None:
    """Refuse a file, `what` in messages, whose name says that it is for another one of two transformers than `side`."""
    if side is None and says_one_of_two(name):
        raise UserError(
            f"the {what} {name} is of one of the two transformers of Wan2.2 A14B, as its name says; give it as high:{name} or low:{name}, to a "
            "checkpoint that has two"
        )
    if side is not None and says_expert(name) not in (None, side):
        raise UserError(
            f"{side}:{name} is a {what} for the other transformer, as its name says; give it as {says_expert(name)}:{name}, or rename "
            "the file if its name is wrong"
        )


def check_sides(config: ModelConfig, experts: Sequence[str]) -> None:
    """Raise UserError unless files and LoRAs name their transformer (`high:`, `low:`) exactly if there are two, and the right one."""
    _check_number(config.loras, experts, what="LoRA", does="changes")
    _check_number(config.single_files, experts, what="file", does="replaces")
    check_names(config)


def check_names(config: ModelConfig) -> None:
    """Raise UserError for a file or LoRA whose name says that it is for another one of two transformers; nothing is fetched."""
    for lora in config.loras:
        side, name = split_expert(lora)
        check_side(split_scale(name)[0], side, "LoRA")
    for file in config.single_files:
        side, name = split_expert(file)
        check_side(name, side, "file")


def _check_number(given: Sequence[str], experts: Sequence[str], *, what: str, does: str) -> None:
    for each in given:
        side, name = split_expert(each)
        if side is None and len(experts) > 1:
            raise UserError(
                f"this checkpoint has two transformers: say which of them the {what} {name} {does}, high:{name} (noisy steps, transformer) or "
                f"low:{name} (the others, transformer_2)"
            )
        if side is not None and len(experts) == 1:
            advice = (
                f"give it as {name}"
                if what == "LoRA"
                else "give a checkpoint with two, as configs/wan2.2-t2v-a14b.yaml does"
            )
            raise UserError(f"this checkpoint has one transformer, and the {what} {each} names one of two; {advice}")


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
