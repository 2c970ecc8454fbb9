"""LoRAs (`model.loras`): found, compared with the transformer tensor by tensor, and fused into its weights by diffusers and peft.

diffusers drops tensors that it cannot place, with a warning at most, and loads what is left. Here a LoRA of another model is refused, and
tensors that diffusers drops from a valid one are reported (`Lora.dropped`).
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.adapters import ModelAdapter
from engine.adapters.base import EXPERTS
from engine.config import ModelConfig, split_expert, split_scale
from engine.errors import UserError, first_line, is_out_of_memory
from engine.load.experts import check_names, expert_of
from engine.load.hub import FLOATS, commit_of, fetch_file, hub_file, quiet
from engine.load.weights import broken_file, build_part
from engine.paths import SHIPPED, expand, failing_as

# diffusers' name for the one LoRA of a folder or of a hub repository.
_USUAL = "pytorch_lora_weights.safetensors"
_ADAPTER = "lora"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_KEY = re.compile(r"transformer\.(?P<layer>.+)\.lora_(?P<half>[AB])\.(?P<kind>weight|bias)")
# Differences of tensors that are no matrices, beside the LoRA of the matrices; diffusers takes some of them.
_DIFFERENCES = (".diff", ".diff_b", ".diff_m")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA file.

    Attributes:
        path: the file.
        scale: factor of its change of the weights.
        from_hub: whether it lies in the hub's local copy.
        expert: the transformer that it changes, a part of the pipeline.
    """

    path: Path
    scale: float
    from_hub: bool
    expert: str = EXPERTS[0]

    @property
    def name(self) -> str:
        """Name and scale, for ids."""
        of = "" if self.expert == EXPERTS[0] else f"{self.expert}:"
        return f"{of}{self.path.name}@{self.scale:g}"

    @property
    def commit(self) -> str | None:
        """The commit of a file of the hub."""
        return commit_of(self.path) if self.from_hub else None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors as published; UserError if it is broken or quantised."""
        try:
            with safe_open(self.path, framework="pt") as opened:
                dtypes = sorted({opened.get_slice(key).get_dtype() for key in opened.keys()} - set(FLOATS))
            if not dtypes:
                return safetensors.torch.load_file(self.path)
        except (SafetensorError, OSError) as error:
            raise broken_file(self.path, error) from error
        raise UserError(f"the LoRA {self.path} holds tensors of {', '.join(dtypes)}; give one in bf16, fp16 or fp32")

    def converted(self, adapter: ModelAdapter) -> dict[str, Tensor]:
        """Its tensors by diffusers' names; UserError for a layout that diffusers does not read."""
        with self._faults(), quiet("diffusers", below=logging.CRITICAL):
            return adapter.pipeline_class.lora_state_dict(dict(self.tensors))

    def dropped(self, adapter: ModelAdapter) -> dict[str, float]:
        """Nonzero tensors that diffusers drops, with their largest value."""
        kept = {id(tensor) for tensor in self.converted(adapter).values()}
        left = {key: t for key, t in self.tensors.items() if key.endswith(_DIFFERENCES) and id(t) not in kept}
        largest = {key: float(tensor.abs().max()) for key, tensor in left.items()}
        return {key: value for key, value in largest.items() if value > 0}

    def check(self, adapter: ModelAdapter, config: Mapping[str, Any], where: object) -> list[str]:
        """The names of its layers; UserError, with numbers, unless each of its tensors belongs to a layer of the transformer.

        `config` is the transformer's configuration, read from `where`.
        """
        self._refuse_unknown(adapter)
        model = build_part(adapter, "transformer", config, where)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        layers: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.converted(adapter).items():
            found = _KEY.fullmatch(key)
            if found is None:
                raise self._unread(adapter, key)
            layers.setdefault(found["layer"], {})[f"{found['half']} {found['kind']}"] = tensor
        if not layers:
            raise self._unread(adapter, next(iter(self.tensors), "nothing"))
        missing = [layer for layer in layers if f"{layer}.weight" not in shapes]
        wrong = {
            layer: how for layer in layers if layer not in missing and (how := _mismatch(layer, layers[layer], shapes))
        }
        if missing:
            reason = f"the transformer has no {missing[0]}"
        elif wrong:
            reason = next(f"{layer} {how}" for layer, how in wrong.items())
        else:
            return list(layers)
        raise UserError(
            f"the LoRA {self.path} is of another model: {len(missing) + len(wrong)} of its {len(layers)} layers do not fit "
            f"{where}; {reason}"
        )

    def _refuse_unknown(self, adapter: ModelAdapter) -> None:
        marks = {"dora_scale": "DoRA", "lokr_": "LoKr", "hada_": "LoHa"}
        found = next((name for mark, name in marks.items() if any(mark in key for key in self.tensors)), None)
        if found is not None:
            raise UserError(
                f"{self.path} is a {found}, whose weights a LoRA of {adapter.name} cannot hold; give a plain LoRA"
            )

    def _unread(self, adapter: ModelAdapter, key: str) -> UserError:
        return UserError(
            f"{self.path} is not a LoRA of {adapter.name}: of its {len(self.tensors)} tensors {key} has no place; names must be "
            "transformer.LAYER.lora_A.weight, diffusion_model.LAYER or, for Wan, lora_unet_LAYER"
        )

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Turn any error of diffusers and peft about the file into a UserError that names it."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # conversions and loading raise many classes for an unexpected tensor
            if is_out_of_memory(error):
                raise
            raise UserError(f"cannot load the LoRA {self.path}: {type(error).__name__}: {first_line(error)}") from error

    def fuse(self, pipe: Any, adapter: ModelAdapter, where: object) -> None:
        """Add it to the weights of its transformer, and leave the plain layers; UserError as `check`."""
        transformer = getattr(pipe, self.expert)
        wanted = set(self.check(adapter, transformer.config, where))
        second = {} if self.expert == EXPERTS[0] else {"load_into_transformer_2": True}
        with self._faults(), quiet("diffusers", below=logging.CRITICAL):
            pipe.load_lora_weights(
                str(self.path.parent),
                weight_name=self.path.name,
                adapter_name=_ADAPTER,
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,  # which would leave the biases that a file lacks without numbers
                **second,
            )
            loaded = {path for path, part in transformer.named_modules() if _ADAPTER in getattr(part, "lora_A", ())}
            if not loaded >= wanted:
                raise UserError(
                    f"diffusers loaded {len(loaded & wanted)} of the {len(wanted)} layers of the LoRA {self.path}; use another "
                    "version of diffusers and peft"
                )
            pipe.set_adapters([_ADAPTER], [self.scale])
            pipe.fuse_lora(components=[self.expert], safe_fusing=True)
            pipe.unload_lora_weights()
        transformer.requires_grad_(True)  # as loaded; peft freezes what it wraps


def find_loras(config: ModelConfig) -> list[Lora]:
    """The files of `model.loras`, downloaded if they are hub names; UserError for one that is missing or is not safetensors."""
    check_names(config)
    return [_find(name, config) for name in config.loras]


def find_local_loras(config: ModelConfig) -> list[Lora]:
    """The LoRAs that are local files or folders; with `model.offline` all of them must be."""
    check_names(config)
    local = [
        name for name in config.loras if config.offline or not _may_be_of_hub(split_scale(split_expert(name)[1])[0])
    ]
    return [_find(name, config) for name in local]


def describe_loras(
    config: ModelConfig, adapter: ModelAdapter, transformer: Mapping[str, Any], where: object
) -> list[str]:
    """Check the LoRAs; return one sentence for each from which diffusers drops tensors.

    `transformer` is the configuration of the transformers, which is one for all of them.
    """
    notes = []
    for lora in find_loras(config):
        lora.check(adapter, transformer, where)
        dropped = lora.dropped(adapter)
        if dropped:
            key, value = max(dropped.items(), key=lambda item: item[1])
            notes.append(
                f"of the LoRA {lora.path.name} diffusers leaves out {len(dropped)} of {len(lora.tensors)} tensors, which are not "
                f"zero (up to {value:.3g}, {key})"
            )
    return notes


def _mismatch(layer: str, parts: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Describe why a LoRA's parts do not fit a layer of these shapes; None if they do."""
    weight = shapes[f"{layer}.weight"]
    if not {"A weight", "B weight"} <= parts.keys():
        return f"has only {' and '.join(parts)} of A weight and B weight in the LoRA"
    down, up = tuple(parts["A weight"].shape), tuple(parts["B weight"].shape)
    if len(weight) < 2 or down[1:] != weight[1:] or up[:1] != weight[:1] or down[:1] != up[1:2]:
        return f"is {weight} there, and the LoRA {up} x {down}"
    bias = parts.get("B bias")
    if bias is not None and tuple(bias.shape) != shapes.get(f"{layer}.bias"):
        return f"has a bias of {shapes.get(f'{layer}.bias')} there, and the LoRA of {tuple(bias.shape)}"
    return None


def _is_here(name: str) -> bool:
    with failing_as(f"cannot look for the LoRA {name}"):
        return any((folder / name).exists() for folder in (Path(), SHIPPED)) or expand(name).exists()


def _may_be_of_hub(name: str) -> bool:
    named = hub_file(name) is not None or _HUB_NAME.fullmatch(name) is not None
    return named and not _is_here(name) and _without_number(name) is None


def _without_number(name: str) -> tuple[str, str] | None:
    """LoRA and scale of a name that is not here and ends with @ and no number; None for any other name."""
    lora, at, scale = name.rpartition("@")
    if not at or "/" in scale or _is_here(name):
        return None
    named = lora.endswith(".safetensors") or _HUB_NAME.fullmatch(lora) is not None or _is_here(lora)
    return (lora, scale) if named else None


def _find(given: str, config: ModelConfig) -> Lora:
    name, scale = split_scale(split_expert(given)[1])
    expert = expert_of(given)
    with failing_as(f"cannot look for the LoRA {name}"):
        for path in (expand(name), SHIPPED / name):
            if path.is_dir():
                return Lora(path=_only_file(path), scale=scale, from_hub=False, expert=expert)
            if path.is_file():
                return Lora(path=path, scale=scale, from_hub=False, expert=expert)
    if (unread := _without_number(name)) is not None:
        raise UserError(
            f"the scale of the LoRA {given} must be a number, got {unread[1]!r}; give {unread[0]}@1, or leave it out"
        )
    hub = hub_file(name) or ((name, _USUAL) if _HUB_NAME.fullmatch(name) else None)
    if hub is None:
        raise UserError(
            f"the LoRA {name!r} is neither a file or folder here nor ORGANISATION/NAME or ORGANISATION/NAME/FILE of the hub"
        )
    path = fetch_file(*hub, what=f"the LoRA {name!r}", offline=config.offline)
    return Lora(path=path, scale=scale, from_hub=True, expert=expert)


def _only_file(folder: Path) -> Path:
    files = sorted(file for file in folder.iterdir() if file.suffix == ".safetensors")
    usual = [file for file in files if file.name == _USUAL] or files
    if len(usual) == 1:
        return usual[0]
    found = ", ".join(file.name for file in files[:4]) or "no .safetensors file"
    raise UserError(f"the folder {folder} of a LoRA must hold one .safetensors file, and has {found}; name the file")
