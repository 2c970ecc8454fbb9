"""LoRA files with random numbers, in the layouts in which they are published."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tests.original_layout import wan_transformer

Layers = dict[str, tuple[Tensor, Tensor]]
ALPHA = 3.0  # of the layouts that have one; a rank of 2 makes it a factor of 1.5


def random_lora(transformer: Any, *, seed: int = 0, rank: int = 2) -> Layers:
    """Matrices A and B for each layer of the blocks; the second half of the layers has one more rank."""
    draw = torch.Generator().manual_seed(seed)
    weights = {name.removesuffix(".weight"): p for name, p in transformer.named_parameters() if name.endswith("weight")}
    names = [name for name, p in weights.items() if p.dim() == 2 and "blocks." in name]
    layers: Layers = {}
    for index, name in enumerate(names):
        rows, columns = weights[name].shape
        more = rank + (2 * index >= len(names))
        layers[name] = (
            torch.randn(more, columns, generator=draw) * 0.3,
            torch.randn(rows, more, generator=draw) * 0.3,
        )
    return layers


def save_lora(file: Path, layers: Layers, layout: str = "diffusers", extra: dict[str, Tensor] | None = None) -> Path:
    """Write a LoRA: with diffusers' names, those of Wan's authors (`authors`), or of kohya's tools (`kohya`), both with alpha."""
    tensors: dict[str, Tensor] = {}
    for layer, (down, up) in layers.items():
        if layout == "diffusers":
            tensors |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
            continue
        name = wan_transformer(f"{layer}.").removesuffix(".")
        name = f"diffusion_model.{name}" if layout == "authors" else f"lora_unet_{name.replace('.', '_')}"
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(ALPHA),
        }
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in (tensors | (extra or {})).items()}, file)
    return file
