"""Names of tensors as the models' authors publish them, from those of diffusers: the other way round than diffusers converts."""

import re

# Longest first where one begins with another.
_WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    # After norm2 and norm3 have changed places, which those of pictures have not.
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm3": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    ".add_k_proj.": ".k_img.",
    ".add_v_proj.": ".v_img.",
    ".norm_added_k.": ".norm_k_img.",
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_out.0.": ".o.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
}
_WAN_SWAP = {"norm2": "norm3", "norm3": "norm2"}
_LTX = {"proj_in.": "patchify_proj.", "time_embed.": "adaln_single.", ".norm_q.": ".q_norm.", ".norm_k.": ".k_norm."}
_LTX_ENCODER = {
    "0.9.0": [
        "0",
        "0.downsamplers.0",
        "0.conv_out",
        "1",
        "1.downsamplers.0",
        "1.conv_out",
        "2",
        "2.downsamplers.0",
        "3",
    ],
    "0.9.5": ["0", "0.downsamplers.0", "1", "1.downsamplers.0", "2", "2.downsamplers.0", "3", "3.downsamplers.0"],
}
_LTX_ENCODER["0.9.1"] = _LTX_ENCODER["0.9.0"]
_LTX_DECODER = {
    "0.9.0": ["0", "1.upsamplers.0", "1", "2.conv_in", "2.upsamplers.0", "2", "3.conv_in", "3.upsamplers.0", "3"],
    "0.9.1": ["0.upsamplers.0", "0", "1.upsamplers.0", "1", "2.upsamplers.0", "2", "3.upsamplers.0", "3"],
}
_LTX_DECODER["0.9.5"] = _LTX_DECODER["0.9.1"]
_LTX_VAE = {
    "resnets": "res_blocks",
    "conv_shortcut.conv": "conv_shortcut",
    "norm3": "norm3.norm",
    "latents_mean": "per_channel_statistics.mean-of-means",
    "latents_std": "per_channel_statistics.std-of-means",
}


def wan_transformer(key: str, prefix: str = "") -> str:
    """WanTransformer3DModel -> Wan-Video/Wan2.1."""
    key = re.sub("norm[23]", lambda match: _WAN_SWAP[match[0]], key)
    for name, original in _WAN.items():
        key = key.replace(name, original)
    key = {"scale_shift_table": "head.modulation"}.get(key, key.replace("scale_shift_table", "modulation"))
    return prefix + key.replace("proj_out", "head.head")


def ltx_transformer(key: str) -> str:
    """LTXVideoTransformer3DModel -> Lightricks/LTX-Video."""
    for name, original in _LTX.items():
        key = key.replace(name, original)
    return f"model.diffusion_model.{key}"


def ltx_vae(key: str, version: str) -> str:
    """AutoencoderKLLTXVideo -> Lightricks/LTX-Video; the order of blocks depends on the version."""
    blocks = {f"down_blocks.{name}.": f"down_blocks.{n}." for n, name in enumerate(_LTX_ENCODER[version])}
    blocks["encoder.mid_block."] = f"encoder.down_blocks.{len(_LTX_ENCODER[version])}."
    blocks |= {f"up_blocks.{name}.": f"up_blocks.{n + 1}." for n, name in enumerate(_LTX_DECODER[version])}
    blocks["decoder.mid_block."] = "decoder.up_blocks.0."
    for name in sorted(blocks, key=len, reverse=True):
        if name in key:
            key = key.replace(name, blocks[name])
            break
    for name, original in _LTX_VAE.items():
        key = key.replace(name, original)
    # Of the whole decoder, not of its blocks.
    key = re.sub(r"^decoder\.time_embedder", "decoder.last_time_embedder", key)
    key = re.sub(r"^decoder\.scale_shift_table", "decoder.last_scale_shift_table", key)
    return f"vae.{key}"
