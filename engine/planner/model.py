"""A checkpoint's configurations, from its JSON files or as published, without weights and without a network."""

import functools
import json
from collections.abc import Callable
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
from engine.config import ModelConfig, SamplerConfig, VideoConfig
from engine.errors import UserError, first_line
from engine.given.frames import GivenFrames, Places
from engine.load.checkpoint import spec_of
from engine.load.hub import quiet
from engine.load.pipeline import faults_of
from engine.load.quantised import FP8, is_matrix, store, torchao_bytes
from engine.load.weights import build_part, read_config
from engine.paths import find_checkpoint
from engine.schedulers import make_scheduler, set_timesteps
from parallel.zero3 import LIVE_LAYERS, repeated_layers

FP32_BYTES = 4
# At most of a number of a GGUF matrix while diffusers makes it whole in plain torch; 4 to 12.2 by type.
GGUF_WORK_BYTES = 13


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How numbers of transformer and text encoder are stored.

    Attributes:
        itemsize: bytes of one as it is computed with.
        storage: model.storage, of the transformer.
        file_bytes: bytes of a quantised transformer that a file decides; None without one.
    """

    itemsize: int
    storage: str = "full"
    file_bytes: int | None = None


# Of each parameter: its name, how many numbers it has, and whether it stays in fp32.
Numbers = list[tuple[str, int, bool]]

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
        configs: model_index, and the configurations of transformer, vae, text_encoder, scheduler and, if it has one, image_encoder.
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
    def experts(self) -> tuple[str, ...]:
        """Transformers, which have one configuration and take turns."""
        return self.adapter.experts_named(self.configs["model_index"])

    @property
    def num_experts(self) -> int:
        """Their number."""
        return len(self.experts)

    @cached_property
    def image_tokens(self) -> int:
        """Tokens of pictures that cross-attention sees beside the text; 0 for a model without them."""
        return self.adapter.image_tokens(self.configs["transformer"], self.configs.get("image_encoder"))

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

    def places(self, given: GivenFrames | None, video: VideoConfig) -> Places:
        """The places of conditions without noise of a video with given frames; UserError for one beyond the video."""
        if given is None:
            return Places()
        of = self.video
        return given.places(num_frames=video.num_frames, fps=video.fps, pictures=of.pictures, needs=of.needs)

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Number of parameters of each part, by building it on the meta device; tied ones count once."""
        counted = {name: sum(num for _, num, _ in numbers) for name, numbers in self._numbers.items()}
        return counted | {"vae": sum(p.numel() for p in self.vae.parameters())}

    def weight_bytes(self, itemsize: int, *, ranks: int = 1, stored: Stored | None = None) -> dict[str, int]:
        """Bytes of each part as load_pipeline loads it: the VAE in fp32, as are a few small layers of the (one) transformer.

        With `ranks`, those of one rank's share of transformer and text encoder: ceil(numel / ranks) numbers of every tensor. With
        `stored`, the transformer as it says.
        """
        full = {name: _bytes(numbers, itemsize, ranks) for name, numbers in self._numbers.items()}
        return {
            "transformer": full["transformer"] if stored is None else sum(self._stored_bytes(stored).values()),
            "text_encoder": full["text_encoder"],
            "vae": self.parameters["vae"] * FP32_BYTES,
        }

    def offloaded_bytes(self, stored: Stored) -> dict[str, tuple[int, int]]:
        """Bytes of transformer and text encoder on the GPU while a forward runs with model.weights block_offload: outside the blocks, of
        blocks. The transformer's next block is on its way while one runs; the text encoder's blocks come one by one.
        """
        text = {name: num * stored.itemsize for name, num, _ in self._numbers["text_encoder"]}
        parts = (
            ("transformer", self._transformer, self._stored_bytes(stored), 2),
            ("text_encoder", self._text_encoder, text, 1),
        )
        found = {}
        for name, part, sizes, live in parts:
            layers = {id(layer) for layer in repeated_layers(part)}
            blocks = [path + "." for path, module in part.named_modules() if id(module) in layers]
            inside = [sum(size for key, size in sizes.items() if key.startswith(block)) for block in blocks]
            found[name] = (sum(sizes.values()) - sum(inside), live * max(inside, default=0))
        return found

    def whole_bytes(self, stored: Stored) -> int:
        """Bytes of the largest layer of a quantised transformer while it runs, and its weight is made whole; 0 if it is not quantised."""
        if stored.file_bytes is not None:
            return self._largest_matrix * GGUF_WORK_BYTES
        if stored.storage == "fp8":
            sizes = (
                sum(p.numel() for p in part.parameters(recurse=False) if p.dtype == FP8)
                for part in self._cast.modules()
            )
            return max(sizes) * stored.itemsize
        return 0 if stored.storage == "full" else self._largest_matrix * stored.itemsize

    def _stored_bytes(self, stored: Stored) -> dict[str, int]:
        """Bytes of each parameter of the transformer; those of a file, which has its own names, are spread by their numbers."""
        full = {
            name: num * (FP32_BYTES if kept else stored.itemsize) for name, num, kept in self._numbers["transformer"]
        }
        if stored.file_bytes is not None:
            whole = sum(full.values())
            return {name: size * stored.file_bytes // whole for name, size in full.items()}
        if stored.storage == "fp8":
            return full | {name: p.numel() for name, p in self._cast.named_parameters() if p.dtype == FP8}
        sizes = {f"{name}.weight": torchao_bytes(stored.storage, part.weight.shape) for name, part in self._matrices}
        return full | {name: size for name, size in sizes.items() if size is not None}

    @cached_property
    def _cast(self) -> Any:
        """The transformer without weights, with the dtypes that model.storage fp8 leaves it."""
        made = _build.__wrapped__(self.adapter, "transformer", json.dumps(self.configs["transformer"]), self.name)
        store(made, "fp8", torch.float32)
        return made

    @cached_property
    def _matrices(self) -> list[tuple[str, nn.Linear]]:
        whole = self._transformer
        return [(name, part) for name, part in whole.named_modules() if is_matrix(whole, name, part)]

    @property
    def _largest_matrix(self) -> int:
        return max(part.weight.numel() for _, part in self._matrices)

    def gathered_bytes(self, itemsize: int) -> dict[str, int]:
        """Most bytes of transformer and text encoder that a forward with sharded weights holds gathered at a time.

        Two layers, the one that runs and the next, or one module outside the layers, such as an embedding, once as received and once as tensors.
        """
        return {
            name: LIVE_LAYERS * max(_bytes(piece, itemsize) for piece in pieces)
            for name, pieces in self._piece_numbers.items()
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
    def _numbers(self) -> dict[str, Numbers]:
        """The parameters of transformer and text encoder, read once: a search for a plan that fits asks for their bytes often."""
        return {name: _numbers(part, part) for name, part in self._sharded.items()}

    @cached_property
    def _piece_numbers(self) -> dict[str, list[Numbers]]:
        """Those of each unit that is gathered."""
        return {name: [_numbers(part, piece) for piece in _pieces(part)] for name, part in self._sharded.items()}

    @property
    def _sharded(self) -> dict[str, Any]:
        return {"transformer": self._transformer, "text_encoder": self._text_encoder}

    @cached_property
    def _transformer(self) -> Any:
        return self._build("transformer")

    @cached_property
    def _text_encoder(self) -> Any:
        return self._build("text_encoder")

    def _build(self, part: str) -> Any:
        return _build(self.adapter, part, json.dumps(self.configs[part]), self.name)


@functools.lru_cache(maxsize=16)
def _build(adapter: ModelAdapter, part: str, config: str, name: str) -> Any:
    """A part on the meta device, which several specs of a process share."""
    return build_part(adapter, part, json.loads(config), f"the {part}'s configuration of {name}").eval()


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
        return _read_files(lambda file: folder / file)
    except UserError as error:
        raise UserError(f"{folder} is not a complete checkpoint in Diffusers layout: {error}") from error


def _fetch(name: str, revision: str | None) -> dict[str, dict[str, Any]]:
    try:
        with quiet("huggingface_hub"):
            return _read_hub(name, revision, local=False)
    except OSError as error:
        known = ", ".join(PUBLISHED)
        raise UserError(
            f"cannot read the configuration of {name!r} ({first_line(error)}); known without a network: {known}"
        ) from error


def _read_hub(name: str, revision: str | None, *, local: bool) -> dict[str, dict[str, Any]]:
    return _read_files(lambda file: Path(hf_hub_download(name, file, revision=revision, local_files_only=local)))


def _read_files(path_of: Callable[[str], Path]) -> dict[str, dict[str, Any]]:
    """The configurations in these files, and that of an encoder of pictures if the index names one."""
    configs = {part: read_config(path_of(file)) for part, file in _FILES.items()}
    adapter = adapter_named(configs["model_index"], path_of("model_index.json"))
    if adapter.sees_pictures(configs["model_index"]):
        configs["image_encoder"] = read_config(path_of("image_encoder/config.json"))
    return configs


def in_fp32(part: nn.Module, name: str) -> bool:
    """Whether this parameter of a part is loaded in fp32 in any dtype of the others."""
    # transformers keeps its list in fp32 under fp16 only, diffusers always.
    kept = getattr(part, "_keep_in_fp32_modules", None) if isinstance(part, ModelMixin) else None
    return any(module in name.split(".") for module in kept or ())


def _numbers(whole: nn.Module, piece: nn.Module) -> Numbers:
    return [(name, p.numel(), in_fp32(whole, name)) for name, p in piece.named_parameters()]


def _bytes(numbers: Numbers, itemsize: int, ranks: int = 1) -> int:
    """Bytes of these parameters, or of one rank's share of them."""
    return sum(-(-num // ranks) * (FP32_BYTES if kept else itemsize) for _, num, kept in numbers)


def _pieces(part: nn.Module) -> list[nn.Module]:
    """The units that are gathered: the repeated layers, and each module outside them."""
    layers = repeated_layers(part)
    inside = {id(module) for layer in layers for module in layer.modules()}
    return layers + [module for module in part.modules() if id(module) not in inside and not list(module.children())]
