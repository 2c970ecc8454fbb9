"""What the planner knows of a checkpoint: numbers from its JSON files, or published ones. No weights, no network needed."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from engine.adapters.wan import WanSpec
from engine.adapters.wan_published import PUBLISHED, SOURCE
from engine.config import ModelConfig, SamplerConfig
from engine.denoise import make_scheduler
from engine.errors import UserError
from engine.load import find_checkpoint

FP32_BYTES = 4
_FILES = {
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A checkpoint as its four configurations describe it.

    Attributes:
        name: folder or hub name.
        source: where the numbers were read.
        configs: the configurations of transformer, vae, text_encoder and scheduler.
    """

    name: str
    source: str
    configs: dict[str, dict[str, Any]]

    @cached_property
    def transformer(self) -> Any:
        """Configuration of the transformer, with the defaults of its class."""
        return self._transformer.config

    @cached_property
    def video(self) -> WanSpec:
        """What decides lengths and sizes."""
        return WanSpec.from_configs(self.configs["transformer"], self.configs["vae"])

    @property
    def heads(self) -> int:
        """N."""
        return self.transformer.num_attention_heads

    @property
    def head_dim(self) -> int:
        """D."""
        return self.transformer.attention_head_dim

    @property
    def width(self) -> int:
        """C = N·D."""
        return self.heads * self.head_dim

    @property
    def layers(self) -> int:
        """Transformer blocks."""
        return self.transformer.num_layers

    @property
    def patch_values(self) -> tuple[int, int]:
        """Numbers that one token stands for: in the latents, and in the model's output."""
        frames, rows, columns = self.transformer.patch_size
        volume = frames * rows * columns
        return self.transformer.in_channels * volume, self.transformer.out_channels * volume

    @property
    def size_multiples(self) -> tuple[int, int]:
        """What height and width in pixels must be multiples of: WanPipeline's 16, and whole tokens."""
        _, rows, columns = self.transformer.patch_size
        factor = self.video.spatial_factor
        return math.lcm(16, factor * rows), math.lcm(16, factor * columns)

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Latent frames F and tokens per frame H·W of a video."""
        sizes = self.video.latent_shape(num_frames, height, width)[2:]
        frames, rows, columns = (size // step for size, step in zip(sizes, self.transformer.patch_size, strict=True))
        return frames, rows * columns

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Number of parameters of each part, by building it on the meta device; tied ones count once."""
        parts = {"transformer": self._transformer, "text_encoder": self._text_encoder, "vae": self.make_vae()}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}

    def weight_bytes(self, itemsize: int) -> dict[str, int]:
        """Bytes of each part as load_pipeline loads it: the VAE in fp32, as are a few small layers of the transformer."""
        kept = self._transformer._keep_in_fp32_modules or []
        in_fp32 = sum(
            p.numel()
            for name, p in self._transformer.named_parameters()
            if any(part in name.split(".") for part in kept)
        )
        return {
            "transformer": self.parameters["transformer"] * itemsize + in_fp32 * (FP32_BYTES - itemsize),
            "text_encoder": self.parameters["text_encoder"] * itemsize,
            "vae": self.parameters["vae"] * FP32_BYTES,
        }

    def timesteps(self, sampler: SamplerConfig) -> list[float]:
        """The scheduler's real timesteps, first step first."""
        config = self.configs["scheduler"]
        scheduler_class = getattr(diffusers, config.get("_class_name", ""), None)
        if scheduler_class is None:
            raise UserError(f"{self.name}: diffusers has no scheduler {config.get('_class_name')!r}")
        scheduler = make_scheduler(scheduler_class.from_config(config), sampler.flow_shift)
        scheduler.set_timesteps(sampler.num_steps)
        return [float(t) for t in scheduler.timesteps.tolist()]

    def make_vae(self) -> AutoencoderKLWan:
        """The VAE without weights: tensors on the meta device have shapes only."""
        return _on_meta(lambda: AutoencoderKLWan.from_config(self.configs["vae"]))

    @cached_property
    def _transformer(self) -> WanTransformer3DModel:
        return _on_meta(lambda: WanTransformer3DModel.from_config(self.configs["transformer"]))

    @cached_property
    def _text_encoder(self) -> UMT5EncoderModel:
        return _on_meta(lambda: UMT5EncoderModel(UMT5Config(**self.configs["text_encoder"])))


def read_model(config: ModelConfig) -> ModelSpec:
    """The numbers of `config.path`: its folder's JSON files, the hub's local copy, or what is published about it.

    The network is asked only for a hub name of which nothing is known here.
    """
    source = find_checkpoint(config.path)
    if isinstance(source, Path):
        return ModelSpec(name=config.path, source=f"JSON files of {source}", configs=_read_folder(source))
    try:
        configs, how = _read_hub(source, config.revision, local=True), "JSON files of the hub's local copy"
    except OSError:
        if source in PUBLISHED:
            configs, how = PUBLISHED[source], SOURCE
        else:
            configs, how = _fetch(source, config.revision), "JSON files fetched from the hub"
    return ModelSpec(name=source, source=how, configs=configs)


def _read_folder(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return {part: json.loads((folder / file).read_text(encoding="utf-8")) for part, file in _FILES.items()}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder} is no whole checkpoint in Diffusers layout: {error}") from error


def _fetch(name: str, revision: str | None) -> dict[str, dict[str, Any]]:
    try:
        return _read_hub(name, revision, local=False)
    except (OSError, json.JSONDecodeError) as error:
        first = str(error).strip().splitlines()[0]
        known = ", ".join(PUBLISHED)
        raise UserError(
            f"cannot read the configuration of {name!r} ({first}); known without a network: {known}"
        ) from error


def _read_hub(name: str, revision: str | None, *, local: bool) -> dict[str, dict[str, Any]]:
    paths = {
        part: hf_hub_download(name, file, revision=revision, local_files_only=local) for part, file in _FILES.items()
    }
    return {part: json.loads(Path(path).read_text(encoding="utf-8")) for part, path in paths.items()}


def _on_meta(make: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return make().eval()
