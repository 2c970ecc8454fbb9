"""The parts of the model, built with random weights: the classes of Wan2.1 at a hundredth of their size."""

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor, nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from tiny.world import VOCABULARY

LATENT_CHANNELS = 8
TEXT_DIM = 64
TEXT_LENGTH = 32
"""Tokens a prompt is padded to in most training steps."""

PIPELINE_TEXT_LENGTH = 512
"""What a stock WanPipeline pads a prompt to; trained now and then, since cross-attention sees the padding."""

NATIVE_FRAMES = 33
FLOW_SHIFT = 3.0


def build_vae(latents_mean: list[float] | None = None, latents_std: list[float] | None = None) -> AutoencoderKLWan:
    """A causal video autoencoder: [B, 3, 1 + 4 f, 4 h, 4 w] in -1..1 <-> [B, LATENT_CHANNELS, 1 + f, h, w]."""
    vae = AutoencoderKLWan(
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
    _inflate(vae)
    return vae


@torch.no_grad()
def _inflate(vae: AutoencoderKLWan) -> None:
    """Makes a new autoencoder treat each frame as a still, and a latent frame as the mean of its frames.

    Stills train only the last tap over time of a causal kernel [out, in, 3, h, w] (the others see padding) and no convolution between frame
    rates. With random values there, clips would begin as noise, and colours would have to be learned a second time.
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


def build_transformer() -> WanTransformer3DModel:
    """The denoiser; its output layer starts at zero, so that training starts from "no motion of the sample"."""
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
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def build_tokenizer() -> T5Tokenizer:
    """A tokenizer of whole words; a word it does not know becomes `▁` and `<unk>`."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), (",", -2.0), (".", -2.0)]
    pieces += [(f"▁{word}", -2.0) for word in VOCABULARY]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=PIPELINE_TEXT_LENGTH)


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Two layers are enough for the grammar of the captions."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=TEXT_DIM,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def build_scheduler() -> UniPCMultistepScheduler:
    """The scheduler class of Wan2.1; the shift is the one that noise levels are drawn with in training."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
    )


class Denoiser(nn.Module):
    """Transformer and text encoder as one module, since they are trained together."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.transformer = build_transformer()
        self.text_encoder = build_text_encoder(vocab_size)

    def encode_text(self, token_ids: Tensor, mask: Tensor, text_length: int) -> Tensor:
        """Token ids and mask [B, k] -> [B, text_length, TEXT_DIM], padded with zeros as WanPipeline does."""
        states = self.text_encoder(token_ids, mask).last_hidden_state
        states = states * mask[..., None].to(states.dtype)
        return nn.functional.pad(states, (0, 0, 0, text_length - states.shape[1]))

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Noisy latents [B, z, F, h, w], timesteps [B] in 0..1000, text [B, K, TEXT_DIM] -> velocity [B, z, F, h, w]."""
        return self.transformer(latent, timestep, text, return_dict=False)[0]


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
