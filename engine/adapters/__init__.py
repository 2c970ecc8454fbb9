"""The supported models: one file each, instances of `base.ModelAdapter`, found by name or class."""

from collections.abc import Mapping
from typing import Any

from engine.adapters.base import ModelAdapter, VideoSpec, unwrap
from engine.adapters.ltx import LTX
from engine.adapters.ltx_condition import LTX_CONDITION
from engine.adapters.wan import WAN
from engine.errors import UserError

ADAPTERS: tuple[ModelAdapter, ...] = (WAN, LTX, LTX_CONDITION)

__all__ = ["ADAPTERS", "ModelAdapter", "VideoSpec", "adapter_named", "adapter_of", "adapter_of_pipeline"]


def adapter_named(index: Mapping[str, Any], where: object) -> ModelAdapter:
    """The adapter for the pipeline that a model_index.json names; UserError, naming `where` it was read, for an unknown one."""
    class_name = index.get("_class_name")
    for adapter in ADAPTERS:
        if class_name in adapter.index_names:
            return adapter
    known = " or ".join(f"{adapter.pipeline_class.__name__} ({adapter.name})" for adapter in ADAPTERS)
    if not class_name or not isinstance(class_name, str):
        raise UserError(f"{where} names no pipeline; its _class_name must be {known}")
    raise UserError(f"{where} names a {class_name}; only {known} is supported")


def adapter_of_pipeline(pipe: Any) -> ModelAdapter:
    """The adapter of a pipeline; UserError for anything else, such as a part of one."""
    for adapter in ADAPTERS:
        if isinstance(unwrap(pipe), (adapter.transformer_class, adapter.vae_class)):
            name = adapter.pipeline_class.__name__
            raise UserError(
                f"a method or a timeline applies to a whole pipeline: give the {name}, not its {type(unwrap(pipe)).__name__}"
            )
    return adapter_of(pipe)


def adapter_of(part: Any) -> ModelAdapter:
    """The adapter of a pipeline, a transformer or a VAE; UserError for one of another class."""
    for adapter in ADAPTERS:
        if isinstance(part, (*adapter.pipeline_classes, adapter.transformer_class, adapter.vae_class)):
            return adapter
    known = " or ".join(f"{adapter.pipeline_class.__name__} ({adapter.name})" for adapter in ADAPTERS)
    raise UserError(f"{type(part).__name__} is not supported; use a {known}")
