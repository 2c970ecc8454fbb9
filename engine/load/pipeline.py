"""Load checkpoints in Diffusers layout; every fault of their files is a UserError of one line."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from packaging.version import Version
from safetensors import SafetensorError

from engine.adapters import ModelAdapter, VideoSpec
from engine.adapters.base import EXPERTS
from engine.config import ModelConfig
from engine.devices import pick_device, pick_dtype
from engine.errors import UserError, first_line, is_out_of_memory
from engine.load.checkpoint import Checkpoint, find_adapter, open_checkpoint
from engine.load.convolutions import use_onednn
from engine.load.experts import SIDES, check_sides
from engine.load.hub import quiet
from engine.load.loras import find_loras
from engine.load.quantised import check_storage, store
from engine.load.sharded_weights import check_placement
from engine.load.single_file import SingleFile, open_single_files
from engine.load.weights import WEIGHT_FOLDERS, check_part, lfs_pointer, read_config, unfinished
from engine.paths import failing_as, is_pickle
from engine.progress import no_library_bars

# The folder that belongs to the weights of a part, and the files of which a folder must have one.
_BESIDE = {"transformer": "scheduler", "text_encoder": "tokenizer", "image_encoder": "image_processor"}
_SMALL_FILES = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer.json", "spiece.model"),
    "image_processor": ("preprocessor_config.json",),
}


def load_pipeline(
    config: ModelConfig,
    *,
    with_text: bool = True,
    with_pictures: bool | None = None,
    text_device: str = "model",
    idle_stays: bool = True,
) -> DiffusionPipeline:
    """Load the pipeline to its device: transformers and text encoder in `config.dtype`, VAE in float32, LoRAs fused.

    An encoder of pictures, which encodes one or two for a video, stays on the CPU in float32. With `config.weights` zero3
    transformers and text encoder are left on the CPU, for `shard_pipeline` to take.

    Args:
        config: the checkpoint.
        with_text: whether the text encoder is loaded; ranks that receive embeddings do without it.
        with_pictures: whether the encoder of pictures is loaded, if the checkpoint has one; None as the text encoder.
        text_device: `model`, or `cpu` to keep the text encoder off the device.
        idle_stays: whether the second of two transformers goes to the device now, or waits on the CPU for its steps.

    Raises UserError for missing or broken files, for checkpoints of a model without an adapter, and for library versions
    that are known to load them wrongly.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    check_placement(config, device, text_device)
    check_storage(config)
    encoders = {"text_encoder": with_text, "image_encoder": with_text if with_pictures is None else with_pictures}
    checkpoint, single_files = fetch_parts(config, [part for part in WEIGHT_FOLDERS if encoders.get(part, True)])
    adapter, folder = checkpoint.adapter, checkpoint.folder
    with _faults_as_lines(config.path), no_library_bars():
        vae = load_vae(adapter, folder, single_files.get("vae"))
        given: dict[str, Any] = {"scheduler": _load_beside(adapter, folder, "scheduler")}
        given |= _load_beside_encoders(checkpoint, encoders)
        of_files = [part for part in checkpoint.experts if part in single_files]
        given |= {part: single_files[part].load(adapter, folder, part, dtype) for part in of_files}
        kind = adapter.pipeline_of(checkpoint.read("model_index.json"))
        pipe = kind.from_pretrained(folder, vae=vae, dtype=dtype, use_safetensors=True, **given)
    for lora in find_loras(config):
        lora.fuse(pipe, adapter, folder / lora.expert)
    for name in checkpoint.experts:
        store(getattr(pipe, name), config.storage, dtype)
    adapter.check_pipeline(pipe)
    with faults_of(folder / "scheduler"):
        adapter.try_scheduler(pipe.scheduler)
    if with_text:
        _check_text_encoder(pipe)
    pipe.set_progress_bar_config(disable=True)
    if config.weights == "cpu_offload":
        pipe.enable_model_cpu_offload(device=torch.device("cuda", torch.cuda.current_device()))
        return pipe
    # One by one, so that a text encoder for the CPU is never moved to the device.
    pipe.vae.to(device)
    if config.weights == "zero3":
        return pipe
    if config.weights == "block_offload":
        offload_blocks(pipe, checkpoint.experts, device=device, with_text=with_text and text_device == "model")
        return pipe
    for name in checkpoint.experts if idle_stays else EXPERTS[:1]:
        getattr(pipe, name).to(device)
    if with_text and text_device == "model":
        pipe.text_encoder.to(device)
    return pipe


def offload_blocks(pipe: DiffusionPipeline, experts: Sequence[str], *, device: torch.device, with_text: bool) -> None:
    """Keep the transformers' blocks on the CPU, and bring each to the device while it runs; `with_text` the text encoder's as well.

    On CUDA the next block of a transformer is copied on a stream of its own from pinned memory while one runs. What is outside the
    blocks, such as embeddings, comes for as long as the whole forward. Values stay as they are, and every rank does the same.
    """
    groups = {"onload_device": device, "offload_device": torch.device("cpu"), "offload_type": "block_level"}
    for name in experts:
        getattr(pipe, name).enable_group_offload(**groups, num_blocks_per_group=1, use_stream=device.type == "cuda")
    if with_text:  # once a prompt: not worth a pinned copy
        apply_group_offloading(pipe.text_encoder, **groups, num_blocks_per_group=1, block_modules=["encoder"])


def _load_beside_encoders(checkpoint: Checkpoint, loaded: Mapping[str, bool]) -> dict[str, Any]:
    """What stands beside the encoders, None for one that is not `loaded`; and the encoder of pictures, in float32."""
    adapter, folder, given = checkpoint.adapter, checkpoint.folder, {}
    for part in checkpoint.encoders:
        given[_BESIDE[part]] = _load_beside(adapter, folder, _BESIDE[part]) if loaded[part] else None
        given |= {} if loaded[part] else {part: None}
    if "image_encoder" in checkpoint.encoders and loaded["image_encoder"]:
        given["image_encoder"] = adapter.image_encoder_class.from_pretrained(
            folder / "image_encoder", dtype=torch.float32, use_safetensors=True
        )
    return given


def load_vae_alone(config: ModelConfig) -> tuple[VideoSpec, Any]:
    """Load the VAE in float32 on the CPU, with the checkpoint's numbers; no other weights are fetched, checked or read."""
    checkpoint, single_files = fetch_parts(config, ("vae",))
    with _faults_as_lines(config.path), no_library_bars():
        return checkpoint.vae_spec, load_vae(checkpoint.adapter, checkpoint.folder, single_files.get("vae"))


def fetch_parts(config: ModelConfig, parts: Sequence[str]) -> tuple[Checkpoint, dict[str, SingleFile]]:
    """Fetch and check the `parts` of a checkpoint, and the single files, by part, that replace some of them."""
    elsewhere: dict[str, SingleFile] = {}
    if config.single_files:
        small = open_checkpoint(config)
        check_sides(config, small.experts)
        elsewhere = open_single_files(config, small.adapter)
    checkpoint = open_checkpoint(config, [part for part in parts if part not in elsewhere])
    checkpoint.check_index()
    absent = {*EXPERTS} - {*checkpoint.experts} | ({"image_encoder"} - {*checkpoint.encoders})
    parts = [part for part in parts if part not in absent]
    check_folder(checkpoint.folder, parts, elsewhere=elsewhere)
    for part, single in elsewhere.items():
        single.check(checkpoint.adapter, checkpoint.folder, part)
    return checkpoint, elsewhere


def load_vae(adapter: ModelAdapter, folder: Path, single: SingleFile | None = None) -> Any:
    """Load the VAE in float32 on the CPU, from the single file that contains it if there is one."""
    if single is not None:
        vae = single.load(adapter, folder, "vae", torch.float32)
    else:
        vae = adapter.vae_class.from_pretrained(folder, subfolder="vae", dtype=torch.float32, use_safetensors=True)
    use_onednn(vae)
    return vae


def check_folder(folder: Path, parts: Sequence[str], *, elsewhere: Collection[str] = ()) -> None:
    """Raise UserError unless the folder holds a known model with complete `parts`: every file, and every tensor in its shape.

    For parts whose weights are `elsewhere` only the configurations are checked.
    """
    adapter = find_adapter(folder)
    for name in parts:
        if name not in elsewhere:
            check_files(folder, name, given=elsewhere)
            check_part(adapter, folder, name)
        check_small_files(folder, _BESIDE.get(name, name))


def check_small_files(folder: Path, part: str) -> None:
    """Raise UserError unless the folder of a part holds its configuration, or for a tokenizer its vocabulary.

    Without these files transformers builds a tokenizer without words, and every prompt would be ignored.
    """
    files = _SMALL_FILES.get(part, ("config.json",))
    with failing_as(f"cannot look for {folder / part / files[0]}"):
        is_here = any((folder / part / file).is_file() for file in files)
    if not is_here:
        raise UserError(f"{folder / part} has no {' or '.join(files)}; fetch the checkpoint again")
    for file in sorted((folder / part).glob("*.*")):
        if file.is_file() and (pointer := lfs_pointer(file)):
            raise UserError(pointer)


def load_tokenizer(config: ModelConfig) -> tuple[Checkpoint, Any]:
    """Load the tokenizer of a checkpoint; no weights are fetched or read."""
    checkpoint = open_checkpoint(config, ("tokenizer",))
    adapter, folder = checkpoint.adapter, checkpoint.folder
    check_small_files(folder, "tokenizer")
    with no_library_bars():
        return checkpoint, _load_beside(adapter, folder, "tokenizer")


def check_files(folder: Path, name: str, *, given: Collection[str] = ()) -> None:
    """Raise UserError unless a part has safetensors weights with all shards; `given` are parts that single files replace."""
    part = folder / name
    files = sorted(part.glob("*.safetensors"))
    begun = unfinished(folder, name)
    unfinished_note = f" ({', '.join(begun)} did not finish)" if begun else ""
    if not files:
        others = sorted(file.name for file in part.glob("*") if is_pickle(file.name))
        found = f"only {', '.join(others)}, which can run code and is not read" if others else "no weights"
        or_give = ""
        if name in EXPERTS and {*EXPERTS} & {*given}:
            or_give = (
                f", or add {next(side for side, expert in SIDES.items() if expert == name)}:FILE to model.single_file"
            )
        raise UserError(
            f"{part} has {found}{unfinished_note}; fetch the .safetensors files of this checkpoint{or_give}"
        )
    for shard_index in part.glob("*.safetensors.index.json"):
        weight_map = read_config(shard_index).get("weight_map")
        shards = (
            {name for name in weight_map.values() if isinstance(name, str)} if isinstance(weight_map, dict) else set()
        )
        missing = sorted(shards - {file.name for file in files})
        if missing:
            raise UserError(
                f"{part} lacks {', '.join(missing)} of {len(shards)} shards{unfinished_note}; finish the download"
            )


def _load_beside(adapter: ModelAdapter, folder: Path, name: str) -> Any:
    """Load the scheduler, the tokenizer or the processor of pictures alone, so that an error names the right one."""
    index = read_config(folder / "model_index.json")
    pictures = ("image_encoder", "image_processor") if adapter.sees_pictures(index) else ()
    every = {*adapter.experts_named(index), "vae", "text_encoder", "scheduler", "tokenizer", *pictures}
    with faults_of(folder / name), quiet("transformers"):  # which would rather have torchvision, to read pictures
        return getattr(adapter.pipeline_of(index).from_pretrained(folder, **dict.fromkeys(every - {name})), name)


@contextmanager
def faults_of(part: Path) -> Iterator[None]:
    """Turn any error about the small files of a folder into a UserError that names them."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except (ImportError, PermissionError) as error:  # not caused by the files, so fetching them again would not help
        raise UserError(f"cannot load the {part.name} from {part}: {first_line(error)}") from error
    except Exception as error:  # KeyError, TypeError, ..; tokenizers raises Exception itself
        files = ", ".join(sorted(file.name for file in part.glob("*") if file.is_file()))
        raise UserError(
            f"cannot load the {part.name} from {part} ({files}): {type(error).__name__}: {first_line(error)}; fetch the "
            "checkpoint again"
        ) from error


@contextmanager
def _faults_as_lines(path: str) -> Iterator[None]:
    """Turn a library's error about damaged files into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # two libraries raise many classes for a damaged file
        if is_out_of_memory(error):
            raise
        kind = "" if isinstance(error, OSError | SafetensorError | ValueError) else f"{type(error).__name__}: "
        raise UserError(f"cannot load {path!r}: {kind}{first_line(error)}") from error


def _check_text_encoder(pipe: DiffusionPipeline) -> None:
    """transformers 5.0 to 5.2 leave the shared embedding uninitialised: text would be noise, without any error."""
    encoder = pipe.text_encoder
    if Version(transformers.__version__) < Version("5.3"):
        raise UserError(
            f"transformers {transformers.__version__} loads {type(encoder).__name__} wrongly; install transformers >= 5.3"
        )
    if encoder.get_input_embeddings().weight.data_ptr() != encoder.shared.weight.data_ptr():
        raise UserError("the text encoder's embedding is not the checkpoint's shared one; fetch the checkpoint again")
