"""Wan2.1 and Wan2.2 inside diffusers: where its tokens are made, mixed and put together again."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from engine.adapters.base import (
    EXPERTS,
    Condition,
    DecodeMode,
    LatentDecoder,
    ModelAdapter,
    Text,
    TimeSettings,
    VideoSpec,
    as_frames,
    half_of_two,
)
from engine.config import DecodeConfig
from engine.errors import UserError, as_user_error
from engine.schedulers import TRAINED_TIMESTEPS, fixed_shift

_WITH_PICTURES = "WanImageToVideoPipeline"
_TEXT_TOKENS = 512


class WanAdapter(ModelAdapter):
    """WanPipeline: tokens are frame-major, the passes of guidance are two forwards, the VAE is causal in time."""

    name = "Wan text-to-video"
    index_names = ("WanPipeline", "WanImageToVideoPipeline")
    pipeline_class = WanPipeline
    pipeline_classes = (WanPipeline, WanImageToVideoPipeline)
    transformer_class = WanTransformer3DModel
    vae_class = AutoencoderKLWan
    text_encoder_class = UMT5EncoderModel
    text_config_class = UMT5Config
    image_encoder_class = CLIPVisionModel
    text_arguments = ("prompt_embeds",)
    batches_guidance = False
    frame_rate_matters = False
    decode_modes = ("whole", "tiled")
    exact_decode_is_bounded = True
    counts_frames = True
    latent_tensors = 4  # they, two model outputs and the last sample of the multistep solver
    single_file_marks = MappingProxyType({"transformer": "head.modulation"})
    single_file_names = MappingProxyType({"img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"})  # of FLF2V

    def video_spec(
        self, transformer: dict[str, Any], vae: dict[str, Any], index: Mapping[str, Any] | None = None
    ) -> VideoSpec:
        """See the base class; ValueError for a transformer whose channels are not those of its pipeline."""
        pictures, needs = _pictures(transformer, vae, index or {})
        return VideoSpec(
            channels=transformer.get("out_channels", 16) or transformer.get("in_channels", 16),
            temporal_factor=vae.get("scale_factor_temporal", 4),
            spatial_factor=self.spatial_factor(vae),
            patch=tuple(transformer.get("patch_size", (1, 2, 2))),
            pipeline_multiple=16,
            max_positions=transformer.get("rope_max_seq_len", 1024),
            pictures=pictures,
            needs=needs,
        )

    def spatial_factor(self, vae: Mapping[str, Any]) -> int:
        """See the base class."""
        return vae.get("scale_factor_spatial", 8)

    def latent_channels(self, vae: Mapping[str, Any]) -> int:
        """See the base class."""
        return vae.get("z_dim", 16)

    def build(self, part: str, config: dict[str, Any]) -> Any:
        """See the base class; ValueError if the VAE's mean and deviation are not numbers for each latent channel."""
        if part == "image_encoder":
            return CLIPVisionModel(CLIPVisionConfig(**config))
        made = super().build(part, config)
        if part == "vae":
            _check_statistics(made.config)
        return made

    def check_index(self, index: Mapping[str, Any]) -> None:
        """One of two transformers, and a boundary that is none, are refused."""
        ratio = index.get("boundary_ratio")
        second = index.get("transformer_2") not in (None, [None, None], (None, None))
        if second and ratio is None:
            raise half_of_two("a transformer_2 and no boundary_ratio, without which transformer_2 is never used")
        if ratio is not None and index.get("expand_timesteps"):
            raise UserError(
                "this checkpoint has two transformers and a timestep per token, and no published one has both"
            )
        if ratio is not None and not second:
            raise half_of_two(f"boundary_ratio {ratio} and no transformer_2")
        if ratio is not None and not (isinstance(ratio, int | float) and 0 < ratio < 1):
            raise UserError(f"boundary_ratio must lie between 0 and 1, got {ratio!r:.40}")

    def check_pipeline(self, pipe: WanPipeline) -> None:
        """Also refuses a transformer of the other kind of pipeline, and two transformers that differ in their configurations."""
        now = {"transformer_2": None if getattr(pipe, "transformer_2", None) is None else "here"}
        self.check_index(dict(pipe.config) | now)
        configs = {name: _architecture(part.config) for name, part in self.experts(pipe).items()}
        first, *others = configs.values()
        # Without projections of their own, pictures' tokens are attended as text: a method leaves that to diffusers.
        added = first.get("added_kv_proj_dim") or first.get("image_dim")
        vae = {} if pipe.vae is None else pipe.vae.config  # a pipeline may have only what its steps need
        with as_user_error():
            self.video_spec(
                first | {"added_kv_proj_dim": added}, vae, {**pipe.config, "_class_name": _class_name(pipe)}
            )
        for other in others:
            unlike = sorted(key for key in first | other if first.get(key) != other.get(key))
            if unlike:
                differences = ", ".join(f"{key} ({first.get(key)} and {other.get(key)})" for key in unlike)
                raise UserError(f"transformer and transformer_2 differ in {differences}; load both from one checkpoint")

    def pipeline_of(self, index: Mapping[str, Any]) -> Any:
        """See the base class."""
        return WanImageToVideoPipeline if index.get("_class_name") == _WITH_PICTURES else WanPipeline

    def sees_pictures(self, index: Mapping[str, Any]) -> bool:
        """Those of Wan2.1 do; of Wan2.2 the entry is [null, null]."""
        return index.get("image_encoder") not in (None, [None, None], (None, None))

    def image_tokens(self, transformer: Mapping[str, Any], image_encoder: Mapping[str, Any] | None) -> int:
        """See the base class: those of one picture, or of two."""
        if transformer.get("image_dim") is None or image_encoder is None:
            return 0
        config = CLIPVisionConfig(**image_encoder)
        return (1 + (config.image_size // config.patch_size) ** 2) * (2 if transformer.get("pos_embed_seq_len") else 1)

    def text_tokens(self, transformer: Mapping[str, Any]) -> int | None:
        """A number in diffusers' WanAttnProcessor."""
        return None if transformer.get("image_dim") is None else _TEXT_TOKENS

    def stored_name(self, part: str, name: str) -> str:
        """transformers before 5 kept the tensors of a CLIPVisionModel inside a `vision_model`."""
        return name.removeprefix("vision_model.") if part == "image_encoder" else name

    def experts_named(self, index: Mapping[str, Any]) -> tuple[str, ...]:
        """Two if there is a boundary."""
        return EXPERTS if index.get("boundary_ratio") is not None else EXPERTS[:1]

    def expert_at(self, timestep: float, config: Mapping[str, Any]) -> str:
        """`transformer` from the boundary up, as the stock pipeline compares them: in fp32."""
        ratio = config.get("boundary_ratio")
        late = ratio is not None and np.float32(timestep) < np.float32(ratio * TRAINED_TIMESTEPS)
        return EXPERTS[bool(late)]

    def experts(self, pipe: WanPipeline) -> dict[str, Any]:
        """See the base class."""
        return {name: self._transformer(pipe, name) for name in self.experts_named(pipe.config)}

    def blocks(self, transformer: WanTransformer3DModel) -> nn.ModuleList:
        """See the base class."""
        return transformer.blocks

    def grid(self, transformer: WanTransformer3DModel, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """From the latents [B, z, F, h, w]."""
        patch, shape = transformer.config.patch_size, inputs["hidden_states"].shape[2:]
        frames, rows, columns = (size // step for size, step in zip(shape, patch, strict=True))
        return frames, rows, columns

    def shard_points(self, transformer: WanTransformer3DModel) -> tuple[nn.Module, nn.Module, nn.Module]:
        """See the base class."""
        return transformer.patch_embedding, transformer.rope, transformer.proj_out

    def shard_condition(self, transformer: WanTransformer3DModel) -> nn.Module:
        """See the base class; with one timestep for all tokens `shard_timesteps` changes nothing."""
        return transformer.condition_embedder

    def shard_timesteps(self, args: tuple, kwargs: dict, start: int, length: int) -> tuple[tuple, dict]:
        """Timesteps [B S] -> [B s], and their number of each video."""
        size = kwargs.get("timestep_seq_len")
        if size is None:
            return args, kwargs
        timesteps = args[0].unflatten(0, (-1, size)).narrow(1, start, length).flatten()
        return (timesteps, *args[1:]), kwargs | {"timestep_seq_len": length}

    def shard_embedding(self, embedded: Tensor, start: int, length: int) -> Tensor:
        """[B, C, F, H, W] -> [B, C, s, 1, 1], which the model flattens to [B, s, C]."""
        return embedded.flatten(2).narrow(2, start, length)[..., None, None]

    def shard_rotary(self, tables: tuple[Tensor, Tensor], start: int, length: int) -> tuple[Tensor, Tensor]:
        """Each [1, S, 1, D] -> [1, s, 1, D]."""
        cos, sin = tables
        return cos.narrow(1, start, length), sin.narrow(1, start, length)

    def temporal_frequencies(self, transformer: WanTransformer3DModel) -> list[tuple[float, slice]]:
        """Read off the model's table: the first columns are the temporal ones, every angle twice."""
        rope = transformer.rope
        angle = torch.atan2(rope.freqs_sin[1].double(), rope.freqs_cos[1].double())  # of frame 1, at most 1 radian
        return [(float(angle[at]), slice(at, at + 2)) for at in range(0, rope.t_dim, 2)]

    def qkv(
        self,
        attn: Any,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        on_value: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class; honours `fuse_qkv_projections`."""
        fused = attn.to_qkv(hidden).chunk(3, dim=-1) if attn.fused_projections else None
        v = (fused[2] if fused else attn.to_v(hidden)).unflatten(2, (attn.heads, -1))
        if on_value is not None:
            on_value(v)
        q, k = fused[:2] if fused else (attn.to_q(hidden), attn.to_k(hidden))
        # The norms run over all heads jointly, hence before the split.
        q, k = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k)))
        return _rotate(q, *rotary), _rotate(k, *rotary), v

    def check_texts(self, transformer: WanTransformer3DModel) -> None:
        """See the base class."""
        image_dim = transformer.config.image_dim
        if image_dim is not None and transformer.config.added_kv_proj_dim is None:
            raise UserError(
                f"a timeline cannot tell texts from pictures in this transformer, which has image_dim {image_dim} and no "
                "added_kv_proj_dim, and attends to both alike; leave the timeline out"
            )

    def added_kv(self, attn: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class; honours `fuse_qkv_projections`."""
        if attn.fused_projections:
            k, v = attn.to_added_kv(tokens).chunk(2, dim=-1)
        else:
            k, v = attn.add_k_proj(tokens), attn.add_v_proj(tokens)
        k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_added_k(k), v))
        return k, v

    def clean_prompt(self, prompt: str) -> str:
        """Fix broken characters, unescape HTML, and collapse spaces."""
        return prompt_clean(prompt)

    def encode_text(
        self, pipe: WanPipeline, prompts: Sequence[str], max_tokens: int, device: torch.device
    ) -> list[Text]:
        """Embeddings alone: the model sees zeros where a prompt is padded."""
        embeds: list[Text] = []
        for prompt in prompts:
            embed, _ = pipe.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=max_tokens, device=device
            )
            embeds.append((embed.to(pipe.transformer.dtype),))
        return embeds

    def empty_text(self, transformer: WanTransformer3DModel, max_tokens: int, device: torch.device) -> Text:
        """See the base class."""
        shape = (1, max_tokens, transformer.config.text_dim)
        return (torch.empty(shape, dtype=transformer.dtype, device=device),)

    def set_timesteps(
        self, scheduler: Any, num_steps: int, *, num_tokens: int, shift: str, device: torch.device | None
    ) -> dict[str, Any]:
        """The shift is a number of the scheduler, whatever the length."""
        scheduler.set_timesteps(num_steps, device=device)
        return {"shift": "fixed", "value": fixed_shift(scheduler)}

    def predict(
        self,
        pipe: WanPipeline,
        latents: Tensor,
        timestep: Tensor,
        texts: dict[str, Text],
        *,
        fps: int,
        expert: str = "transformer",
        condition: Condition | None = None,
    ) -> list[Tensor]:
        """See the base class; the frame rate is unused."""
        [(name, (embed,))] = texts.items()
        transformer, timestep = getattr(pipe, expert), timestep.expand(latents.shape[0])
        if pipe.config.get("expand_timesteps"):
            mask = torch.ones(latents.shape[2:], dtype=torch.float32, device=latents.device)[:, ::2, ::2]
            if condition is not None:
                mask[: condition.clean_frames] = 0
            timestep = (mask * timestep[0]).flatten()[None].expand(latents.shape[0], -1)
        condition = condition or Condition()
        if condition.channels is not None:
            latents = torch.cat([latents, condition.channels], dim=1)
        with transformer.cache_context(name):
            return [
                transformer(
                    hidden_states=latents.to(transformer.dtype),
                    timestep=timestep,
                    encoder_hidden_states=embed,
                    encoder_hidden_states_image=condition.tokens,
                    return_dict=False,
                )[0]
            ]

    def time_settings(
        self, vae: Mapping[str, Any], mode: DecodeMode, config: DecodeConfig, *, num_latents: int, seed: int
    ) -> TimeSettings:
        """One latent frame after the other is both exact and small, so there is nothing to choose."""
        return TimeSettings()

    def condition(self, pipe: Any, pictures: Mapping[str, np.ndarray], *, num_frames: int) -> Condition:
        """Of TI2V the first latent frame; of others a mask, the latents of a video that is gray between the pictures, and CLIP's tokens."""
        if pipe.config.get("expand_timesteps"):
            return Condition(latents=self.encode_pixels(pipe.vae, pictures["first"][None]))
        transformer, tokens = self.transformer_of(pipe), None
        if transformer.config.image_dim is not None:
            images = [Image.fromarray(pictures[place]) for place in ("first", "last") if place in pictures]
            tokens = pipe.encode_image(images, torch.device("cpu")).to(transformer.dtype)
        frames = {place: as_frames(pixels[None]) for place, pixels in pictures.items()}
        latents = self.encode_pictures(pipe.vae, frames, num_frames=num_frames).float()
        mask = latents.new_zeros(1, pipe.vae.config.scale_factor_temporal, *latents.shape[2:])
        mask[:, :, 0] = 1
        if "last" in pictures:
            mask[:, -1, -1] = 1
        return Condition(channels=torch.cat([mask, latents], dim=1), tokens=tokens)

    def encode_pictures(self, vae: AutoencoderKLWan, pictures: Mapping[str, Tensor], *, num_frames: int) -> Tensor:
        """`encode` of a video of the first picture, gray frames, and the last picture if there is one, four frames at a time."""
        step, size = vae.config.scale_factor_temporal, vae.config.patch_size
        placed = {place: frame.to(vae.device, vae.dtype) for place, frame in pictures.items()}
        gray = placed["first"].new_zeros(1, 3, step, *placed["first"].shape[3:])
        chunks = [placed["first"]] + [gray] * ((num_frames - 1) // step)
        if "last" in placed:
            chunks[-1] = torch.cat([gray[:, :, 1:], placed["last"]], dim=2)
        vae.clear_cache()
        state, parts = list(vae._enc_feat_map), []
        for chunk in chunks:
            patched = chunk if size is None else patchify(chunk, size)
            parts.append(vae.encoder(patched, feat_cache=state, feat_idx=[0]))
        return self._normalised(vae, DiagonalGaussianDistribution(vae.quant_conv(torch.cat(parts, dim=2))))

    def empty_condition(
        self, transformer: WanTransformer3DModel, shape: Sequence[int], image_tokens: int
    ) -> Condition | None:
        """See the base class."""
        config, meta = transformer.config, torch.device("meta")
        more = config.in_channels - config.out_channels
        if more == 0:
            return None
        num_pictures = 2 if config.pos_embed_seq_len else 1
        tokens = None
        if image_tokens:
            size = (num_pictures, image_tokens // num_pictures, config.image_dim)
            tokens = torch.empty(size, dtype=transformer.dtype, device=meta)
        return Condition(channels=torch.empty(1, more, *shape[2:], device=meta), tokens=tokens)

    def encode(self, vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
        """See the base class."""
        return self._normalised(vae, vae.encode(frames.to(vae.device, vae.dtype)).latent_dist)

    def _normalised(self, vae: AutoencoderKLWan, distribution: DiagonalGaussianDistribution) -> Tensor:
        """Its mode as latents; a product with 1 / deviation, as in the stock pipeline."""
        mean, std = self.latent_statistics(vae)
        return (distribution.mode() - mean) * (1.0 / std)

    def latent_statistics(self, vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
        """See the base class."""
        mean, std = (
            torch.tensor(values, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return mean, std

    def open_decoder(self, vae: AutoencoderKLWan, latents: Tensor, settings: TimeSettings) -> LatentDecoder:
        """See the base class."""
        return _CausalDecoder(vae, latents)


class _CausalDecoder(LatentDecoder):
    """The Wan VAE's causal cache driven from outside: a chunk is a latent frame, and the frames are those of `vae.decode`."""

    def __init__(self, vae: AutoencoderKLWan, latents: Tensor) -> None:
        self._vae = vae
        self._latents = latents
        self._mean, self._std = WAN.latent_statistics(vae)
        self.chunks = tuple((frame, frame + 1) for frame in range(latents.shape[2]))

    def latents(self, index: int) -> Tensor:
        """[1, z, 1, h, w]."""
        latent = self._latents[:, :, index : index + 1]
        return latent.to(self._vae.device, self._vae.dtype) / (1.0 / self._std) + self._mean

    def start(self) -> list[Any]:
        """One entry per convolution of the decoder.

        It belongs to the caller. The VAE's own cache stays empty, so that a stopped stream leaves no state.
        """
        self._vae.clear_cache()
        return list(self._vae._feat_map)

    def step(self, latents: Tensor, state: list[Any], *, index: int, tile: int) -> Tensor:
        """See the base class."""
        hidden = self._vae.post_quant_conv(latents)
        frames = self._vae.decoder(hidden, feat_cache=state, feat_idx=[0], first_chunk=index == 0)
        patch = self._vae.config.patch_size
        return frames if patch is None else unpatchify(frames, patch)

    def num_frames(self, index: int) -> int:
        """1, then 4 and 4 again."""
        return 1 if index == 0 else self._vae.config.scale_factor_temporal

    def join(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks are concatenated."""
        yield from pieces


def _pictures(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], index: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Where pictures are conditions, and those that are needed; ValueError for channels that are not those of the pipeline."""
    channels, out = transformer.get("in_channels", 16), transformer.get("out_channels", 16)
    more = 0 if out is None else channels - out
    if index.get("expand_timesteps") and more == 0:
        return ("first",), ()
    kind, image_dim, added = (
        index.get("_class_name", "WanPipeline"),
        *map(transformer.get, ("image_dim", "added_kv_proj_dim")),
    )
    takes = more != 0 or image_dim is not None or added is not None
    if takes != (kind == _WITH_PICTURES):
        task, other = ("an image-to-video", _WITH_PICTURES) if takes else ("a text-to-video", "WanPipeline")
        raise ValueError(
            f"this is {task} transformer, with {channels} channels of which it makes {out}, in a {kind}; load it as a {other}"
        )
    if not takes:
        return (), ()
    wanted = vae.get("scale_factor_temporal", 4) + vae.get("z_dim", 16)
    if more != wanted or (image_dim is None) != (added is None):
        raise ValueError(
            f"an image-to-video transformer has {out} + {wanted} channels, and both of image_dim and added_kv_proj_dim or none of them; "
            f"this one has in_channels {channels}, image_dim {image_dim} and added_kv_proj_dim {added}"
        )
    if image_dim is None:
        return ("first", "last"), ("first",)
    both = ("first", "last") if transformer.get("pos_embed_seq_len") else ("first",)
    return both, both


def _class_name(pipe: Any) -> str:
    """The name that a model_index.json has for the pipeline's class."""
    return _WITH_PICTURES if isinstance(pipe, WanImageToVideoPipeline) else "WanPipeline"


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a transformer without what says where it is from, and lists for tuples, as files have them."""
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}


def _check_statistics(vae: Mapping[str, Any]) -> None:
    """A single number would be taken for every channel without a word, and so would a deviation of 0."""
    for name, least in (("latents_mean", -math.inf), ("latents_std", 0.0)):
        values = vae[name]
        if not isinstance(values, list | tuple) or len(values) != vae["z_dim"]:
            found = len(values) if isinstance(values, list | tuple) else values
            raise ValueError(
                f"{name} must have one number for each of the {vae['z_dim']} channels of z_dim, got {found}"
            )
        for value in values:
            if not isinstance(value, int | float) or not least < value < math.inf:
                raise ValueError(f"{name} must be finite numbers{', more than 0' if least == 0 else ''}, got {value!r}")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs, x [B, s, N, D], cos and sin [1, s, 1, D] with every value twice."""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out


WAN = WanAdapter()
