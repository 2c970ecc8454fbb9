"""Predict GPU-hours and bytes of a batch before anything is loaded."""

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.batch.files import SIDECAR, BatchFiles
from engine.batch.items import Item
from engine.batch.variants import Variant
from engine.config import RunConfig
from engine.devices import pick_dtype
from engine.errors import UserError
from engine.files.checks import least_video_bytes, snapshot_bytes
from engine.files.trees import DamagedError, read_tree
from engine.given.frames import GivenFrames
from engine.load.checkpoint import open_checkpoint
from engine.planner.arrange import Arrangement, arrange_ranks, choose_degrees
from engine.planner.choose import choose
from engine.planner.gpu import read_gpu
from engine.planner.model import read_model
from engine.planner.plan import Case, Options
from engine.text.cache import cache_key, cached_name

# H.264 at the default quality: an assumption, replaced by the mean of the folder's own videos once there are any.
ASSUMED_BITS_PER_PIXEL = 0.15


@dataclass(frozen=True, kw_only=True)
class DiskForecast:
    """Bytes that a batch needs, and that are free.

    Attributes:
        videos: remaining videos, with sidecars and kept latents.
        texts: prompt embeddings that are not cached yet.
        work: snapshots of the items in progress.
        free: free bytes on the output folder's disk.
        least: lower bound of the bytes of the items in progress.
        how: source of the size of a video.
    """

    videos: int
    texts: int
    work: int
    free: int
    least: int
    how: str

    @property
    def needed(self) -> int:
        """All of it."""
        return self.videos + self.texts + self.work


def disk_forecast(
    files: BatchFiles, config: RunConfig, left: Sequence[Item], *, replicas: int, keep_latents: bool
) -> DiskForecast:
    """Forecast the bytes of the remaining items in a batch's folder.

    `config.model.device` is a name; the driver need not have the device.
    """
    video, sidecars = config.video, sorted(files.sidecars())[:100]
    # On a disk that is nearly full the sidecars of small videos count too.
    sizes = [tree["output"]["bytes"] + path.stat().st_size for path in sidecars if (tree := _sidecar(path))]
    if sizes:
        each, how = sum(sizes) / len(sizes), f"the mean of {len(sizes)} videos in the folder"
    else:
        each = ASSUMED_BITS_PER_PIXEL / 8 * video.num_frames * video.height * video.width
        how = f"assumed {ASSUMED_BITS_PER_PIXEL} bits per pixel"
    checkpoint = open_checkpoint(config.model)
    folder, spec = checkpoint.folder, checkpoint.spec
    encoder = read_tree(folder / "text_encoder/config.json", {"d_model": int}, what="a text encoder's configuration")
    if encoder is None:
        raise UserError(f"{folder} has no text_encoder/config.json; fetch the checkpoint again")
    latents = 4 * math.prod(spec.latent_shape(video.num_frames, video.height, video.width))
    existing = next(path for path in (files.root, *files.root.resolve().parents) if path.is_dir())
    kept, at_once = latents if keep_latents else 0, min(replicas, len(left))
    texts = _text_bytes(files, config, left, width=encoder["d_model"], checkpoint=checkpoint.digest)
    begun = sum(path.stat().st_size for path in (files.of(item).snapshot for item in left) if path.exists())
    work = 2 * snapshot_bytes(folder, latents) * at_once  # one is written beside the one before
    each_least = kept + least_video_bytes(video.num_frames, video.height, video.width)
    return DiskForecast(
        videos=round((each + kept) * len(left)),
        texts=texts,
        work=work,
        free=shutil.disk_usage(existing).free,
        least=each_least * at_once + max(0, work - begun),
        how=how,
    )


def _text_bytes(files: BatchFiles, config: RunConfig, left: Sequence[Item], *, width: int, checkpoint: str) -> int:
    """Bytes of [max_text_tokens, width] for every prompt, and the negative one, that is not cached yet."""
    if not left:
        return 0
    prompts = {item.prompt.text for item in left}
    if config.sampler.guidance_scale > 1.0:
        prompts.add(config.sampler.negative_prompt)
    device, tokens = torch.device(config.model.device), config.sampler.max_text_tokens
    dtype = pick_dtype(config.model.dtype, device)
    encoder = "cpu" if config.parallel.text_device == "cpu" else device.type
    key = cache_key(checkpoint=checkpoint, dtype=str(dtype), max_text_tokens=tokens, device=encoder)
    missing = [prompt for prompt in prompts if not (files.text_cache / cached_name(key, prompt)).is_file()]
    return len(missing) * tokens * width * dtype.itemsize


def gpu_hours(
    config: RunConfig,
    variants: Sequence[Variant],
    items: Sequence[Item],
    *,
    gpu: str | None,
    ranks: int,
    given: GivenFrames | None = None,
) -> tuple[float | None, str]:
    """Predict the GPU-hours of all items, with the source; or None and why: no GPU is named, or the kernel's rate is missing.

    Raises UserError for a plan that does not fit the GPU.
    """
    if gpu is None:
        return None, "not known: give the GPU's name in configs/gpus as --gpu"
    spec, described = read_model(config.model), read_gpu(gpu)
    counts = Counter(item.variant for item in items)
    left = [variant for variant in variants if counts[variant.label]]
    missing = Options.of(config).missing_rate(described)
    if missing is not None:
        parallel = replace(config.parallel, plan="auto")  # `manual` would not ask for the memory
        for variant in left:
            # Raises, as `choose` does.
            choose_degrees(replace(variant.config, parallel=parallel), spec, ranks, described, given=given)
        return None, f"not known: {missing}"
    seconds = 0.0
    for variant in left:
        case = Case.of(variant.config, spec, gpu=described, world_size=ranks, given=given)
        plan = choose(case, (config.parallel.cfg, config.parallel.ring, config.parallel.ulysses))
        seconds += counts[variant.label] * (
            plan.run_seconds[variant.method] + plan.encode_seconds + plan.decode_seconds
        )
    return seconds * ranks / 3600, f"predicted for {described.name} from datasheets, text encoding and loading aside"


def arrange_replica(
    variants: Sequence[Variant],
    ranks: int,
    device: torch.device,
    *,
    gpu: str | None,
    nodes: Sequence[str] | None = None,
    given: GivenFrames | None = None,
) -> Arrangement:
    """Arrange the ranks of every replica; one arrangement serves all variants, since a replica makes any item.

    `gpu` names the replicas' GPUs, which the driver need not have; `nodes` is the node of each rank, if known before they
    are placed.

    Raises UserError if the variants want different ones.
    """
    described = read_gpu(gpu) if gpu is not None and device.type == "cuda" else None
    found = {
        each.label: arrange_ranks(each.config, ranks, device, described, nodes=nodes, given=given) for each in variants
    }
    if len({arrangement.degrees for arrangement in found.values()}) > 1:
        wishes = "; ".join(f"{name}: {' x '.join(map(str, found[name].degrees))}" for name in found)
        raise UserError(
            f"the methods want {ranks} ranks arranged differently (cfg x ring x ulysses: {wishes}); set --parallel.cfg, "
            "--parallel.ring and --parallel.ulysses, or run the methods one by one"
        )
    return found[variants[0].label]


def _sidecar(path: Path) -> dict[str, Any] | None:
    """Read a sidecar; None if it is damaged, which the manifest reports."""
    try:
        return read_tree(path, SIDECAR, what="the sidecar of a video")
    except DamagedError:
        return None
