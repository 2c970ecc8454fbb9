"""Save and load latents as safetensors files, written atomically."""

from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from engine.errors import UserError
from engine.files.tensors import DAMAGED
from engine.files.whole import atomic_path

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        raise UserError(f"{path} holds latents of {kind}, and generate.py saves float32; give such a file")
    return latents, metadata


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, *DAMAGED) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); delete it or fetch it again") from error
