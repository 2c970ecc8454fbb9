"""Pipelines with random weights and every part real, small enough to make in a second: what engine tests run on."""

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

LETTERS = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
LETTERS += [(letter, -3.0) for letter in string.ascii_lowercase]


def random_wan(*, heads: int = 4, head_dim: int = 12, layers: int = 2, seed: int = 0) -> WanPipeline:
    """Wan2.1 classes with `heads` x `head_dim` channels; 4x spatial and temporal compression, 64 rotary positions."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )
    tokenizer = T5Tokenizer(vocab=LETTERS, extra_ids=0, model_max_length=64)
    text = UMT5EncoderModel(UMT5Config(vocab_size=len(LETTERS), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text.eval(),
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=scheduler,
    )
    # Random output heads are near zero at initialisation, and a test that compares zeros compares nothing.
    with torch.no_grad():
        transformer.proj_out.weight.mul_(8)
        transformer.scale_shift_table.mul_(4)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_wan22(*, boundary: float = 0.875, **sizes: int) -> WanPipeline:
    """Wan2.2 A14B's two transformers, with other weights, of the sizes of `random_wan`."""
    pipe = random_wan(**sizes)
    pipe.register_modules(transformer_2=random_wan(**{**sizes, "seed": 1}).transformer)
    pipe.register_to_config(boundary_ratio=boundary)
    return pipe


def random_ti2v(*, seed: int = 0, **sizes: int) -> WanPipeline:
    """Wan2.2 TI2V's timestep per token and residual VAE of 2 x 2 patches, on the transformer of `random_wan`; 8x spatial compression."""
    pipe = random_wan(seed=seed, **sizes)
    vae = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    ).eval()
    made = WanPipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder,
        transformer=pipe.transformer,
        vae=vae,
        scheduler=pipe.scheduler,
        expand_timesteps=True,
    )
    made.set_progress_bar_config(disable=True)
    return made


def random_i2v(kind: str = "i2v", **sizes: int) -> WanImageToVideoPipeline:
    """Wan2.1 I2V (`i2v`), FLF2V (`flf2v`) and Wan2.2 I2V A14B (`a14b`), of the sizes of `random_wan`, with a small CLIP of 5 tokens."""
    pipe = random_wan(**sizes) if kind != "a14b" else random_wan22(boundary=0.9, **sizes)
    sees = kind != "a14b"
    parts = {**pipe.components}
    for name in ("transformer", "transformer_2"):
        if parts.get(name) is None:
            continue
        torch.manual_seed(len(name))
        # without `_use_default_values`, whose names keep their defaults
        config = {key: value for key, value in parts[name].config.items() if key[0] != "_"} | {"in_channels": 12}
        if sees:
            config |= {
                "image_dim": 8,
                "added_kv_proj_dim": config["num_attention_heads"] * config["attention_head_dim"],
            }
        config |= {"pos_embed_seq_len": 10} if kind == "flf2v" else {}
        parts[name] = WanTransformer3DModel.from_config(config).eval()
        with torch.no_grad():  # as in random_wan
            parts[name].proj_out.weight.mul_(8)
            parts[name].scale_shift_table.mul_(4)
            if kind == "flf2v":
                parts[name].condition_embedder.image_embedder.pos_embed.normal_()
    if sees:
        size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = CLIPVisionConfig(**size, image_size=28, patch_size=14)
        parts["image_encoder"] = CLIPVisionModel(config).eval()
        parts["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    made = WanImageToVideoPipeline(**parts, boundary_ratio=pipe.config.boundary_ratio)
    made.set_progress_bar_config(disable=True)
    return made


def save_random_wan(folder: Path, *, experts: int = 1) -> Path:
    """Write `random_wan`, or with two experts `random_wan22`, to a folder in Diffusers layout."""
    (random_wan() if experts == 1 else random_wan22()).save_pretrained(folder, safe_serialization=True)
    return folder


def random_ltx_vae(*, conditioned: bool = False, inject_noise: bool = False, seed: int = 0) -> AutoencoderKLLTXVideo:
    """16x spatial and 8x temporal compression; from 0.9.1 on conditioned on a timestep, 0.9.1 also draws noise inside."""
    torch.manual_seed(seed)
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(inject_noise,) * 5,
        timestep_conditioning=conditioned,
        patch_size=2,
        encoder_causal=True,
        decoder_causal=False,
    )
    with torch.no_grad():
        vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
        vae.latents_std.copy_(torch.tensor([1.5, 0.7, 1.0, 2.0]))
        for name, parameter in vae.named_parameters():
            if "per_channel_scale" in name:  # zero at initialisation, and noise times zero is no test
                parameter.fill_(0.3)
    return vae.eval()


def random_ltx_vae_095(*, seed: int = 0) -> AutoencoderKLLTXVideo:
    """As 0.9.5 and later: four kinds of downsampling, and the 2048 channels before its last layer by which diffusers tells its file."""
    torch.manual_seed(seed)
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 16, 32, 256, 2048),  # each at most 2, 4 or 8 times the one before
        decoder_block_out_channels=(8, 16, 32),
        down_block_types=("LTXVideo095DownBlock3D",) * 4,
        layers_per_block=(1, 1, 1, 1, 0),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, True),
        decoder_spatio_temporal_scaling=(True, True, True),
        decoder_inject_noise=(False,) * 4,
        downsample_type=("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        upsample_residual=(True,) * 3,
        upsample_factor=(2,) * 3,
        timestep_conditioning=True,
        patch_size=2,
        encoder_causal=True,
        decoder_causal=False,
        spatial_compression_ratio=16,
        temporal_compression_ratio=8,
    )
    with torch.no_grad():
        vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
        vae.latents_std.copy_(torch.tensor([1.5, 0.7, 1.0, 2.0]))
    return vae.eval()


def random_ltx(
    *,
    heads: int = 4,
    head_dim: int = 8,
    layers: int = 2,
    dynamic_shift: bool = True,
    shift_terminal: float | None = 0.1,
    seed: int = 0,
) -> LTXPipeline:
    """LTX-Video classes with `heads` x `head_dim` channels; the shift grows from 24 tokens (0.95) to 96 (2.05)."""
    torch.manual_seed(seed)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        cross_attention_dim=heads * head_dim,
        num_layers=layers,
        caption_channels=16,
    )
    tokenizer = T5Tokenizer(vocab=LETTERS, extra_ids=0, model_max_length=64)
    text = T5EncoderModel(T5Config(vocab_size=len(LETTERS), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=dynamic_shift,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=24,
        max_image_seq_len=96,
        shift_terminal=shift_terminal,
    )
    pipe = LTXPipeline(
        tokenizer=tokenizer,
        text_encoder=text.eval(),
        transformer=transformer.eval(),
        vae=random_ltx_vae(seed=seed),
        scheduler=scheduler,
    )
    with torch.no_grad():  # as in random_wan
        transformer.proj_out.weight.mul_(8)
        transformer.scale_shift_table.mul_(4)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_random_ltx(folder: Path, **settings: Any) -> Path:
    """Write `random_ltx` to a folder in Diffusers layout; `settings` are those of its VAE."""
    pipe = random_ltx()
    if settings:
        pipe.register_modules(vae=random_ltx_vae(**settings))
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder
