"""Wan2.1 text-to-video inside diffusers: where its tokens are made, mixed and put together again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from engine.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class WanSpec:
    """The numbers of a checkpoint, from its config.json files alone: known before any weight is read.

    Attributes:
        channels: latent channels z.
        temporal_factor: video frames per latent frame.
        spatial_factor: pixels per latent row or column.
        patch: latent frames, rows and columns per token.
        max_positions: length of the rotary table of each axis.
    """

    channels: int
    temporal_factor: int
    spatial_factor: int
    patch: tuple[int, int, int]
    max_positions: int

    @classmethod
    def from_configs(cls, transformer: dict[str, Any], vae: dict[str, Any]) -> "WanSpec":
        """Read the two configurations; keys that a checkpoint leaves out have the value of the diffusers class."""
        return cls(
            channels=transformer.get("in_channels", 16),
            temporal_factor=vae.get("scale_factor_temporal", 4),
            spatial_factor=vae.get("scale_factor_spatial", 8),
            patch=tuple(transformer.get("patch_size", (1, 2, 2))),
            max_positions=transformer.get("rope_max_seq_len", 1024),
        )

    def check_video(self, num_frames: int, height: int, width: int) -> None:
        """Raise UserError for a length or size that this checkpoint cannot make."""
        step = self.temporal_factor
        if num_frames < 1 or (num_frames - 1) % step:
            below = max(num_frames - 1, 0) // step * step + 1
            raise UserError(
                f"video.num_frames must be {step}k + 1, got {num_frames}; the nearest are {below} and {below + step}"
            )
        for name, size, patch in (("height", height, self.patch[1]), ("width", width, self.patch[2])):
            # 16 is WanPipeline's own rule, whatever the compression of the VAE.
            multiple = math.lcm(16, self.spatial_factor * patch)
            if size < 1 or size % multiple:
                below = max(size // multiple, 1) * multiple
                raise UserError(
                    f"video.{name} must be a multiple of {multiple}, got {size}; "
                    f"the nearest are {below} and {below + multiple}"
                )
        sizes = zip(
            self.latent_shape(num_frames, height, width)[2:], self.patch, ("frames", "rows", "columns"), strict=True
        )
        for size, patch, name in sizes:
            if size // patch > self.max_positions:
                raise UserError(
                    f"{num_frames} frames of {height} x {width} are {size // patch} latent {name}, and the model's rotary "
                    f"table ends at {self.max_positions}; make at most {(self.max_positions - 1) * step + 1} frames"
                    if name == "frames"
                    else f"{height} x {width} pixels are {size // patch} token {name}, and the model's rotary table ends at "
                    f"{self.max_positions}; make the video smaller"
                )

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        """Shape [1, z, F, h, w] of the latents of one video."""
        frames = (num_frames - 1) // self.temporal_factor + 1
        return (1, self.channels, frames, height // self.spatial_factor, width // self.spatial_factor)


class WanAdapter:
    """WanTransformer3DModel: tokens are frame-major, and only `attn1` of each block mixes them."""

    @staticmethod
    def attention_modules(transformer: WanTransformer3DModel) -> list[nn.Module]:
        """The self-attention module of every block, first block first."""
        return [block.attn1 for block in transformer.blocks]

    @staticmethod
    def grid(transformer: WanTransformer3DModel, latents: Tensor) -> tuple[int, int]:
        """Latent frames F and tokens per frame H * W of the latents [B, z, F, h, w] that the forward was called with."""
        patch = transformer.config.patch_size
        frames, height, width = (size // step for size, step in zip(latents.shape[2:], patch, strict=True))
        return frames, height * width

    @staticmethod
    def shard_points(transformer: WanTransformer3DModel) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Where tokens are shared out and put together: patch embedding, rotary table, output projection.

        Between the first and the last everything but attn1 works on each token by itself.
        """
        return transformer.patch_embedding, transformer.rope, transformer.proj_out

    @staticmethod
    def shard_embedding(embedded: Tensor, start: int, length: int) -> Tensor:
        """A rank's tokens of the embedded video: [B, C, F, H, W] -> [B, C, s, 1, 1], which the model flattens to [B, s, C]."""
        return embedded.flatten(2).narrow(2, start, length)[..., None, None]

    @staticmethod
    def shard_rotary(tables: tuple[Tensor, Tensor], start: int, length: int) -> tuple[Tensor, Tensor]:
        """A rank's rows of the rotary tables: each [1, S, 1, D] -> [1, s, 1, D]."""
        cos, sin = tables
        return cos.narrow(1, start, length), sin.narrow(1, start, length)

    @staticmethod
    def qkv(attn: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Projected, normalised and rotated q, k, v [B, s, N, D] from hidden states [B, s, C], as the stock processor."""
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden), attn.to_k(hidden), attn.to_v(hidden)
        # The norms run over all heads jointly, hence before the split.
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        return _rotate(q, *rotary), _rotate(k, *rotary), v

    @staticmethod
    def project_out(attn: nn.Module, out: Tensor) -> Tensor:
        """Output projection of [B, s, N, D] to [B, s, C]."""
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))

    @staticmethod
    def check_pipeline(pipe: WanPipeline) -> None:
        """Raise UserError for pipelines of this class that would run and give a wrong video."""
        if not isinstance(pipe, WanPipeline):
            raise UserError(f"{type(pipe).__name__} is not supported; use a WanPipeline (Wan2.1 text-to-video)")
        config = pipe.transformer.config
        if config.added_kv_proj_dim is not None or config.image_dim is not None:
            raise UserError("this is an image-to-video checkpoint; use a text-to-video one")
        if getattr(pipe.config, "expand_timesteps", False):
            raise UserError("this checkpoint uses a timestep per token (Wan2.2 TI2V); use a Wan2.1 text-to-video one")
        if pipe.config.boundary_ratio is not None:
            found = "no" if pipe.transformer_2 is None else "a"
            raise UserError(
                f"model_index.json sets boundary_ratio {pipe.config.boundary_ratio} and there is {found} second "
                "transformer; Wan2.1 has one transformer and no boundary_ratio: remove that key"
            )

    @staticmethod
    def encode_text(pipe: WanPipeline, prompts: Sequence[str], max_tokens: int, device: torch.device) -> list[Tensor]:
        """Text embeddings [1, K, C] of each prompt in the transformer's dtype; UserError for one that would be cut."""
        for prompt in prompts:
            length = len(pipe.tokenizer(prompt).input_ids)
            if length > max_tokens:
                raise UserError(
                    f"a prompt has {length} tokens, and sampler.max_text_tokens is {max_tokens}; shorten it or raise the "
                    f"setting: {prompt[:60]!r}"
                )
        embeds = []
        for prompt in prompts:
            embed, _ = pipe.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=max_tokens, device=device
            )
            embeds.append(embed.to(pipe.transformer.dtype))
        return embeds

    @staticmethod
    def predict(pipe: WanPipeline, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """One forward of the transformer: velocity [B, z, F, h, w] from fp32 latents of that shape."""
        return pipe.transformer(
            hidden_states=latents.to(pipe.transformer.dtype),
            timestep=timestep.expand(latents.shape[0]),
            encoder_hidden_states=text,
            return_dict=False,
        )[0]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs, x [B, s, N, D], cos and sin [1, s, 1, D] with every value twice."""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out
