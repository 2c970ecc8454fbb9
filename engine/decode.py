"""Latents to frames, a latent frame at a time: the Wan VAE's causal cache driven from outside, equal to `vae.decode`."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor


@torch.no_grad()
def stream_decode(vae: AutoencoderKLWan, latents: Tensor) -> Iterator[Tensor]:
    """Frames [1, 3, t, H, W] in [-1, 1] of each latent frame of [1, z, F, h, w], in order: t = 1, then 4 and 4 again.

    The latents are the model's (normalised). Concatenated over time this is bit-equal to `vae.decode` of the whole, which
    also decodes frame by frame but keeps all; here memory is bounded by one latent frame and the cache.
    """
    cache = empty_cache(vae)
    for index, latent in enumerate(latent_frames(vae, latents)):
        yield decode_step(vae, latent, cache, first=index == 0).clamp(-1.0, 1.0)


def make_ready(vae: AutoencoderKLWan) -> None:
    """Under model offload, bring the VAE to its device, as `vae.decode` does before it starts; otherwise nothing."""
    if hasattr(vae, "_hf_hook"):
        vae._hf_hook.pre_forward(vae)


def latent_frames(vae: AutoencoderKLWan, latents: Tensor) -> Iterator[Tensor]:
    """Each latent frame [1, z, 1, h, w] of normalised [1, z, F, h, w] as the VAE made it, on its device and in its dtype."""
    make_ready(vae)  # first of all: it decides the device
    mean, std = (
        torch.tensor(values, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    for latent in latents.split(1, dim=2):
        yield latent.to(vae.device, vae.dtype) / (1.0 / std) + mean


def empty_cache(vae: AutoencoderKLWan) -> list[Any]:
    """A causal cache before its first latent frame: one entry per convolution of the decoder.

    It is the caller's. The VAE's own stays empty, so that a stream that is stopped leaves nothing behind.
    """
    vae.clear_cache()
    return list(vae._feat_map)


def decode_step(vae: AutoencoderKLWan, latent: Tensor, cache: list[Any], *, first: bool) -> Tensor:
    """Frames [1, 3, t, H, W], not clamped, of the next latent frame [1, z, 1, h, w]; the cache is moved on."""
    hidden = vae.post_quant_conv(latent)
    return vae.decoder(hidden, feat_cache=cache, feat_idx=[0], first_chunk=first)


def to_uint8(frames: Tensor) -> np.ndarray:
    """Frames [1, 3, t, H, W] in [-1, 1] as uint8 [t, H, W, 3], rounded to nearest."""
    scaled = (frames[0] / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
