"""A checkpoint by its small files: a folder or hub name, the model's adapter, its numbers, and a digest of its content."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.adapters import ModelAdapter, VideoSpec, adapter_named
from engine.adapters.base import EXPERTS
from engine.config import ModelConfig, RunConfig
from engine.devices import pick_device, pick_dtype
from engine.errors import UserError
from engine.identity import latents_settings
from engine.load.hub import fetch
from engine.load.loras import Lora, find_loras
from engine.load.single_file import find_single_files
from engine.load.weights import deciding_files, read_config
from engine.paths import failing_as, find_checkpoint

# A checkpoint of 28 GB takes 15 s or more to hash, on every rank at every start; so a file larger than this is sampled.
_WHOLE_BYTES = 64 << 20
_HEAD_BYTES = 1 << 20  # holds the header of a safetensors file
_SAMPLE_EVERY, _SAMPLE_BYTES = 4 << 20, 4 << 10


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose small files are local, from `open_checkpoint`; no weights are read.

    Attributes:
        config: the model settings that name it.
        folder: its folder, or the hub's local copy.
        from_hub: whether `config.path` is a hub name.
    """

    config: ModelConfig
    folder: Path
    from_hub: bool

    @cached_property
    def adapter(self) -> ModelAdapter:
        """The adapter of its model, by its model_index.json; UserError for a model that has none."""
        return find_adapter(self.folder)

    @cached_property
    def spec(self) -> VideoSpec:
        """Its numbers; UserError for a checkpoint that cannot be run."""
        self.check_index()
        return self.vae_spec

    def check_index(self) -> None:
        """Raise UserError for a checkpoint whose transformers cannot be run."""
        self.adapter.check_folder(self.folder, self.read("model_index.json"))

    @cached_property
    def experts(self) -> tuple[str, ...]:
        """Its parts that denoise."""
        return self.adapter.experts_named(self.read("model_index.json"))

    @cached_property
    def encoders(self) -> tuple[str, ...]:
        """Its parts that encode text and pictures."""
        sees = self.adapter.sees_pictures(self.read("model_index.json"))
        return ("text_encoder", "image_encoder") if sees else ("text_encoder",)

    @cached_property
    def vae_spec(self) -> VideoSpec:
        """Its numbers, also for a checkpoint whose transformer cannot be run."""
        transformer, vae = (self.read(f"{part}/config.json") for part in ("transformer", "vae"))
        return spec_of(self.adapter, transformer, vae, self.folder, index=self.read("model_index.json"))

    @cached_property
    def loras(self) -> list[Lora]:
        """Its LoRAs, found once: the hub is asked for each."""
        return find_loras(self.config)

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex of the checkpoint's version, and the names, sizes and contents of its files and the single files beside it,
        and the contents and scales of its LoRAs.

        For a hub checkpoint only the commit and the JSON files are hashed, since a rank may not have its weights yet. Of a file
        above 64 MiB the first MiB, the last 4 KiB and 4 KiB of every 4 MiB are hashed: this detects other weights in any
        stretch of 4 MiB, such as a matrix of 1536 x 1536 in bf16, but not every changed number. Records of videos hold the
        SHA-256 of every whole file (engine/load/provenance.py).
        """
        # The folder of a hub checkpoint is named after its commit; a local one may have any name.
        digest = hashlib.sha256((self.folder.resolve().name if self.from_hub else "").encode())
        files = [path for path in deciding_files(self.folder) if path.suffix == ".json" or not self.from_hub]
        named = [(str(file.relative_to(self.folder)), file) for file in files]
        for expert, file in find_single_files(self.config).items():
            named.append((file.name if expert == EXPERTS[0] else f"{expert} {file.name}", file))
        for name, file in named:
            with failing_as(f"cannot read {file}"):
                size = file.stat().st_size
                digest.update(f"{name} {size}\n".encode())
                _add_sample(digest, file, size)
        for lora in self.loras:
            of = "" if lora.expert == EXPERTS[0] else f"{lora.expert} "
            with failing_as(f"cannot read {lora.path}"):
                digest.update(f"lora {of}{lora.scale!r} {lora.path.stat().st_size}\n".encode())
                _add_sample(digest, lora.path, lora.path.stat().st_size)
        return digest.hexdigest()

    def read(self, file: str) -> dict[str, Any]:
        """One of its JSON files."""
        return read_config(self.folder / file)

    def settings(self, config: RunConfig, **given: Any) -> dict[str, Any]:
        """`engine.identity.latents_settings` of a run with this checkpoint."""
        device = pick_device(config.model.device)
        loras = [lora.name for lora in self.loras]  # by name, for people: the digest has their content
        return latents_settings(
            config,
            checkpoint=self.digest,
            dtype=str(pick_dtype(config.model.dtype, device)),
            device=device.type,
            with_rate=self.adapter.frame_rate_matters,
            **given,
            **({"loras": loras} if loras else {}),
        )


def open_checkpoint(config: ModelConfig, parts: Sequence[str] = (), *, offline: bool = False) -> Checkpoint:
    """The checkpoint of the model settings, with its small files and the weights of `parts` fetched; `offline` fetches nothing."""
    source = find_checkpoint(config.path)
    folder = fetch(source, config.revision, parts=parts, offline=offline or config.offline)
    return Checkpoint(config=config, folder=folder, from_hub=isinstance(source, str))


def find_adapter(folder: Path) -> ModelAdapter:
    """The adapter of the model in a folder, by its model_index.json; UserError for a model that has none."""
    with failing_as(f"cannot look for {folder / 'model_index.json'}"):
        is_here = (folder / "model_index.json").is_file()
    if not is_here:
        raise UserError(f"{folder} has no model_index.json; give the folder that holds transformer/, vae/ and the rest")
    return adapter_named(read_config(folder / "model_index.json"), folder / "model_index.json")


def spec_of(
    adapter: ModelAdapter,
    transformer: dict[str, Any],
    vae: dict[str, Any],
    where: object,
    *,
    index: Mapping[str, Any],
) -> VideoSpec:
    """`ModelAdapter.video_spec`; UserError, naming `where` the configurations were read, for invalid numbers."""
    try:
        return adapter.video_spec(transformer, vae, index)
    except (TypeError, ValueError, ArithmeticError, MemoryError) as error:
        raise UserError(
            f"the configurations of transformer and VAE in {where} describe no {adapter.name} ({error}); fetch the checkpoint again"
        ) from error


def _add_sample(digest: Any, file: Path, size: int) -> None:
    with file.open("rb") as opened:
        if size <= _WHOLE_BYTES:
            digest.update(opened.read())
            return
        digest.update(opened.read(_HEAD_BYTES))
        for start in (*range(_SAMPLE_EVERY, size, _SAMPLE_EVERY), size - _SAMPLE_BYTES):
            opened.seek(start)
            digest.update(opened.read(_SAMPLE_BYTES))
