"""A WanPipeline with random weights and every part real, small enough to make in a second: what engine tests run on."""

import string
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel


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
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters += [(letter, -3.0) for letter in string.ascii_lowercase]
    tokenizer = T5Tokenizer(vocab=letters, extra_ids=0, model_max_length=64)
    text = UMT5EncoderModel(UMT5Config(vocab_size=len(letters), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
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


def save_random_wan(folder: Path) -> Path:
    """Write `random_wan` to a folder in Diffusers layout."""
    random_wan().save_pretrained(folder, safe_serialization=True)
    return folder
