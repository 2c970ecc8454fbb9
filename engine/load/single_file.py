"""Weights in one file, in the layout that a model's authors publish, in place of parts of a checkpoint in Diffusers layout.

diffusers converts most names, does not check that every tensor is present, and rounds modules that it keeps in fp32 when it loads a
folder. This module converts the rest, checks every tensor, and keeps those modules in fp32, so that a file and a folder with the
same weights give the same tensors. GGUF files hold quantised weights, which stay so: a layer's are dequantised while it runs.
"""

import filecmp
import importlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import GGUFQuantizationConfig
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.models.model_loading_utils import load_gguf_checkpoint
from safetensors import SafetensorError, safe_open

from engine.adapters import ModelAdapter
from engine.adapters.base import EXPERTS
from engine.config import ModelConfig, split_expert
from engine.errors import UserError, first_line
from engine.load.experts import check_names, check_side, expert_of
from engine.load.hub import FLOATS, fetch_file, hub_file, quiet
from engine.load.quantised import require_package
from engine.load.weights import broken_file, compare_part, lfs_pointer, read_config
from engine.paths import expand, failing_as


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """A file and the parts of a pipeline whose weights are in it.

    Attributes:
        path: the file.
        parts: among the transformers and vae, those that are read from it.
        shapes: of its tensors, by the authors' names.
        quantised: bytes of the matrices that stay quantised, likewise.
    """

    path: Path
    parts: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    quantised: Mapping[str, int] = field(default_factory=dict)

    def check(self, adapter: ModelAdapter, folder: Path, part: str) -> None:
        """Raise UserError unless the file holds every tensor of a part, as the folder's configuration describes it."""
        tensors = _renamed(adapter, {key: torch.empty(shape, device="meta") for key, shape in self.shapes.items()})
        config = read_config(folder / part / "config.json")
        convert = SINGLE_FILE_LOADABLE_CLASSES[_class_of(adapter, part).__name__]["checkpoint_mapping_fn"]
        try:
            converted = convert(config=config, checkpoint=tensors)
        except (KeyError, IndexError, RuntimeError) as error:  # a tensor that the conversion reads is missing
            raise UserError(
                f"{self.path} is not a complete {part} of {adapter.name} ({error!r}); fetch it again"
            ) from error
        found = {key: tuple(tensor.shape) for key, tensor in converted.items()}
        compare_part(
            adapter,
            folder / part,
            part,
            found=found,
            where=self.path,
            remedy="give a file of this model, or fetch it again",
        )

    def load(self, adapter: ModelAdapter, folder: Path, part: str, dtype: torch.dtype) -> Any:
        """Load a part on the CPU, each tensor in the dtype that `from_pretrained` would give it."""
        kind = _class_of(adapter, part)
        if self.path.suffix == ".gguf":
            return self._load_gguf(adapter, folder, part, dtype)
        tensors = _renamed(adapter, safetensors.torch.load_file(self.path))
        model = kind.from_single_file(tensors, config=str(folder), subfolder=part, local_files_only=True)
        kept = kind._keep_in_fp32_modules or ()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if set(kept) & set(name.split(".")) else dtype)
        for buffer in model.buffers():
            if buffer.is_floating_point() and not kept:
                buffer.data = buffer.data.to(dtype)
        return model

    def _load_gguf(self, adapter: ModelAdapter, folder: Path, part: str, dtype: torch.dtype) -> Any:
        """Load the transformer of a GGUF file: matrices as they are, all else in the dtype that a folder would give it."""
        whole = importlib.import_module("diffusers.quantizers.gguf.utils").dequantize_gguf_tensor
        with quiet("diffusers", below=logging.CRITICAL):  # which tells of each matrix that it keeps in fp32
            tensors = {
                key: tensor if key in self.quantised else whole(tensor)
                for key, tensor in load_gguf_checkpoint(str(self.path)).items()
            }
            return _class_of(adapter, part).from_single_file(
                _renamed(adapter, tensors),
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


def find_single_files(config: ModelConfig) -> dict[str, Path]:
    """Find the files of `model.single_file` by the transformer that they are for, downloaded if they are hub names.

    Raises UserError, before any download, for one whose name says that it is for another one of two transformers; then for a missing
    file, and for two files with the same content.
    """
    check_names(config)
    found = {expert_of(given): _find(given, config) for given in config.single_files}
    if len(found) == 2 and _are_one(*found.values()):
        raise UserError(
            f"the files of model.single_file, {' and '.join(map(str, found.values()))}, are one, or one is a copy of the other; each "
            "transformer has its own weights, give two files"
        )
    return found


def _are_one(first: Path, second: Path) -> bool:
    """Whether two files have the same content. Files of one size are read up to the first difference, which is near the start."""
    return first.samefile(second) or filecmp.cmp(first, second, shallow=False)


def open_single_files(config: ModelConfig, adapter: ModelAdapter) -> dict[str, SingleFile]:
    """Read the tensor names of `model.single_file`, by part; UserError for a file that is broken, quantised, or of another model."""
    opened = [_open(path, expert, adapter) for expert, path in find_single_files(config).items()]
    return {part: single for single in opened for part in single.parts}


def is_of_hub(given: str) -> bool:
    """Whether FILE, high:FILE or low:FILE of `model.single_file` is ORGANISATION/NAME/FILE of the hub and not here."""
    name = split_expert(given)[1]
    path = Path(name)
    if len(path.parts) <= 2 or path.is_absolute() or name.startswith("~"):
        return False
    with failing_as(f"cannot look for model.single_file {name}"):
        return not path.is_file()


def _find(given: str, config: ModelConfig) -> Path:
    side, name = split_expert(given)
    path = expand(name)
    with failing_as(f"cannot look for model.single_file {name}"):
        is_here = path.is_file()
    if is_here:
        check_side(str(path.resolve()), side, "file")
        return path
    hub = hub_file(name)
    if hub is None:
        raise UserError(f"model.single_file {name!r} is neither a file here nor ORGANISATION/NAME/FILE of the hub")
    return fetch_file(*hub, what=f"model.single_file {name!r}", offline=config.offline)


def _open(path: Path, expert: str, adapter: ModelAdapter) -> SingleFile:
    shapes, quantised = _read_gguf(path) if path.suffix == ".gguf" else (_read_safetensors(path), {})
    marks = {expert if part == EXPERTS[0] else part: mark for part, mark in adapter.single_file_marks.items()}
    parts = tuple(part for part, mark in marks.items() if any(key.endswith(mark) for key in shapes))
    if not parts:
        raise UserError(
            f"{path} holds nothing of {adapter.name} in its authors' layout (no tensor called {' or '.join(marks.values())}); parts in "
            "Diffusers layout go into a folder, model.path"
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
    return adapter.vae_class if part == "vae" else adapter.transformer_class


def _renamed(adapter: ModelAdapter, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by their authors' names, with diffusers' name where it does not convert it."""
    made = dict(tensors)
    for key in tensors:
        for theirs, ours in adapter.single_file_names.items():
            if key.endswith(theirs):
                made[key.removesuffix(theirs) + ours] = made.pop(key)
    return made
