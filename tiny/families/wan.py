"""Wan2.1 in miniature."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from tiny.families.base import FLOW_SHIFT, TEXT_DIM, TEXT_ENCODER, TEXT_LENGTH, Denoiser

LATENT_CHANNELS = 8


class WanDenoiser(Denoiser):
    """Cross-attention sees the padding of a text, as zeros."""

    def __init__(self, vocab_size: int) -> None:
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=48,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=64,
            ffn_dim=640,
            num_layers=6,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=1024,
        )
        super().__init__(transformer, UMT5EncoderModel(UMT5Config(vocab_size=vocab_size, **TEXT_ENCODER)))

    def encode_text(self, token_ids: Tensor, mask: Tensor, text_length: int) -> Tensor:
        """Token ids and mask [B, k] -> [B, text_length, TEXT_DIM], padded with zeros as WanPipeline does."""
        states = self.text_encoder(token_ids, mask).last_hidden_state
        states = states * mask[..., None].to(states.dtype)
        return nn.functional.pad(states, (0, 0, 0, text_length - states.shape[1]))

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Noisy latents [B, z, F, h, w], timesteps [B] in 0..1000, text [B, K, TEXT_DIM] -> velocity [B, z, F, h, w]."""
        return self.transformer(latent, timestep, text, return_dict=False)[0]


class Wan:
    """`WanPipeline` with 64 tokens of 2 x 2 latents per frame."""

    title = "Wan2.1"
    pipeline = WanPipeline
    classes = ("WanPipeline", "WanTransformer3DModel", "AutoencoderKLWan", "UMT5EncoderModel")
    pipeline_text_length = 512
    latent_grid = (16, 16)
    encoder_parts = ("encoder", "quant_conv")
    picture_pipeline = None

    def build_vae(self, mean: Tensor | None = None, std: Tensor | None = None) -> AutoencoderKLWan:
        """A causal video autoencoder: [B, 3, 1 + 4 f, 4 h, 4 w] in -1..1 <-> [B, LATENT_CHANNELS, 1 + f, h, w]."""
        vae = AutoencoderKLWan(
            base_dim=16,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            attn_scales=[],
            temperal_downsample=[True, True],
            latents_mean=[0.0] * LATENT_CHANNELS if mean is None else [round(x, 4) for x in mean.tolist()],
            latents_std=[1.0] * LATENT_CHANNELS if std is None else [round(x, 4) for x in std.tolist()],
            # The class derives neither from the levels; WanPipeline would ask for a latent of the wrong size.
            scale_factor_spatial=4,
            scale_factor_temporal=4,
        )
        _inflate(vae)
        return vae

    def build_denoiser(self, vocab_size: int) -> WanDenoiser:
        """About 3.5 M parameters."""
        return WanDenoiser(vocab_size)

    def blocks(self, denoiser: Denoiser) -> nn.ModuleList:
        """The transformer's blocks."""
        return denoiser.transformer.blocks

    def build_scheduler(self) -> UniPCMultistepScheduler:
        """The class of Wan2.1's, with the shift of the noise levels in training."""
        return UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
        )

    def sampling_arguments(self) -> dict[str, Any]:
        """The most frequent text length of the training."""
        return {"max_sequence_length": TEXT_LENGTH}


@torch.no_grad()
def _inflate(vae: AutoencoderKLWan) -> None:
    """Make a new autoencoder treat each frame as a still, and a latent frame as the mean of its frames.

    Stills train only the last tap over time of a causal kernel [out, in, 3, h, w] (the others see padding) and no convolution between frame
    rates. With random values there, clips would start as noise, and colours would be learned twice.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv3d) or module.kernel_size[0] == 1:
            continue
        module.weight[:, :, :-1] = 0
        if name.endswith("time_conv"):
            identity = torch.eye(module.in_channels)[:, :, None, None]
            module.weight.zero_()
            module.bias.zero_()
            if module.stride[0] == 2:
                module.weight[:, :, 1:] = identity[:, :, None] / 2
            else:
                module.weight[:, :, -1] = torch.cat([identity, identity])
