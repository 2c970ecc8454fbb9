"""The files of a checkpoint, and checks of weight files against the model that their configuration describes, before loading."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from engine.adapters import ModelAdapter
from engine.adapters.base import EXPERTS
from engine.errors import UserError, first_line
from engine.files.trees import parse_json
from engine.paths import failing_as

# Buffers that other versions of the libraries save, and models compute themselves.
_HARMLESS = ("rope.",)
_LFS_POINTER = b"version https://git-lfs"

_FETCH = "fetch the checkpoint again"
# Settings that count repeated layers, and the largest count of any model.
_REPEATS = re.compile(r"layers|blocks")
_MOST_LAYERS = 1000

WEIGHT_FOLDERS = (*EXPERTS, "vae", "text_encoder", "image_encoder")
"""Parts of a pipeline that hold weights; which of the transformers, and whether an encoder of pictures, its model_index.json says."""

# Files of a checkpoint that affect a video beside its weights.
_CONFIGURED = (*WEIGHT_FOLDERS, "scheduler", "tokenizer", "image_processor")
_BESIDE = ("model_index.json", *(f"{part}/*.json" for part in _CONFIGURED), "tokenizer/*.model", "tokenizer/*.txt")


def deciding_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's folder that are loaded, without its card, licence or figures."""
    patterns = (*_BESIDE, *(f"{part}/*.safetensors" for part in WEIGHT_FOLDERS))
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def check_part(adapter: ModelAdapter, folder: Path, name: str) -> None:
    """Raise UserError unless the safetensors files of a part hold every tensor of its model, in its shape, and no other.

    The libraries fill a missing tensor with random numbers, which gives a plausible but wrong video, or fail with an error
    about meta tensors.
    """
    compare_part(adapter, folder / name, name, found=_shapes_in(folder / name), where=folder / name)


def compare_part(
    adapter: ModelAdapter,
    part: Path,
    name: str,
    *,
    found: dict[str, tuple[int, ...]],
    where: Path,
    remedy: str = _FETCH,
) -> None:
    """Raise UserError unless `found`, shapes by name, matches the configuration in the folder `part`.

    Messages name `where` the tensors are, and end with the `remedy`.
    """
    model = build_part(adapter, name, read_config(part / "config.json"), part / "config.json")
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {adapter.stored_name(name, key): shape for key, shape in found.items()}
    # A tied tensor may be stored under either of its names, or under both.
    tied = dict(getattr(model, "_tied_weights_keys", None) or {})
    missing = [key for key in expected if key not in found and not _has_tied(key, tied, found)]
    wrong = [key for key in expected if key in found and found[key] != expected[key]]
    surplus = [key for key in found if key not in expected and not key.startswith(_HARMLESS)]
    for what, keys in (("lacks", missing), ("has another shape for", wrong), ("has the unknown", surplus)):
        if keys:
            more = f" and {len(keys) - 1} more tensors" if len(keys) > 1 else ""
            by = "its config.json" if where == part else part / "config.json"
            raise UserError(f"{where} {what} {keys[0]}{more}, by {by}; {remedy}")


def broken_file(file: Path, error: Exception) -> UserError:
    """The error for a safetensors file that does not open."""
    return UserError(lfs_pointer(file) or f"{file} is broken or cut short ({error}); fetch it again")


def lfs_pointer(file: Path) -> str | None:
    """The message for a pointer file of git-lfs in place of the real one; None for any other file."""
    with failing_as(f"cannot read {file}"), file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) != _LFS_POINTER:
            return None
    return f"{file} is a pointer of git-lfs and not the file itself; run git lfs pull in its folder"


def unfinished(folder: Path, name: str) -> list[str]:
    """Names of unfinished downloads for a part of a checkpoint, by the hub's client and other programs."""
    places = [folder / name, folder / ".cache" / "huggingface" / "download" / name]
    if folder.parent.name == "snapshots":  # the hub's local copy names files by their hash
        places.append(folder.parent.parent / "blobs")
    endings = ("*.incomplete", "*.part", "*.aria2", "*.crdownload")
    return sorted(file.name for place in places for ending in endings for file in place.glob(ending))


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint; UserError, naming the file, if that fails."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {_FETCH}") from error
    tree = parse_json(data, str(path), remedy=_FETCH)
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {tree!r:.40} instead of settings; {_FETCH}")
    return tree


def build_part(adapter: ModelAdapter, name: str, config: Mapping[str, Any], where: object) -> nn.Module:
    """Build a part of a pipeline on the meta device; UserError, naming `where` the configuration was read, if it is invalid."""
    for key, value in config.items():
        # Building a model with more layers would take hours.
        if _REPEATS.search(key) and (most := _largest(value)) > _MOST_LAYERS:
            raise UserError(f"{where} has {key} {most:g}, and no {name} has more than {_MOST_LAYERS}; {_FETCH}")
    try:
        with torch.device("meta"):
            return adapter.build(name, dict(config))
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # constructors of two libraries raise many classes for a wrong value
        raise UserError(
            f"{where} describes no {name} of {adapter.name} ({type(error).__name__}: {first_line(error)}); {_FETCH}"
        ) from error


def _largest(value: Any) -> float:
    numbers = value if isinstance(value, list) else [value]
    return max((each for each in numbers if isinstance(each, int | float)), default=0)


def _shapes_in(part: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(part.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
        except (SafetensorError, OSError) as error:
            raise broken_file(file, error) from error
    return shapes


def _has_tied(key: str, tied: dict[str, str], found: dict[str, tuple[int, ...]]) -> bool:
    return tied.get(key) in found or any(other in found for other, source in tied.items() if source == key)
