"""Checkpoints in Diffusers layout, from a folder or the hub, with every fault of theirs as one clear line."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from packaging.version import Version
from safetensors import SafetensorError

from engine.adapters import ModelAdapter, VideoSpec, adapter_named
from engine.config import ModelConfig
from engine.errors import UserError, is_out_of_memory
from engine.load.convolutions import use_onednn
from engine.load.sharded_weights import check_placement
from engine.load.single_file import SingleFile, open_single_file
from engine.load.weights import WEIGHT_FOLDERS, check_part, lfs_pointer, read_config, unfinished
from engine.paths import find_checkpoint, is_pickle
from engine.progress import no_library_bars

# Of newer versions of the hub's client; older ones return what there is, and the checks of the folder say what is missing.
_INCOMPLETE: tuple[type[Exception], ...] = tuple(filter(None, [getattr(hub_errors, "IncompleteSnapshotError", None)]))

# The part that lies beside the weights of another, and the files of which a part must have one.
_BESIDE = {"transformer": "scheduler", "text_encoder": "tokenizer"}
_SMALL_FILES = {"scheduler": ("scheduler_config.json",), "tokenizer": ("tokenizer.json", "spiece.model")}


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


def fetch(
    source: Path | str, revision: str | None, *, parts: Sequence[str] = WEIGHT_FOLDERS, offline: bool = False
) -> Path:
    """The folder of a checkpoint: itself, or the local copy of a hub name, downloaded as far as it is missing.

    Only what is read is fetched: JSON files, the weights of `parts`, and with the text encoder its tokenizer. Raises
    UserError if the hub does not know the name or cannot be reached and there is no local copy; with `offline` the hub
    is not asked.
    """
    if isinstance(source, Path):
        if revision is not None:
            raise UserError(
                f"model.revision {revision!r} goes with a hub name, and {source} is a folder; leave it unset"
            )
        return source
    patterns = ["*.json", *(f"{part}/*.safetensors" for part in parts)]
    patterns += ["tokenizer/*.model", "tokenizer/*.txt"] if {"text_encoder", "tokenizer"} & set(parts) else []
    try:
        with quiet_hub():
            return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except (OSError, ValueError) as error:  # what all errors of huggingface_hub and its connections derive from
        first = str(error).strip().splitlines()[0]
        at = f" at revision {revision}" if revision else ""
        if isinstance(error, _INCOMPLETE):
            raise UserError(
                f"the local copy of {source!r}{at} is not whole and the hub was not reached; finish the download "
                f"({type(error).__name__}: {first})"
            ) from error
        if offline:
            raise UserError(
                f"model.offline is true, and the hub's local copy does not hold {source!r}{at}; download it first"
            ) from error
        raise UserError(
            f"there is no folder {source!r} here, and the hub has no such checkpoint{at} or cannot be reached "
            f"({type(error).__name__}: {first})"
        ) from error


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the hub's warnings about retries, which would come before our one line."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def find_adapter(folder: Path) -> ModelAdapter:
    """What the engine knows of the model in a folder, by its model_index.json; UserError if it is none that is known."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} has no model_index.json; give the folder that holds transformer/, vae/ and the rest")
    return adapter_named(read_config(folder / "model_index.json"), folder / "model_index.json")


def read_spec(folder: Path, *, denoises: bool = True) -> VideoSpec:
    """The numbers of a checkpoint without its weights, from three JSON files of its folder.

    UserError for a checkpoint that cannot be run, unless only its VAE is used: `denoises` False.
    """
    adapter = find_adapter(folder)
    if denoises:
        adapter.check_folder(folder, read_config(folder / "model_index.json"))
    transformer, vae = (read_config(folder / part / "config.json") for part in ("transformer", "vae"))
    return spec_of(adapter, transformer, vae, folder)


def spec_of(adapter: ModelAdapter, transformer: dict[str, Any], vae: dict[str, Any], where: object) -> VideoSpec:
    """`ModelAdapter.video_spec`; UserError, which says `where` the configurations were read, for numbers that are none of a model."""
    try:
        return adapter.video_spec(transformer, vae)
    except (TypeError, ValueError, ArithmeticError, MemoryError) as error:
        raise UserError(
            f"the configurations of transformer and VAE in {where} describe no {adapter.name} ({error}); fetch the checkpoint again"
        ) from error


def load_pipeline(config: ModelConfig, *, with_text: bool = True, text_device: str = "model") -> DiffusionPipeline:
    """The pipeline on its device: transformer and text encoder in `config.dtype`, VAE in float32.

    With `config.weights` zero3 transformer and text encoder are left on the CPU, for `shard_pipeline` to take.

    Args:
        config: the checkpoint.
        with_text: whether the text encoder is loaded; ranks that receive the embeddings have no need of its memory.
        text_device: `model`, or `cpu` to keep the text encoder off the device.

    Raises UserError for missing or broken files, for checkpoints of a model without an adapter, and for library versions
    that are known to load them wrongly.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    check_placement(config, device, text_device)
    folder, single = open_checkpoint(config, WEIGHT_FOLDERS if with_text else ("transformer", "vae"))
    without_text: dict[str, Any] = {} if with_text else {"text_encoder": None, "tokenizer": None}
    beside = ("scheduler", "tokenizer") if with_text else ("scheduler",)
    with _faults_as_lines(config.path), no_library_bars():
        adapter, vae = find_adapter(folder), load_vae(folder, single)
        given = without_text | {name: _load_beside(adapter, folder, name) for name in beside}
        if single is not None and "transformer" in single.parts:
            given["transformer"] = single.load(adapter, folder, "transformer", dtype)
        pipe = adapter.pipeline_class.from_pretrained(folder, vae=vae, dtype=dtype, use_safetensors=True, **given)
    adapter.check_pipeline(pipe)
    with faults_of(folder / "scheduler"):
        adapter.try_scheduler(pipe.scheduler)
    if with_text:
        _check_text_encoder(pipe)
    pipe.set_progress_bar_config(disable=True)
    if config.weights == "cpu_offload":
        pipe.enable_model_cpu_offload(device=torch.device("cuda", torch.cuda.current_device()))
        return pipe
    # One by one: a text encoder that stays on the CPU must never have been on the device.
    pipe.vae.to(device)
    if config.weights == "zero3":
        return pipe
    pipe.transformer.to(device)
    if with_text and text_device == "model":
        pipe.text_encoder.to(device)
    return pipe


def load_vae_alone(config: ModelConfig) -> tuple[VideoSpec, Any]:
    """The numbers of a checkpoint and its VAE, in float32 on the CPU; no other weights are fetched, looked at or read."""
    folder, single = open_checkpoint(config, ("vae",))
    with _faults_as_lines(config.path), no_library_bars():
        return read_spec(folder, denoises=False), load_vae(folder, single)


def open_checkpoint(config: ModelConfig, parts: Sequence[str]) -> tuple[Path, SingleFile | None]:
    """The folder of a checkpoint and the single file that takes the place of some of its parts, fetched and checked."""
    source, single = find_checkpoint(config.path), None
    if config.single_file is not None:
        adapter = find_adapter(fetch(source, config.revision, parts=(), offline=config.offline))
        single = open_single_file(config, adapter)
    elsewhere = single.parts if single is not None else ()
    wanted = [part for part in parts if part not in elsewhere]
    folder = fetch(source, config.revision, parts=wanted, offline=config.offline)
    check_folder(folder, parts, elsewhere=elsewhere)
    if single is not None:
        single.check(find_adapter(folder), folder)
    return folder, single


def load_vae(folder: Path, single: SingleFile | None = None) -> Any:
    """The VAE alone, in float32 on the CPU, from the single file if it is in there."""
    adapter = find_adapter(folder)
    if single is not None and "vae" in single.parts:
        vae = single.load(adapter, folder, "vae", torch.float32)
    else:
        vae = adapter.vae_class.from_pretrained(folder, subfolder="vae", dtype=torch.float32, use_safetensors=True)
    use_onednn(vae)
    return vae


def check_folder(folder: Path, parts: Sequence[str] = WEIGHT_FOLDERS, *, elsewhere: Sequence[str] = ()) -> None:
    """Raise UserError unless the folder holds a known model whose `parts` are whole: every file, every tensor in its shape.

    Of parts whose weights are `elsewhere` the folder holds the configurations only.
    """
    adapter = find_adapter(folder)
    for name in parts:
        if name not in elsewhere:
            check_files(folder, name)
            check_part(adapter, folder, name)
        check_small_files(folder, _BESIDE.get(name, name))


def check_small_files(folder: Path, part: str) -> None:
    """Raise UserError unless the folder of a part holds its configuration, or of a tokenizer its words, as files of their own.

    Without its files transformers makes a tokenizer that knows no word, and every prompt would be ignored.
    """
    files = _SMALL_FILES.get(part, ("config.json",))
    if not any((folder / part / file).is_file() for file in files):
        raise UserError(f"{folder / part} has no {' or '.join(files)}; fetch the checkpoint again")
    for file in sorted((folder / part).glob("*.*")):
        if file.is_file() and (pointer := lfs_pointer(file)):
            raise UserError(pointer)


def load_tokenizer(config: ModelConfig) -> tuple[ModelAdapter, Path, Any]:
    """What the engine knows of the model of `config`, its folder, and its tokenizer; no weights are fetched or read."""
    folder = fetch(find_checkpoint(config.path), config.revision, parts=("tokenizer",), offline=config.offline)
    adapter = find_adapter(folder)
    check_small_files(folder, "tokenizer")
    with no_library_bars():
        return adapter, folder, _load_beside(adapter, folder, "tokenizer")


def check_files(folder: Path, name: str) -> None:
    """Raise UserError unless a part's weights are there, as safetensors, with all of its shards."""
    part = folder / name
    files = sorted(part.glob("*.safetensors"))
    begun = unfinished(folder, name)
    told = f" ({', '.join(begun)} did not finish)" if begun else ""
    if not files:
        others = sorted(file.name for file in part.glob("*") if is_pickle(file.name))
        found = f"only {', '.join(others)}, which can run code and is not read" if others else "no weights"
        raise UserError(f"{part} has {found}{told}; fetch the .safetensors files of this checkpoint")
    for shard_index in part.glob("*.safetensors.index.json"):
        weight_map = read_config(shard_index).get("weight_map")
        shards = (
            {name for name in weight_map.values() if isinstance(name, str)} if isinstance(weight_map, dict) else set()
        )
        missing = sorted(shards - {file.name for file in files})
        if missing:
            raise UserError(f"{part} lacks {', '.join(missing)} of {len(shards)} shards{told}; finish the download")


def _load_beside(adapter: ModelAdapter, folder: Path, name: str) -> Any:
    """The scheduler or the tokenizer alone, so that it is known which of them a fault is of."""
    others = dict.fromkeys({*WEIGHT_FOLDERS, "scheduler", "tokenizer"} - {name})
    with faults_of(folder / name):
        return getattr(adapter.pipeline_class.from_pretrained(folder, **others), name)


@contextmanager
def faults_of(part: Path) -> Iterator[None]:
    """Any error about the small files of a folder as a UserError that names them."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except (ImportError, PermissionError) as error:  # not the files' fault: they need not be fetched again
        raise UserError(f"cannot load the {part.name} from {part}: {_first_line(error)}") from error
    except Exception as error:  # KeyError, TypeError, ..; the library of the tokenizers raises Exception itself
        files = ", ".join(sorted(file.name for file in part.glob("*") if file.is_file()))
        raise UserError(
            f"cannot load the {part.name} from {part} ({files}): {type(error).__name__}: {_first_line(error)}; fetch the "
            "checkpoint again"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _faults_as_lines(path: str) -> Iterator[None]:
    """What a library says of files that are not what they should be, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # two libraries raise many classes for a damaged file
        if is_out_of_memory(error):
            raise
        kind = "" if isinstance(error, OSError | SafetensorError | ValueError) else f"{type(error).__name__}: "
        raise UserError(f"cannot load {path!r}: {kind}{_first_line(error)}") from error


def _check_text_encoder(pipe: DiffusionPipeline) -> None:
    """transformers 5.0 to 5.2 leave the shared embedding uninitialised: text would be noise, without any error."""
    encoder = pipe.text_encoder
    if Version(transformers.__version__) < Version("5.3"):
        raise UserError(
            f"transformers {transformers.__version__} loads {type(encoder).__name__} wrongly; install transformers >= 5.3"
        )
    if encoder.get_input_embeddings().weight.data_ptr() != encoder.shared.weight.data_ptr():
        raise UserError("the text encoder's embedding is not the checkpoint's shared one; fetch the checkpoint again")
