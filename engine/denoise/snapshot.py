"""The snapshot of an unfinished run: latents, scheduler state and history in a safetensors file, written atomically."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from engine.errors import UserError
from engine.files.tensors import DAMAGED, read_metadata, take_former_name
from engine.files.trees import DamagedError, parse_json
from engine.files.whole import atomic_path
from engine.identity import check_run, settings_id
from engine.progress import note
from engine.schedulers import SchedulerState, restore_scheduler

History = dict[str, list[dict[str, Any]]]
"""Rows about finished steps, in JSON's types, by what wrote them; each row has a `step`."""


@dataclass(frozen=True)
class Snapshot:
    """The file of an unfinished run's state.

    Attributes:
        path: the file.
        settings: those of the run's latents, see `engine.identity`; they identify the run.
    """

    path: Path
    settings: Mapping[str, Any]

    def save(self, step: int, latents: Tensor, state: SchedulerState, history: History) -> None:
        """Write the state after `step` steps: latents, scheduler state and history."""
        tensors, values = state
        tensors = {f"scheduler.{name}": tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
        metadata = {"run_id": settings_id(self.settings), "step": str(step), "scheduler": json.dumps(values)}
        metadata |= {"history": json.dumps(history), "settings": json.dumps(self.settings)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as part:
            part.write_bytes(safetensors.torch.save({"latents": latents.cpu().contiguous()} | tensors, metadata))

    def read(self) -> bytes:
        """The file's bytes; none if there is no file. A note names a file of the former name that is no whole snapshot."""
        if left := take_former_name(self.path):
            note(f"the run starts at its first step: {left}")
        return self.path.read_bytes() if self.path.exists() else b""

    def load(
        self, data: bytes, scheduler: Any, generator: torch.Generator, device: torch.device
    ) -> tuple[Tensor, int, History]:
        """Read the file's bytes: latents, number of finished steps, history; restores scheduler and generator.

        Takes bytes, because rank 0 reads the file for all ranks. UserError for another run's or a broken file.
        """
        path, remedy = self.path, "delete it to start again"
        try:
            tensors = safetensors.torch.load(data)
        except DAMAGED as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); {remedy}") from error
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], str(path), remedy=remedy)
        metadata = header.get("__metadata__", {})
        check_run(metadata, self.settings, path=path)
        state = {name.removeprefix("scheduler."): value for name, value in tensors.items() if name != "latents"}
        try:
            values, history = (
                parse_json(metadata.get(name, "{}"), f"{name} in {path}", remedy=remedy)
                for name in ("scheduler", "history")
            )
            restore_scheduler(scheduler, (state, values), device, generator)
            return tensors["latents"].to(device), int(metadata["step"]), history
        except (RuntimeError, *DAMAGED) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path} is not the snapshot of a run ({type(error).__name__}: {error}); {remedy}"
            ) from error


def kept_steps(path: Path) -> int:
    """The number of finished steps in a snapshot; 0 if it is missing or damaged. OSError if it cannot be read."""
    try:
        return int((read_metadata(path) or {})["step"])
    except (DamagedError, KeyError, ValueError):
        return 0
