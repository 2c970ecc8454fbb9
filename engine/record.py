"""The record of a run: a JSON file beside the video with its settings, machine, times and memory."""

import dataclasses
import functools
import importlib.metadata
import json
import platform
import re
import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import RunConfig
from engine.denoise.denoise import Denoised
from engine.files.whole import content_bytes, content_sha256, write_json
from engine.identity import settings_id
from engine.kernel_choice import KernelChoice, SolverChoice
from engine.paths import REPOSITORY, git_revision
from freespec.kernels import resolve_dual

PACKAGE = "freespec-engine"
_OTHERS = "diffusers transformers peft torchao gguf av flash-attn-3 sageattention xfuser".split()

# Settings in which a call may differ from the configuration; records and metadata have them once, by themselves.
_OF_A_CALL = ("seed", "negative_prompt")


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What a record says of the engine that made a video.

    Attributes:
        config: the configuration; a call may override parts of it.
        device: where the model was.
        attention: the dense kernel and why.
        eigensolver: what decomposes Gram matrices on a GPU; None on a CPU, where it is LAPACK.
        model: the loaded checkpoint, see `engine.load.provenance.describe_loaded`.
        parallel: how the ranks shared the video.
    """

    config: RunConfig
    device: torch.device
    attention: KernelChoice
    eigensolver: SolverChoice | None
    model: dict[str, Any]
    parallel: dict[str, Any]


def build_record(
    facts: EngineFacts, denoised: Denoised, *, seconds: dict[str, float], decode: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Build the record of a run whose latents exist; `decode` is the decode plan, None before decoding."""
    settings = denoised.settings
    config = json.loads(json.dumps(dataclasses.asdict(facts.config)))  # with lists for tuples, as the file has them
    config["video"]["num_frames"] = settings["num_frames"]
    config["sampler"] |= facts.config.sampler.cache_settings | {name: settings[name] for name in _OF_A_CALL}
    return {
        "prompt": settings["prompt"],
        "timeline": denoised.timeline,
        "given": denoised.given,
        "negative_prompt": settings["negative_prompt"],
        "seed": settings["seed"],
        "config": config,
        "identity": {"id": settings_id(settings), "settings": settings},
        "attention": dataclasses.asdict(facts.attention),
        "eigensolver": None if facts.eigensolver is None else dataclasses.asdict(facts.eigensolver),
        "dual": resolve_dual(config["attention"]["dual"]),
        "complement": config["attention"]["complement"],
        "far": config["attention"]["far"],
        "model": facts.model,
        "noise": dict(zip(("kind", "stride"), facts.config.noise, strict=True)),
        "latents": {"shape": list(denoised.latents.shape)},
        "seconds": seconds,
        "resumed_at": denoised.resumed_at,
        "schedule": denoised.schedule,
        "steps": denoised.steps,
        "peak_memory": peak_memory(facts.device),
        "parallel": facts.parallel,
        "decode": decode,
        "device": describe_device(facts.device),
        "versions": versions(),
        "git": running_revision(),
    }


def write_record(path: Path, record: dict[str, Any], *, replace: bool = True) -> None:
    """Write a record as JSON, atomically. A number that JSON cannot hold (nan, infinity) is a ValueError."""
    write_json(path, record, replace=replace)


def video_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """Select the metadata of a video file from the record of its run, which may be incomplete.

    Only facts that every run of the same settings shares, so that equal videos have equal bytes on any date and number of
    ranks. Of the model's path only the last name is kept.
    """
    config, settings = record["config"], _part(_part(record, "identity"), "settings")
    apart = ("prompt", "method", "sampler", *_OF_A_CALL)
    return {
        "prompt": record.get("prompt"),
        "negative_prompt": record.get("negative_prompt"),
        "seed": record["seed"],
        "model": Path(str(_part(config, "model").get("path"))).name,
        "method": _part(settings, "method") or _part(config, "method"),
        "settings": {
            "sampler": {key: value for key, value in _part(settings, "sampler").items() if key not in _OF_A_CALL},
            **{key: value for key, value in settings.items() if key not in apart},
            "fps": _part(config, "video").get("fps"),
            "decode": _part(config, "decode"),
            "crf": _part(config, "output").get("crf"),
        },
        "version": f"{PACKAGE} {_part(record, 'versions').get(PACKAGE)}",
    }


def _part(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping inside a record; empty if a record of another version lacks it."""
    part = tree.get(key)
    return part if isinstance(part, Mapping) else {}


def describe_video(path: Path, *, num_frames: int, fps: int) -> dict[str, Any]:
    """The part of a record about a finished video, a file or a folder of frames."""
    return {
        "file": path.name,
        "sha256": content_sha256(path),
        "bytes": content_bytes(path),
        "num_frames": num_frames,
        "fps": fps,
        "seconds": num_frames / fps,
    }


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak memory of this process, in bytes: resident on the host, and allocated by torch on a GPU."""
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


def describe_device(device: torch.device) -> dict[str, Any]:
    """Type and name of the device, torch's CPU threads, and environment settings that affect rounding.

    `cpu_capability` are the vector instructions (ATEN_CPU_CAPABILITY); `fp32_matmul` is `high` where products of fp32
    matrices may be computed in TF32 on a GPU (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE).
    """
    return {
        "type": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fp32_matmul": torch.get_float32_matmul_precision(),
    }


def _processor() -> str:
    """The CPU model from /proc/cpuinfo on Linux, where Python reports only the architecture."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that affect the result."""
    return {"python": platform.python_version(), "torch": torch.__version__} | versions_of((PACKAGE, *_OTHERS))


def versions_of(packages: Iterable[str]) -> dict[str, str | None]:
    """Versions of packages; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


@functools.cache
def running_revision() -> dict[str, Any] | None:
    """The revision of this code at the first call of this process, since commits made later are not what runs."""
    return git_revision(REPOSITORY)
