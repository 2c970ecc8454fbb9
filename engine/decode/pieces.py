"""Decode latents chunk by chunk on one device: the loop around a model's `LatentDecoder`."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.adapters import adapter_of
from engine.adapters.base import LatentDecoder, TimeSettings


@torch.no_grad()
def stream_decode(vae: Any, latents: Tensor, settings: TimeSettings | None = None) -> Iterator[Tensor]:
    """Decode each chunk of latents [1, z, F, h, w] in order to frames [1, 3, t, H, W] in [-1, 1]; t depends on the chunk.

    The latents are the model's (normalised). For Wan a chunk is a latent frame, t = 1 and then 4 and 4 again, and all
    frames together are bit-equal to `vae.decode` of the whole. For LTX they are bit-equal to `vae.decode` with or without
    `use_framewise_decoding`, as the settings say. Memory is bounded by two chunks.
    """
    decoder = open_decoder(vae, latents, settings or TimeSettings())
    state = decoder.start()
    pieces = (decode_step(decoder, decoder.latents(index), state, index=index) for index in range(len(decoder.chunks)))
    yield from map(clamp, decoder.join(pieces))  # a loop would keep the frames before alive


def clamp(frames: Tensor) -> Tensor:
    """Clamp frames to [-1, 1]."""
    return frames.clamp(-1.0, 1.0)


def open_decoder(vae: Any, latents: Tensor, settings: TimeSettings) -> LatentDecoder:
    """Open a decode of latents [1, z, F, h, w] with the VAE on its device."""
    make_ready(vae)  # first, as it decides the device
    return adapter_of(vae).open_decoder(vae, latents, settings)


def make_ready(vae: Any) -> None:
    """Under model offload, bring the VAE to its device, as `vae.decode` does before it starts; otherwise nothing."""
    if hasattr(vae, "_hf_hook"):
        vae._hf_hook.pre_forward(vae)


def decode_step(decoder: LatentDecoder, latents: Tensor, state: Any, *, index: int, tile: int = 0) -> Tensor:
    """Decode a tile of chunk `index` to frames [1, 3, t, H, W], not clamped, and advance the tile's state."""
    return decoder.step(latents, state, index=index, tile=tile)


def to_uint8(frames: Tensor) -> np.ndarray:
    """Convert frames [1, 3, t, H, W] in [-1, 1] to uint8 [t, H, W, 3], rounded to nearest."""
    scaled = (frames[0] / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
