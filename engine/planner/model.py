"""A checkpoint's configurations, from its JSON files or as published, without weights and without a network."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from huggingface_hub import hf_hub_download
from torch import nn

from engine.adapters import ModelAdapter, VideoSpec, adapter_named
from engine.adapters.published import PUBLISHED, SOURCES
from engine.config import ModelConfig, SamplerConfig
from engine.denoise.schedulers import make_scheduler, set_timesteps
from engine.errors import UserError, first_line
from engine.load.checkpoint import spec_of
from engine.load.hub import quiet_hub
from engine.load.pipeline import faults_of
from engine.load.weights import build_part, read_config
from engine.paths import find_checkpoint
from parallel.zero3 import LIVE_LAYERS, repeated_layers

FP32_BYTES = 4
_FILES = {
    "model_index": "model_index.json",
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A checkpoint as its index and its four configurations describe it.

    Attributes:
        name: folder or hub name.
        source: where the numbers were read.
        configs: model_index, and the configurations of transformer, vae, text_encoder and scheduler.
    """

    name: str
    source: str
    configs: dict[str, dict[str, Any]]

    @cached_property
    def adapter(self) -> ModelAdapter:
        """The adapter of this class of models."""
        return adapter_named(self.configs["model_index"], f"model_index.json of {self.name}")

    @cached_property
    def video(self) -> VideoSpec:
        """The numbers that decide lengths and sizes."""
        configs = self.configs
        return spec_of(self.adapter, configs["transformer"], configs["vae"], self.name, index=configs["model_index"])

    @property
    def num_experts(self) -> int:
        """Transformers, which have one configuration and take turns."""
        return len(self.adapter.experts_named(self.configs["model_index"]))

    @property
    def heads(self) -> int:
        """N."""
        return self._transformer.config.num_attention_heads

    @property
    def head_dim(self) -> int:
        """D."""
        return self._transformer.config.attention_head_dim

    @property
    def width(self) -> int:
        """C = N·D."""
        return self.heads * self.head_dim

    @property
    def layers(self) -> int:
        """Transformer blocks."""
        return self._transformer.config.num_layers

    def token_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Frames F, rows H and columns W of a video's tokens."""
        sizes = self.video.latent_shape(num_frames, height, width)[2:]
        frames, rows, columns = (size // step for size, step in zip(sizes, self.video.patch, strict=True))
        return frames, rows, columns

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Frames F and tokens per frame H·W of a video's tokens."""
        frames, rows, columns = self.token_grid(num_frames, height, width)
        return frames, rows * columns

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Number of parameters of each part, by building it on the meta device; tied ones count once."""
        parts = {"transformer": self._transformer, "text_encoder": self._text_encoder, "vae": self.vae}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}

    def weight_bytes(self, itemsize: int, *, ranks: int = 1) -> dict[str, int]:
        """Bytes of each part as load_pipeline loads it: the VAE in fp32, as are a few small layers of the (one) transformer.

        With `ranks`, those of one rank's share of transformer and text encoder: ceil(numel / ranks) numbers of every tensor.
        """
        return {
            "transformer": _bytes(self._transformer, self._transformer, itemsize, ranks),
            "text_encoder": _bytes(self._text_encoder, self._text_encoder, itemsize, ranks),
            "vae": self.parameters["vae"] * FP32_BYTES,
        }

    def gathered_bytes(self, itemsize: int) -> dict[str, int]:
        """Most bytes of transformer and text encoder that a forward with sharded weights holds gathered at a time.

        Two layers, the one that runs and the next, or one module outside the layers, such as an embedding, once as received and once as tensors.
        """
        return {
            name: LIVE_LAYERS * max(_bytes(part, piece, itemsize) for piece in _pieces(part))
            for name, part in (("transformer", self._transformer), ("text_encoder", self._text_encoder))
        }

    def timesteps(self, sampler: SamplerConfig, latent: tuple[int, int, int], *, window_frames: int) -> list[float]:
        """The scheduler's real timesteps, first step first, for latents of (frames, rows, columns)."""
        config = self.configs["scheduler"]
        scheduler_class = getattr(diffusers, str(config.get("_class_name")), None)
        if scheduler_class is None:
            raise UserError(f"{self.name}: diffusers has no scheduler {config.get('_class_name')!r:.60}")
        window, device = window_frames * self.video.patch[0], torch.device("cpu")
        with faults_of(Path(self.name) / "scheduler"):
            scheduler = make_scheduler(scheduler_class.from_config(config), sampler)
            set_timesteps(self.adapter, scheduler, sampler, latent, window_frames=window, device=device)
            return [float(t) for t in scheduler.timesteps.tolist()]

    @cached_property
    def vae(self) -> Any:
        """The VAE without weights: tensors on the meta device have shapes only."""
        return self._build("vae")

    @cached_property
    def _transformer(self) -> Any:
        return self._build("transformer")

    @cached_property
    def _text_encoder(self) -> Any:
        return self._build("text_encoder")

    def _build(self, part: str) -> Any:
        return build_part(self.adapter, part, self.configs[part], f"the {part}'s configuration of {self.name}").eval()


def read_model(config: ModelConfig) -> ModelSpec:
    """Read the configurations of `config.path`: its folder's JSON files, the hub's local copy, or the published ones.

    The network is used only for a hub name of which none of these exists.
    """
    source = find_checkpoint(config.path)
    if isinstance(source, Path):
        spec = ModelSpec(name=config.path, source=f"JSON files of {source}", configs=_read_folder(source))
        spec.adapter.check_folder(source, spec.configs["model_index"])
        return spec
    try:
        configs, how = _read_hub(source, config.revision, local=True), "JSON files of the hub's local copy"
    except OSError as error:
        if source in PUBLISHED:
            configs, how = PUBLISHED[source], SOURCES[source]
        elif config.offline:
            raise UserError(
                f"model.offline is true, and neither the hub's local copy nor what is published here describes {source!r}"
            ) from error
        else:
            configs, how = _fetch(source, config.revision), "JSON files fetched from the hub"
    spec = ModelSpec(name=source, source=how, configs=configs)
    spec.adapter.check_index(spec.configs["model_index"])
    return spec


def _read_folder(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return {part: read_config(folder / file) for part, file in _FILES.items()}
    except UserError as error:
        raise UserError(f"{folder} is not a complete checkpoint in Diffusers layout: {error}") from error


def _fetch(name: str, revision: str | None) -> dict[str, dict[str, Any]]:
    try:
        with quiet_hub():
            return _read_hub(name, revision, local=False)
    except OSError as error:
        known = ", ".join(PUBLISHED)
        raise UserError(
            f"cannot read the configuration of {name!r} ({first_line(error)}); known without a network: {known}"
        ) from error


def _read_hub(name: str, revision: str | None, *, local: bool) -> dict[str, dict[str, Any]]:
    paths = {
        part: hf_hub_download(name, file, revision=revision, local_files_only=local) for part, file in _FILES.items()
    }
    return {part: read_config(Path(path)) for part, path in paths.items()}


def in_fp32(part: nn.Module, name: str) -> bool:
    """Whether this parameter of a part is loaded in fp32 in any dtype of the others."""
    # transformers keeps its list in fp32 under fp16 only, diffusers always.
    kept = getattr(part, "_keep_in_fp32_modules", None) if isinstance(part, ModelMixin) else None
    return any(module in name.split(".") for module in kept or ())


def _bytes(whole: nn.Module, piece: nn.Module, itemsize: int, ranks: int = 1) -> int:
    """Bytes of the parameters of a piece of a part, or of one rank's share of them."""
    return sum(
        -(-p.numel() // ranks) * (FP32_BYTES if in_fp32(whole, name) else itemsize)
        for name, p in piece.named_parameters()
    )


def _pieces(part: nn.Module) -> list[nn.Module]:
    """The units that are gathered: the repeated layers, and each module outside them."""
    layers = repeated_layers(part)
    inside = {id(module) for layer in layers for module in layer.modules()}
    return layers + [module for module in part.modules() if id(module) not in inside and not list(module.children())]
