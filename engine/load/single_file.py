"""Weights in one file, in the layout that a model's authors publish, in place of parts of a checkpoint in Diffusers layout.

diffusers converts the names, but does not check that every tensor is present, and rounds modules that it keeps in fp32 when it
loads a folder. This module does both, so that a file and a folder with the same weights make the same video. GGUF files hold
quantised weights, which stay so: a layer's are made whole while it runs.
"""

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import GGUFQuantizationConfig
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.models.model_loading_utils import load_gguf_checkpoint
from safetensors import SafetensorError, safe_open

from engine.adapters import ModelAdapter
from engine.adapters.base import refuse_one_of_two
from engine.config import ModelConfig
from engine.errors import UserError, first_line
from engine.load.hub import FLOATS, fetch_file, hub_file
from engine.load.loras import quiet_diffusers
from engine.load.quantised import require_package
from engine.load.weights import broken_file, compare_part, lfs_pointer, read_config
from engine.paths import expand


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """A file and the parts of a pipeline whose weights are in it.

    Attributes:
        path: the file.
        parts: among transformer and vae, those that are read from it.
        shapes: of its tensors, by the authors' names.
        quantised: bytes of the matrices that stay quantised, likewise.
    """

    path: Path
    parts: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    quantised: Mapping[str, int] = field(default_factory=dict)

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
        if self.path.suffix == ".gguf":
            return self._load_gguf(kind, folder, part, dtype)
        model = kind.from_single_file(str(self.path), config=str(folder), subfolder=part, local_files_only=True)
        kept = kind._keep_in_fp32_modules or ()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if set(kept) & set(name.split(".")) else dtype)
        for buffer in model.buffers():
            if buffer.is_floating_point() and not kept:
                buffer.data = buffer.data.to(dtype)
        return model

    def _load_gguf(self, kind: Any, folder: Path, part: str, dtype: torch.dtype) -> Any:
        """Load the transformer of a GGUF file: matrices as they are, all else in the dtype that a folder would give it."""
        whole = importlib.import_module("diffusers.quantizers.gguf.utils").dequantize_gguf_tensor
        with quiet_diffusers():  # which tells of each matrix that it keeps in fp32
            tensors = {
                key: tensor if key in self.quantised else whole(tensor)
                for key, tensor in load_gguf_checkpoint(str(self.path)).items()
            }
            return kind.from_single_file(
                tensors,
                config=str(folder),
                subfolder=part,
                local_files_only=True,
                dtype=dtype,
                quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            )

    def stored_bytes(self, itemsize: int) -> int:
        """Bytes of its tensors once loaded, those that are not quantised as numbers of `itemsize`."""
        rest = sum(math.prod(shape) for key, shape in self.shapes.items() if key not in self.quantised)
        return sum(self.quantised.values()) + rest * itemsize


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
    is_gguf = path.suffix == ".gguf"
    shapes, quantised = _read_gguf(path) if is_gguf else (_read_safetensors(path), {})
    parts = tuple(part for part, mark in adapter.single_file_marks.items() if any(key.endswith(mark) for key in shapes))
    if not parts:
        raise UserError(
            f"{path} holds nothing of {adapter.name} in its authors' layout (no tensor called "
            f"{' or '.join(adapter.single_file_marks.values())}); parts in Diffusers layout go into a folder, model.path"
        )
    return SingleFile(path=path, parts=parts, shapes=shapes, quantised=quantised)


def _read_safetensors(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}
            shapes = {key: tuple(found.get_shape()) for key, found in slices.items()}
            dtypes = sorted({found.get_dtype() for found in slices.values()} - set(FLOATS))
    except (SafetensorError, OSError) as error:
        raise broken_file(path, error) from error
    if dtypes:
        raise UserError(
            f"{path} holds tensors of {', '.join(dtypes)}; of quantised files only .gguf is read, give that, or one in bf16 or fp32"
        )
    return shapes


def _read_gguf(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Shapes of all tensors of a GGUF file, and bytes of its quantised matrices; UserError for one that diffusers does not read."""
    require_package("gguf", f"model.single_file {path}")
    gguf: Any = importlib.import_module("gguf")
    try:
        tensors = gguf.GGUFReader(path).tensors
        shapes = {each.name: tuple(map(int, reversed(each.shape))) for each in tensors}
    except Exception as error:  # the reader raises many classes for a file that is cut short
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(lfs_pointer(path) or f"{path} is broken or cut short ({cause}); fetch it again") from error
    types = gguf.GGMLQuantizationType
    known = {
        *importlib.import_module("diffusers.quantizers.gguf.utils").SUPPORTED_GGUF_QUANT_TYPES,
        types.F32,
        types.F16,
    }
    unknown = sorted({each.tensor_type.name for each in tensors} - {kind.name for kind in known})
    if unknown:
        names = ", ".join(sorted(kind.name for kind in known))
        raise UserError(f"{path} holds tensors of {', '.join(unknown)}, and diffusers reads {names}; give another file")
    quantised = {
        each.name: int(each.n_bytes)
        for each in tensors
        if each.tensor_type not in (types.F32, types.F16) and len(each.shape) == 2 and each.name.endswith(".weight")
    }
    return shapes, quantised


def _class_of(adapter: ModelAdapter, part: str) -> Any:
    return {"transformer": adapter.transformer_class, "vae": adapter.vae_class}[part]
