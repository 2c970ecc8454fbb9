"""Save and load latents and unfinished runs as safetensors files, written whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import UserError
from engine.files.tensors import read_metadata
from engine.files.trees import DamagedError
from engine.files.whole import atomic_path
from engine.identity import check_run
from engine.schedulers import SchedulerState, restore_scheduler

History = dict[str, list[dict[str, Any]]]
"""Rows about finished steps, in JSON's types, by what wrote them; each row has a `step`."""


def save_latents(path: Path, latents: Tensor, metadata: dict[str, str], *, replace: bool = True) -> None:
    """Write latents [1, z, F, h, w] and what they belong to.

    As bytes, because the library's own writer raises errors of another class and makes files that only their owner reads.

    Raises:
        WriteError: the disk does not take them, or, without `replace`, another file has the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, replace=replace) as part:
        part.write_bytes(safetensors.torch.save({"latents": latents.cpu().contiguous()}, metadata))


def load_latents(path: Path) -> tuple[Tensor, dict[str, str]]:
    """Latents and metadata of `save_latents`; UserError if the file is missing, broken or another kind of file."""
    tensors, metadata = _read(path)
    if "latents" not in tensors:
        raise UserError(f"{path} holds no latents but {len(tensors)} other tensors; give a file that generate.py saved")
    return tensors["latents"], metadata


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
    """Write a run that has finished `step` steps: its latents, its scheduler's state and what was noted of its steps.

    `run_id` says whose it is, and `settings` in words, see `engine.identity`.
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
    """Latents, number of finished steps and their history from a `save_run` file's bytes; puts scheduler and generator in their state.

    Bytes, because rank 0 reads the file for all ranks. UserError, which names `path`, for another run's or a broken file.
    """
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); delete it to start anew") from error
    metadata = header.get("__metadata__", {})
    check_run(metadata, path=path, run_id=run_id, settings=settings)
    state = {name.removeprefix("scheduler."): value for name, value in tensors.items() if name != "latents"}
    restore_scheduler(scheduler, (state, json.loads(metadata["scheduler"])), device, generator)
    return tensors["latents"].to(device), int(metadata["step"]), json.loads(metadata.get("history", "{}"))


def kept_steps(path: Path) -> int:
    """The number of finished steps in a `save_run` file; 0 if there is none, or none that is whole. OSError if it cannot be read."""
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
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); delete it or fetch it again") from error
