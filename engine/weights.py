"""Weight files held against the model that their configuration describes, before anything is loaded from them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.adapters import ModelAdapter
from engine.errors import UserError

# Buffers that other versions of the libraries save and the models compute anew.
_HARMLESS = ("rope.",)


def check_part(adapter: ModelAdapter, folder: Path, name: str) -> None:
    """Raise UserError unless the safetensors files of one part hold every tensor of its model, in its shape, and no other.

    The libraries fill a missing tensor with random numbers, or end in an error about meta tensors; a video made with
    either would be worthless, and the first would look plausible.
    """
    part = folder / name
    config = read_json(part / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{part / 'config.json'} is no configuration; fetch the checkpoint again")
    try:
        with torch.device("meta"):
            model = adapter.build(name, config)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{part / 'config.json'} describes no {name} of {adapter.name} ({error})") from error
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = _shapes_in(part)
    # A tied tensor may lie there under either of its names, or under both.
    tied = dict(getattr(model, "_tied_weights_keys", None) or {})
    missing = [key for key in expected if key not in found and not _has_tied(key, tied, found)]
    wrong = [key for key in expected if key in found and found[key] != expected[key]]
    surplus = [key for key in found if key not in expected and not key.startswith(_HARMLESS)]
    for what, keys in (("lacks", missing), ("has another shape for", wrong), ("has the unknown", surplus)):
        if keys:
            more = f" and {len(keys) - 1} more tensors" if len(keys) > 1 else ""
            raise UserError(f"{part} {what} {keys[0]}{more}, by its config.json; fetch the checkpoint again")


def read_json(path: Path) -> Any:
    """A JSON file, or UserError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; fetch the checkpoint again") from error
    except ValueError as error:  # of JSON and of UTF-8
        raise UserError(f"{path} is not JSON ({error}); fetch the checkpoint again") from error


def _shapes_in(part: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(part.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is broken or cut short ({error}); fetch it again") from error
    return shapes


def _has_tied(key: str, tied: dict[str, str], found: dict[str, tuple[int, ...]]) -> bool:
    return tied.get(key) in found or any(other in found for other, source in tied.items() if source == key)
