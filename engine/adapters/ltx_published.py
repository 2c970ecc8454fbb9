"""The published numbers of LTX-Video, for machines that cannot fetch a config.json.

Transformer, VAE and scheduler: as scripts/convert_ltx_to_diffusers.py of diffusers 0.42 writes them and
ltx_video/utils/diffusers_config_mapping.py of Lightricks/LTX-Video names them. Text encoder: config.json of
google/t5-v1_1-xxl. Keys that are left out have the value of the diffusers or transformers class.

The transformer of 2B is the same from 0.9.0 to 0.9.6, and 0.9.7 and 0.9.8 have one of 13B with the VAE of 0.9.5, dev and distilled; 0.9.1 has another decoder, 0.9.5 another encoder too and a fixed shift.
0.9.6 dev is published as a single file, whose parts are those of 0.9.5 (docs/models.md says how it is loaded).
"""

from typing import Any

SOURCE = (
    "published numbers (scripts/convert_ltx_to_diffusers.py of diffusers 0.42, ltx_video/utils/diffusers_config_mapping.py of "
    "Lightricks/LTX-Video, config.json of google/t5-v1_1-xxl)"
)

_CHECKPOINT: dict[str, dict[str, Any]] = {
    "model_index": {"_class_name": "LTXPipeline"},
    "transformer": {
        "in_channels": 128,
        "out_channels": 128,
        "patch_size": 1,
        "patch_size_t": 1,
        "num_attention_heads": 32,
        "attention_head_dim": 64,
        "cross_attention_dim": 2048,
        "num_layers": 28,
        "activation_fn": "gelu-approximate",
        "qk_norm": "rms_norm_across_heads",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": 4096,
        "attention_bias": True,
        "attention_out_bias": True,
    },
    "vae": {
        "latent_channels": 128,
        "block_out_channels": [128, 256, 512, 512],
        "decoder_block_out_channels": [128, 256, 512, 512],
        "layers_per_block": [4, 3, 3, 3, 4],
        "decoder_layers_per_block": [4, 3, 3, 3, 4],
        "spatio_temporal_scaling": [True, True, True, False],
        "decoder_spatio_temporal_scaling": [True, True, True, False],
        "decoder_inject_noise": [False, False, False, False, False],
        "timestep_conditioning": False,
        "patch_size": 4,
        "patch_size_t": 1,
        "encoder_causal": True,
        "decoder_causal": False,
    },
    "text_encoder": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "base_image_seq_len": 1024,
        "max_image_seq_len": 4096,
        "shift_terminal": 0.1,
    },
}

_VAE_091: dict[str, Any] = _CHECKPOINT["vae"] | {
    "decoder_block_out_channels": [256, 512, 1024],
    "decoder_layers_per_block": [5, 6, 7, 8],
    "decoder_spatio_temporal_scaling": [True, True, True],
    "decoder_inject_noise": [True, True, True, False],
    "upsample_residual": [True, True, True],
    "upsample_factor": [2, 2, 2],
    "timestep_conditioning": True,
}
_VAE_095: dict[str, Any] = _VAE_091 | {
    "block_out_channels": [128, 256, 512, 1024, 2048],
    "down_block_types": ["LTXVideo095DownBlock3D"] * 4,
    "layers_per_block": [4, 6, 6, 2, 2],
    "decoder_layers_per_block": [5, 5, 5, 5],
    "spatio_temporal_scaling": [True, True, True, True],
    "decoder_inject_noise": [False, False, False, False],
    "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
_FIXED_SHIFT = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
}

_13B = _CHECKPOINT | {
    "model_index": {"_class_name": "LTXConditionPipeline"},
    "transformer": _CHECKPOINT["transformer"]
    | {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
    "vae": _VAE_095,
    "scheduler": _FIXED_SHIFT,
}

PUBLISHED = {
    "Lightricks/LTX-Video": _CHECKPOINT,
    "diffusers/LTX-Video-0.9.1": _CHECKPOINT | {"vae": _VAE_091},
    "Lightricks/LTX-Video-0.9.5": _CHECKPOINT | {"vae": _VAE_095, "scheduler": _FIXED_SHIFT},
    **{f"Lightricks/LTX-Video-{version}": _13B for version in ("0.9.7-dev", "0.9.7-distilled", "0.9.8-13B-distilled")},
}
