"""Save and load latents and unfinished runs as safetensors files, written whole or not at all."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.denoise.schedulers import SchedulerState, restore_scheduler
from engine.errors import UserError
from engine.files.tensors import read_metadata
from engine.files.trees import DamagedError, parse_json
from engine.files.whole import atomic_path
from engine.identity import check_run, settings_id
from engine.ranks.agreement import broadcast_bytes
from parallel.mesh import SeqMesh

# Dtypes of saved latents.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Raised by safetensors for a damaged file; the last four for a dtype or shape that torch lacks.
_DAMAGED = (SafetensorError, ValueError, LookupError, AttributeError, TypeError)

History = dict[str, list[dict[str, Any]]]
"""Rows about finished steps, in JSON's types, by what wrote them; each row has a `step`."""


def save_latents(path: Path, latents: Tensor, metadata: dict[str, str], *, replace: bool = True) -> None:
    """Write latents [1, z, F, h, w] with their metadata.

    Serialised to bytes first, because the library's writer raises errors of another class and makes files private to their owner.

    Raises:
        WriteError: the disk does not take them, or, without `replace`, another file has the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, replace=replace) as part:
        part.write_bytes(safetensors.torch.save({"latents": latents.cpu().contiguous()}, metadata))


def load_latents(path: Path) -> tuple[Tensor, dict[str, str]]:
    """Read the latents and metadata of `save_latents`; UserError if the file is missing, broken or of another kind."""
    tensors, metadata = _read(path)
    if "latents" not in tensors:
        raise UserError(f"{path} holds no latents but {len(tensors)} other tensors; give a file that generate.py saved")
    latents = tensors["latents"]
    if latents.dtype not in _DTYPES:
        kind = str(latents.dtype).removeprefix("torch.")
        raise UserError(
            f"{path} holds latents of {kind}, and those that generate.py saves are of float32; give such a file"
        )
    return latents, metadata


def save_run(
    path: Path,
    latents: Tensor,
    *,
    step: int,
    run_id: str,
    state: SchedulerState,
    history: History | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write the state of a run after `step` steps: latents, scheduler state and history.

    `run_id` identifies the run, and `settings` are what it was computed from, see `engine.identity`.
    """
    tensors, values = state
    tensors = {f"scheduler.{name}": tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"run_id": run_id, "step": str(step), "scheduler": json.dumps(values)}
    metadata |= {"history": json.dumps(history or {}), "settings": json.dumps(settings or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        part.write_bytes(safetensors.torch.save({"latents": latents.cpu().contiguous()} | tensors, metadata))


def load_run(
    data: bytes,
    *,
    path: Path,
    run_id: str,
    scheduler: Any,
    generator: torch.Generator,
    device: torch.device,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Tensor, int, History]:
    """Read a `save_run` file's bytes: latents, number of finished steps, history; restores scheduler and generator.

    Takes bytes, because rank 0 reads the file for all ranks. UserError, naming `path`, for another run's or a broken file.
    """
    remedy = "delete it to start anew"
    try:
        tensors = safetensors.torch.load(data)
    except _DAMAGED as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); {remedy}") from error
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], str(path), remedy=remedy)
    metadata = header.get("__metadata__", {})
    check_run(metadata, path=path, run_id=run_id, settings=settings)
    state = {name.removeprefix("scheduler."): value for name, value in tensors.items() if name != "latents"}
    try:
        values, history = (
            parse_json(metadata.get(name, "{}"), f"{name} in {path}", remedy=remedy)
            for name in ("scheduler", "history")
        )
        restore_scheduler(scheduler, (state, values), device, generator)
        return tensors["latents"].to(device), int(metadata["step"]), history
    except (RuntimeError, *_DAMAGED) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not the state of a run ({type(error).__name__}: {error}); {remedy}") from error


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """The file of one run's state, which rank 0 reads and writes for all ranks.

    Attributes:
        path: the file.
        settings: what decides the run's latents, see `engine.identity`.
        mesh: the ranks.
    """

    path: Path
    settings: Mapping[str, Any]
    mesh: SeqMesh

    def load(
        self, scheduler: Any, generator: torch.Generator, device: torch.device
    ) -> tuple[Tensor, int, History] | None:
        """`load_run` on every rank; None if there is no file."""
        found = self.mesh.world.rank == 0 and self.path.exists()
        data = broadcast_bytes(self.mesh, self.path.read_bytes() if found else b"", "checkpoint")
        if not data:
            return None
        return load_run(
            data,
            path=self.path,
            run_id=settings_id(self.settings),
            scheduler=scheduler,
            generator=generator,
            device=device,
            settings=self.settings,
        )

    def save(self, step: int, latents: Tensor, state: SchedulerState, history: History) -> None:
        """`save_run` on rank 0."""
        if self.mesh.world.rank == 0:
            run_id = settings_id(self.settings)
            save_run(
                self.path,
                latents,
                step=step,
                run_id=run_id,
                state=state,
                history=history,
                settings=self.settings,
            )


def kept_steps(path: Path) -> int:
    """The number of finished steps in a `save_run` file; 0 if it is missing or damaged. OSError if it cannot be read."""
    try:
        return int((read_metadata(path) or {})["step"])
    except (DamagedError, KeyError, ValueError):
        return 0


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, *_DAMAGED) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); delete it or fetch it again") from error
