"""Stage 2: clips of the world, encoded once, so that the transformer never waits for the renderer or the autoencoder."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from tiny.families import Family
from tiny.families.base import NATIVE_FRAMES
from tiny.state import load_average, numpy_rng
from tiny.train_vae import to_video
from tiny.world import Scene, render, sample_scene

SEED = 2


def training_scene(index: int) -> Scene:
    """The scene of the cached clip number `index`."""
    return sample_scene(numpy_rng(SEED, index))


def trained_vae(family: Family, work: Path, device: torch.device) -> nn.Module:
    """The autoencoder with the averaged weights of stage 1, frozen."""
    vae = family.build_vae()
    load_average(vae, work / "vae.safetensors")
    return vae.to(device).eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: nn.Module, video: Tensor) -> Tensor:
    """Mean latents of a video [B, 3, F, H, W] in -1..1: float16 [B, z, 1 + (F - 1) / 4, h, w], on the CPU."""
    with torch.autocast(video.device.type, torch.bfloat16):
        return vae.encode(video).latent_dist.mean.half().cpu()


def cache_latents(family: Family, work: Path, *, num_clips: int, clips_per_file: int, device: torch.device) -> None:
    """Encode `num_clips` scenes into `work/latents-*.safetensors`; files that exist are kept."""
    vae = trained_vae(family, work, device)
    for start in tqdm(range(0, num_clips, clips_per_file), desc="latents"):
        path = work / f"latents-{start:06d}.safetensors"
        if path.exists():
            continue
        indices = range(start, min(start + clips_per_file, num_clips))
        groups = [indices[first : first + 8] for first in range(0, len(indices), 8)]
        videos = (to_video([render(training_scene(index), NATIVE_FRAMES) for index in group]) for group in groups)
        latents = torch.cat([encode(vae, video.to(device)) for video in videos])
        part = path.with_suffix(".part")
        save_file({"latents": latents}, part)
        part.replace(path)


def load_latents(work: Path) -> tuple[Tensor, Tensor, Tensor]:
    """(latents [N, z, F, h, w] float16 as the encoder gave them, mean [z], standard deviation [z])."""
    latents = torch.cat([load_file(path)["latents"] for path in sorted(work.glob("latents-*.safetensors"))])
    sample = latents[:512].float()
    return latents, sample.mean(dim=(0, 2, 3, 4)), sample.std(dim=(0, 2, 3, 4))
