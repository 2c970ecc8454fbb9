"""The provenance of weights, for records: the commit of a hub checkpoint, the SHA-256 of every loaded local file."""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from engine.adapters import ModelAdapter
from engine.adapters.base import EXPERTS
from engine.config import ModelConfig
from engine.load.checkpoint import open_checkpoint
from engine.load.hub import commit_of
from engine.load.loras import Lora
from engine.load.quantised import count_stored
from engine.load.single_file import find_single_files, is_of_hub
from engine.load.weights import WEIGHT_FOLDERS, deciding_files
from parallel.zero3 import device_bytes


def describe_weights(config: ModelConfig) -> dict[str, Any]:
    """Describe the files of a loaded checkpoint, from its local copy.

    Returns the `commit` of a hub name, or `sha256` by file of a folder; and for each single file (`single_file`, and
    `single_file_2` of transformer_2) and each LoRA its name, sha256 and, from the hub, commit. Files are read whole, once per
    process: some seconds per 10 GB.
    """
    checkpoint = open_checkpoint(config, offline=True)
    found: dict[str, Any] = {}
    folder = checkpoint.folder
    if checkpoint.from_hub:
        found["commit"] = folder.name  # the hub's local copy is named after it
    else:
        found["sha256"] = {str(file.relative_to(folder)): sha256_of(file) for file in deciding_files(folder)}
    for given, (expert, file) in zip(config.single_files, find_single_files(config).items(), strict=True):
        commit = {"commit": commit_of(file)} if is_of_hub(given) else {}
        key = "single_file" if expert == EXPERTS[0] else "single_file_2"
        found[key] = {"name": file.name, "sha256": sha256_of(file), **commit}
    if checkpoint.loras:
        found["loras"] = [_describe_lora(lora, checkpoint.adapter) for lora in checkpoint.loras]
    return found


def _describe_lora(lora: Lora, adapter: ModelAdapter) -> dict[str, Any]:
    described: dict[str, Any] = {"name": lora.path.name, "scale": lora.scale, "sha256": sha256_of(lora.path)}
    described |= {} if lora.expert == EXPERTS[0] else {"part": lora.expert}
    described |= {"commit": lora.commit} if lora.commit is not None else {}
    dropped = lora.dropped(adapter)
    return described | ({"dropped_tensors": len(dropped)} if dropped else {})


def describe_loaded(
    config: ModelConfig, pipe: DiffusionPipeline, weights: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """What was loaded, for the record: path, revision, `weights` (of `describe_weights`), dtypes, and parameter counts by storage."""
    named = {name: getattr(pipe, name, None) for name in WEIGHT_FOLDERS}
    parts = {name: part for name, part in named.items() if part is not None}
    stored = {name: count_stored(part) for name, part in parts.items()}
    return {
        "path": config.path,
        "revision": config.revision,
        **weights,
        "dtype": {name: str(part.dtype).removeprefix("torch.") for name, part in parts.items()},
        "parameters": {name: sum(counts.values()) for name, counts in stored.items()},
        "stored": stored,
        "resident_bytes": {name: device_bytes(part, device) for name, part in parts.items()},
    }


def sha256_of(file: Path) -> str:
    """SHA-256 of a file in hex, cached by size and time of change."""
    stat = file.stat()
    return _sha256(str(file.resolve()), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _sha256(path: str, _size: int, _changed: int) -> str:
    with Path(path).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
