"""Weights of transformers in fewer bits (`model.storage`), by diffusers' layerwise casting and by torchao, and counts by storage."""

import importlib
import importlib.util
import math
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from engine.config import ModelConfig
from engine.errors import UserError

FP8 = torch.float8_e4m3fn

# What torchao calls each kind, and the bytes that it keeps beside each row of a matrix: a scale in fp32, for int8 a zero point too.
_TORCHAO = {"torchao_int8": ("Int8WeightOnlyConfig", 5), "torchao_fp8": ("Float8WeightOnlyConfig", 4)}


def check_storage(config: ModelConfig) -> None:
    """Raise UserError if the package that `model.storage` needs is not installed."""
    if config.storage in _TORCHAO:
        require_package("torchao", f"model.storage {config.storage}")


def require_package(name: str, what: str) -> None:
    """Raise UserError, which begins with `what`, if an optional package is not installed."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{what} needs the optional package {name}; pip install '.[{name}]'")


def store(transformer: Any, storage: str, dtype: torch.dtype) -> None:
    """Keep the weights of a loaded transformer as `model.storage` says; it computes in `dtype`.

    Values depend on the weights alone, so every rank has the same. What diffusers keeps in fp32 stays in fp32.
    """
    if storage == "fp8":
        transformer.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=dtype)
    elif storage in _TORCHAO:
        quantisation: Any = importlib.import_module("torchao.quantization")
        kind = getattr(quantisation, _TORCHAO[storage][0])
        quantisation.quantize_(
            transformer,
            kind(set_inductor_config=False),
            filter_fn=lambda part, name: is_matrix(transformer, name, part),
        )


def is_matrix(transformer: Any, name: str, part: nn.Module) -> bool:
    """Whether a part of a transformer is a linear layer that diffusers quantises, that is, does not keep in fp32."""
    kept = getattr(transformer, "_keep_in_fp32_modules", None) or ()
    return isinstance(part, nn.Linear) and not set(kept) & set(name.split("."))


def torchao_bytes(storage: str, shape: torch.Size) -> int | None:
    """Bytes of a matrix in a storage of torchao; None for another storage."""
    return math.prod(shape) + shape[0] * _TORCHAO[storage][1] if storage in _TORCHAO else None


def count_stored(part: nn.Module) -> dict[str, int]:
    """How many numbers of a part are stored in each dtype, or type of GGUF; sharded ones (model.weights zero3) before sharding."""
    counts: Counter[str] = Counter()
    for parameter in part.parameters():
        numel = getattr(parameter, "ds_numel", math.prod(getattr(parameter, "quant_shape", parameter.shape)))
        counts[_kind(parameter)] += numel
    return dict(counts)


def _kind(parameter: Any) -> str:
    if hasattr(parameter, "quant_type"):
        return parameter.quant_type.name
    quantised = is_traceable_wrapper_subclass(parameter)
    dtype = getattr(parameter, "qdata").dtype if quantised else parameter.dtype  # noqa: B009 - of torchao's tensors, which mypy does not know
    return str(dtype).removeprefix("torch.")
