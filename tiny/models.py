"""The parts of the model, built with random weights: the classes of Wan2.1 at a hundredth of their size."""

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

LATENT_CHANNELS = 8
TEXT_DIM = 64
TEXT_LENGTH = 32
"""Tokens a prompt is padded to in training; the pipeline's default of 512 is trained as well, less often."""

NATIVE_FRAMES = 33


def build_vae(latents_mean: list[float] | None = None, latents_std: list[float] | None = None) -> AutoencoderKLWan:
    """A causal video autoencoder: [B, 3, 1 + 4 f, 4 h, 4 w] in -1..1 <-> [B, LATENT_CHANNELS, 1 + f, h, w]."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        latents_mean=latents_mean or [0.0] * LATENT_CHANNELS,
        latents_std=latents_std or [1.0] * LATENT_CHANNELS,
        # The class derives neither from the levels; WanPipeline would ask for a latent of the wrong size.
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    )
