"""Weights in one file, in the layout that a model's authors publish, in place of parts of a checkpoint in Diffusers layout.

diffusers converts the names, but does not check that every tensor is present, and rounds modules that it keeps in fp32 when it
loads a folder. This module does both, so that a file and a folder with the same weights make the same video.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import SafetensorError, safe_open

from engine.adapters import ModelAdapter
from engine.adapters.base import refuse_one_of_two
from engine.config import ModelConfig
from engine.errors import UserError
from engine.load.hub import FLOATS, fetch_file, hub_file
from engine.load.weights import broken_file, compare_part, read_config
from engine.paths import expand


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """A file and the parts of a pipeline whose weights are in it.

    Attributes:
        path: the file.
        parts: among transformer and vae, those that are read from it.
        shapes: of its tensors, by the authors' names.
    """

    path: Path
    parts: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def check(self, adapter: ModelAdapter, folder: Path) -> None:
        """Raise UserError unless the file holds every tensor of its parts, as the folder's configurations describe them."""
        for part in self.parts:
            tensors = {key: torch.empty(shape, device="meta") for key, shape in self.shapes.items()}
            config = read_config(folder / part / "config.json")
            kind = _class_of(adapter, part)
            try:
                converted = SINGLE_FILE_LOADABLE_CLASSES[kind.__name__]["checkpoint_mapping_fn"](
                    config=config, checkpoint=tensors
                )
            except (KeyError, IndexError, RuntimeError) as error:  # a tensor that the conversion reads is missing
                raise UserError(
                    f"{self.path} is not a complete {part} of {adapter.name} ({error!r}); fetch it again"
                ) from error
            found = {key: tuple(tensor.shape) for key, tensor in converted.items()}
            compare_part(adapter, folder / part, part, found=found, where=self.path)

    def load(self, adapter: ModelAdapter, folder: Path, part: str, dtype: torch.dtype) -> Any:
        """Load a part on the CPU, each tensor in the dtype that `from_pretrained` would give it."""
        kind = _class_of(adapter, part)
        model = kind.from_single_file(str(self.path), config=str(folder), subfolder=part, local_files_only=True)
        kept = kind._keep_in_fp32_modules or ()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if set(kept) & set(name.split(".")) else dtype)
        for buffer in model.buffers():
            if buffer.is_floating_point() and not kept:
                buffer.data = buffer.data.to(dtype)
        return model


def find_single_file(config: ModelConfig) -> Path | None:
    """Find the file of `model.single_file`, downloaded if it is a hub name; None if the setting is unset.

    Raises UserError for a missing file, for formats that can run code or are not safetensors, and for a file name of one of
    two transformers.
    """
    name = config.single_file
    if name is None:
        return None
    refuse_one_of_two(name)
    path = expand(name)
    if path.is_file():
        refuse_one_of_two(str(path.resolve()))
        return path
    hub = hub_file(name)
    if hub is None:
        raise UserError(f"model.single_file {name!r} is neither a file here nor ORGANISATION/NAME/FILE of the hub")
    return fetch_file(*hub, what=f"model.single_file {name!r}", offline=config.offline)


def open_single_file(config: ModelConfig, adapter: ModelAdapter) -> SingleFile | None:
    """Read the tensor names of `model.single_file`; UserError if it is broken, quantised, or of another model."""
    path = find_single_file(config)
    if path is None:
        return None
    try:
        with safe_open(path, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}
            shapes = {key: tuple(found.get_shape()) for key, found in slices.items()}
            dtypes = sorted({found.get_dtype() for found in slices.values()} - set(FLOATS))
    except (SafetensorError, OSError) as error:
        raise broken_file(path, error) from error
    if dtypes:
        raise UserError(
            f"{path} holds tensors of {', '.join(dtypes)}; quantised files are not read, give one in bf16 or fp32"
        )
    parts = tuple(part for part, mark in adapter.single_file_marks.items() if any(key.endswith(mark) for key in shapes))
    if not parts:
        raise UserError(
            f"{path} holds nothing of {adapter.name} in its authors' layout (no tensor called "
            f"{' or '.join(adapter.single_file_marks.values())}); parts in Diffusers layout go into a folder, model.path"
        )
    return SingleFile(path=path, parts=parts, shapes=shapes)


def _class_of(adapter: ModelAdapter, part: str) -> Any:
    return {"transformer": adapter.transformer_class, "vae": adapter.vae_class}[part]
