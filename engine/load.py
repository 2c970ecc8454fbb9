"""Checkpoints in Diffusers layout, from a folder or the hub, with every fault of theirs as one clear line."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from packaging.version import Version
from safetensors import SafetensorError

from engine.adapters import ModelAdapter, VideoSpec, adapter_named
from engine.config import ModelConfig
from engine.errors import UserError
from engine.progress import no_library_bars
from engine.weights import check_part, read_json

REPOSITORY = Path(__file__).resolve().parent.parent
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Parts of a pipeline that hold weights, and must lie in a checkpoint folder.
WEIGHT_FOLDERS = ("transformer", "vae", "text_encoder")


def pick_device(name: str) -> torch.device:
    """The device of a `model.device` setting."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "model.device is cuda, but torch sees no CUDA device; use cpu, or a torch built for your driver"
        )
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a `model.dtype` setting: `auto` is bfloat16 on CUDA and float32 on CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def find_checkpoint(path: str) -> Path | str:
    """A folder (from the working directory, then from the repository), or a hub name."""
    try:
        for folder in (Path(path).expanduser(), REPOSITORY / path):
            if folder.is_dir():
                return folder
    except (OSError, RuntimeError) as error:  # no permission, a name too long, ~ of an unknown user
        raise UserError(f"cannot look for model.path {path!r}: {error}") from error
    if not _HUB_NAME.fullmatch(path):
        raise UserError(f"model.path {path!r} is no folder here and no hub name; give a folder in Diffusers layout")
    return path


def fetch(source: Path | str, revision: str | None, *, parts: Sequence[str] = WEIGHT_FOLDERS) -> Path:
    """The folder of a checkpoint: itself, or the local copy of a hub name, downloaded as far as it is missing.

    Only what is read is fetched: JSON files, the weights of `parts`, and with the text encoder its tokenizer. Raises
    UserError if the hub does not know the name or cannot be reached and there is no local copy.
    """
    if isinstance(source, Path):
        if revision is not None:
            raise UserError(
                f"model.revision {revision!r} goes with a hub name, and {source} is a folder; leave it unset"
            )
        return source
    patterns = ["*.json", *(f"{part}/*.safetensors" for part in parts)]
    patterns += ["tokenizer/*"] if "text_encoder" in parts else []
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.ERROR)  # its warnings about retries come before our one line
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # what all errors of huggingface_hub and its connections derive from
        first = str(error).strip().splitlines()[0]
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"there is no folder {source!r} here, and the hub has no such checkpoint{at} or cannot be reached "
            f"({type(error).__name__}: {first})"
        ) from error
    finally:
        hub_log.setLevel(level)


def find_adapter(folder: Path) -> ModelAdapter:
    """What the engine knows of the model in a folder, by its model_index.json; UserError if it is none that is known."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} has no model_index.json; give the folder that holds transformer/, vae/ and the rest")
    index = read_json(folder / "model_index.json")
    return adapter_named(index.get("_class_name") if isinstance(index, dict) else None, folder)


def read_spec(folder: Path) -> VideoSpec:
    """The numbers of a checkpoint without its weights, from three JSON files of its folder."""
    adapter = find_adapter(folder)
    transformer, vae = (read_json(folder / part / "config.json") for part in ("transformer", "vae"))
    return adapter.video_spec(transformer, vae)


def load_pipeline(config: ModelConfig, *, with_text: bool = True, text_device: str = "model") -> DiffusionPipeline:
    """The pipeline on its device: transformer and text encoder in `config.dtype`, VAE in float32.

    Args:
        config: the checkpoint.
        with_text: whether the text encoder is loaded; ranks that receive the embeddings have no need of its memory.
        text_device: `model`, or `cpu` to keep the text encoder off the device.

    Raises UserError for missing or broken files, for checkpoints of a model without an adapter, and for library versions
    that are known to load them wrongly.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    if config.offload == "model" and device.type != "cuda":
        raise UserError("model.offload moves parts between GPU and CPU and needs CUDA; use none on a CPU")
    if config.offload == "model" and text_device == "cpu":
        raise UserError(
            "parallel.text_device cpu and model.offload model exclude each other; offload moves the encoder"
        )
    parts = WEIGHT_FOLDERS if with_text else ("transformer", "vae")
    folder = fetch(find_checkpoint(config.path), config.revision, parts=parts)
    check_folder(folder, parts)
    without_text: dict[str, Any] = {} if with_text else {"text_encoder": None, "tokenizer": None}
    with _faults_as_lines(config.path), no_library_bars():
        adapter, vae = find_adapter(folder), load_vae(folder)
        pipe = adapter.pipeline_class.from_pretrained(
            folder, vae=vae, dtype=dtype, use_safetensors=True, **without_text
        )
    adapter.check_pipeline(pipe)
    if with_text:
        _check_text_encoder(pipe)
    pipe.set_progress_bar_config(disable=True)
    if config.offload == "model":
        pipe.enable_model_cpu_offload(gpu_id=torch.cuda.current_device())
        return pipe
    # One by one: a text encoder that stays on the CPU must never have been on the device.
    pipe.transformer.to(device)
    pipe.vae.to(device)
    if with_text and text_device == "model":
        pipe.text_encoder.to(device)
    return pipe


def load_vae_alone(config: ModelConfig) -> tuple[VideoSpec, Any]:
    """The numbers of a checkpoint and its VAE, in float32 on the CPU; no other weights are fetched, looked at or read."""
    folder = fetch(find_checkpoint(config.path), config.revision, parts=("vae",))
    check_folder(folder, ("vae",))
    with _faults_as_lines(config.path), no_library_bars():
        return read_spec(folder), load_vae(folder)


def load_vae(folder: Path) -> Any:
    """The VAE alone, in float32 on the CPU."""
    vae_class = find_adapter(folder).vae_class
    return vae_class.from_pretrained(folder, subfolder="vae", dtype=torch.float32, use_safetensors=True)


def check_folder(folder: Path, parts: Sequence[str] = WEIGHT_FOLDERS) -> None:
    """Raise UserError unless the folder holds a known model whose `parts` are whole: every file, every tensor in its shape."""
    adapter = find_adapter(folder)
    # Without its files transformers makes a tokenizer that knows no word, and every prompt would be ignored.
    needed = {"transformer": ("scheduler", ("scheduler_config.json",))}
    needed["text_encoder"] = ("tokenizer", ("tokenizer.json", "spiece.model"))
    for name in parts:
        check_files(folder / name)
        check_part(adapter, folder, name)
        beside, files = needed.get(name, (name, ("config.json",)))
        if not any((folder / beside / file).is_file() for file in files):
            raise UserError(f"{folder / beside} has no {' or '.join(files)}; fetch the checkpoint again")


def check_files(part: Path) -> None:
    """Raise UserError unless a part's weights are there, as safetensors, with all of its shards."""
    files = sorted(part.glob("*.safetensors"))
    if not files:
        others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in part.glob(pattern))
        found = f"only {', '.join(others)}, which can run code and is not read" if others else "no weights"
        raise UserError(f"{part} has {found}; fetch the .safetensors files of this checkpoint")
    for shard_index in part.glob("*.safetensors.index.json"):
        content = read_json(shard_index)
        shards = set(content["weight_map"].values()) if isinstance(content, dict) and "weight_map" in content else set()
        missing = sorted(shards - {file.name for file in files})
        if missing:
            raise UserError(f"{part} lacks {', '.join(missing)} of {len(shards)} shards; finish the download")


@contextmanager
def _faults_as_lines(path: str) -> Iterator[None]:
    """What a library says of files that are not what they should be, as a UserError."""
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load {path!r}: {first}") from error


def _check_text_encoder(pipe: DiffusionPipeline) -> None:
    """transformers 5.0 to 5.2 leave the shared embedding uninitialised: text would be noise, without any error."""
    encoder = pipe.text_encoder
    if Version(transformers.__version__) < Version("5.3"):
        raise UserError(
            f"transformers {transformers.__version__} loads {type(encoder).__name__} wrongly; install transformers >= 5.3"
        )
    if encoder.get_input_embeddings().weight.data_ptr() != encoder.shared.weight.data_ptr():
        raise UserError("the text encoder's embedding is not the checkpoint's shared one; fetch the checkpoint again")
