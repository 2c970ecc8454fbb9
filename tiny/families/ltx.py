"""LTX-Video in miniature."""

from typing import Any

from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from tiny.families.base import TEXT_DIM, TEXT_ENCODER, TEXT_LENGTH, Denoiser

LATENT_CHANNELS = 32
FRAME_RATE = 16
"""Frames per second: the rotary table counts time in seconds."""

SPATIAL_FACTOR, TEMPORAL_FACTOR = 8, 4


class LtxDenoiser(Denoiser):
    """Every latent pixel is a token, and cross-attention is told which tokens of a text are padding."""

    def __init__(self, vocab_size: int) -> None:
        transformer = LTXVideoTransformer3DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=4,
            attention_head_dim=48,
            cross_attention_dim=192,
            num_layers=5,
            caption_channels=TEXT_DIM,
        )
        super().__init__(transformer, T5EncoderModel(T5Config(vocab_size=vocab_size, **TEXT_ENCODER)))

    def encode_text(self, token_ids: Tensor, mask: Tensor, text_length: int) -> tuple[Tensor, Tensor]:
        """Token ids and mask [B, k] -> (states [B, text_length, TEXT_DIM], mask); the encoder sees the padding, as in LTXPipeline."""
        padding = (0, text_length - token_ids.shape[1])
        # The padding token of T5 is number 0.
        token_ids, mask = nn.functional.pad(token_ids, padding), nn.functional.pad(mask, padding)
        return self.text_encoder(token_ids).last_hidden_state, mask

    def forward(self, latent: Tensor, timestep: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """Noisy latents [B, z, F, h, w], timesteps [B] or [B, F] in 0..1000, text and mask -> velocity [B, z, F, h, w]."""
        states, mask = text
        frames, height, width = latent.shape[2:]
        velocity = self.transformer(
            hidden_states=latent.flatten(2).transpose(1, 2),
            encoder_hidden_states=states,
            timestep=timestep if timestep.ndim == 1 else timestep.repeat_interleave(height * width, dim=1),
            encoder_attention_mask=mask,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(TEMPORAL_FACTOR / FRAME_RATE, SPATIAL_FACTOR, SPATIAL_FACTOR),
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).unflatten(2, (frames, height, width))


class Ltx:
    """`LTXPipeline` with 64 tokens of one latent each per frame."""

    title = "LTX-Video"
    pipeline = LTXPipeline
    classes = ("LTXPipeline", "LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo", "T5EncoderModel")
    pipeline_text_length = 128
    latent_grid = (8, 8)
    encoder_parts = ("encoder",)
    picture_pipeline = LTXImageToVideoPipeline

    def build_vae(self, mean: Tensor | None = None, std: Tensor | None = None) -> AutoencoderKLLTXVideo:
        """A video autoencoder: [B, 3, 1 + 4 f, 8 h, 8 w] in -1..1 <-> [B, LATENT_CHANNELS, 1 + f, h, w]."""
        vae = AutoencoderKLLTXVideo(
            latent_channels=LATENT_CHANNELS,
            block_out_channels=(32, 48, 48),
            down_block_types=("LTXVideoDownBlock3D",) * 3,
            decoder_block_out_channels=(48, 48, 48),
            layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False),
            decoder_spatio_temporal_scaling=(True, True, False),
            decoder_inject_noise=(False,) * 4,
            downsample_type=("conv",) * 3,
            upsample_residual=(False,) * 3,
            upsample_factor=(1, 1, 1),
            patch_size=2,
        )
        if mean is not None and std is not None:
            vae.latents_mean.copy_(mean)
            vae.latents_std.copy_(std)
        return vae

    def build_denoiser(self, vocab_size: int) -> LtxDenoiser:
        """About 3.4 M parameters; a layer has a third more of them than one of Wan, so there is one layer less."""
        return LtxDenoiser(vocab_size)

    def blocks(self, denoiser: Denoiser) -> nn.ModuleList:
        """The transformer's blocks."""
        return denoiser.transformer.transformer_blocks

    def build_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """That of LTX-Video 0.9, whose shift grows with the number of tokens."""
        return FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        )

    def sampling_arguments(self) -> dict[str, Any]:
        """The most frequent text length of the training, and its frame rate."""
        return {"max_sequence_length": TEXT_LENGTH, "frame_rate": FRAME_RATE}
