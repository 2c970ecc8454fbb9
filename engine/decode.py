"""Latents to frames, a latent frame at a time: the Wan VAE's causal cache driven from outside, equal to `vae.decode`."""

from collections.abc import Iterator

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
    mean, std = (
        torch.tensor(values, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    if hasattr(vae, "_hf_hook"):  # model offload: what `vae.decode` does before it starts
        vae._hf_hook.pre_forward(vae)
    vae.clear_cache()
    try:
        for index in range(latents.shape[2]):
            latent = latents[:, :, index : index + 1].to(vae.device, vae.dtype)
            hidden = vae.post_quant_conv(latent / (1.0 / std) + mean)
            vae._conv_idx = [0]
            frames = vae.decoder(
                hidden,
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                **({"first_chunk": True} if index == 0 else {}),
            )
            yield frames.clamp(-1.0, 1.0)
    finally:
        vae.clear_cache()


def to_uint8(frames: Tensor) -> np.ndarray:
    """Frames [1, 3, t, H, W] in [-1, 1] as uint8 [t, H, W, 3], rounded to nearest."""
    scaled = (frames[0] / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
