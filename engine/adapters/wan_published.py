"""The published numbers of Wan2.1 and Wan2.2 checkpoints, for machines that cannot fetch a config.json.

Transformer, VAE and scheduler: scripts/convert_wan_to_diffusers.py of diffusers 0.42, which made these checkpoints. Text
encoder: config.json of google/umt5-xxl. Encoder of pictures: the image_encoder/config.json of Wan2.1 I2V. Keys that are left out have the value of the diffusers or transformers class.
"""

from typing import Any

SOURCE = (
    "published numbers (scripts/convert_wan_to_diffusers.py of diffusers 0.42, config.json of google/umt5-xxl, for Wan2.2 "
    "wan/configs of its authors)"
)

_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "num_train_timesteps": 1000,
    "flow_shift": 3.0,
}
_TEXT_ENCODER = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}


_VAE = {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
# Mean and deviation of the latents do not matter to a plan.
_VAE_22: dict[str, Any] = _VAE | {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}


_PICTURES = {"image_dim": 1280, "added_kv_proj_dim": 5120}
_IMAGE_ENCODER = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "projection_dim": 1024,
}
_SEES: dict[str, Any] = {
    "_class_name": "WanImageToVideoPipeline",
    "image_encoder": ["transformers", "CLIPVisionModel"],
    "image_processor": ["transformers", "CLIPImageProcessor"],
}


def _checkpoint(
    *,
    heads: int,
    layers: int,
    ffn_dim: int,
    channels: int = 16,
    transformer: dict[str, Any] | None = None,
    flow_shift: float = 3.0,
    **index: Any,
) -> dict[str, dict[str, Any]]:
    pictures = {"image_encoder": _IMAGE_ENCODER} if index.get("image_encoder") else {}
    return {
        "model_index": {"_class_name": "WanPipeline", **index},
        "transformer": {
            "patch_size": [1, 2, 2],
            "num_attention_heads": heads,
            "attention_head_dim": 128,
            "in_channels": channels,
            "out_channels": channels,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": ffn_dim,
            "num_layers": layers,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
            **(transformer or {}),
        },
        "vae": _VAE if channels == _VAE["z_dim"] else _VAE_22,
        "text_encoder": _TEXT_ENCODER,
        "scheduler": _SCHEDULER | {"flow_shift": flow_shift},
        **pictures,
    }


PUBLISHED = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _checkpoint(heads=12, layers=30, ffn_dim=8960),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _checkpoint(heads=40, layers=40, ffn_dim=13824),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _checkpoint(
        heads=40,
        layers=40,
        ffn_dim=13824,
        boundary_ratio=0.875,
        transformer_2=["diffusers", "WanTransformer3DModel"],
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _checkpoint(
        heads=24, layers=30, ffn_dim=14336, channels=48, expand_timesteps=True
    ),
    **{
        f"Wan-AI/Wan2.1-I2V-14B-{size}-Diffusers": _checkpoint(
            heads=40, layers=40, ffn_dim=13824, transformer=_PICTURES | {"in_channels": 36}, **_SEES
        )
        for size in ("480P", "720P")
    },
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": _checkpoint(
        heads=40,
        layers=40,
        ffn_dim=13824,
        transformer=_PICTURES | {"in_channels": 36, "pos_embed_seq_len": 514},
        flow_shift=16.0,
        **_SEES,
    ),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _checkpoint(
        heads=40,
        layers=40,
        ffn_dim=13824,
        transformer={"in_channels": 36},
        _class_name="WanImageToVideoPipeline",
        boundary_ratio=0.9,
        transformer_2=["diffusers", "WanTransformer3DModel"],
    ),
}
