"""LTX-Video in diffusers: how tokens are embedded, mixed and gathered. Later checkpoints: `engine.adapters.ltx_condition`."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo, LTXImageToVideoPipeline, LTXPipeline, LTXVideoTransformer3DModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from engine.adapters.base import (
    Condition,
    DecodeMode,
    LatentDecoder,
    ModelAdapter,
    Text,
    TimeSettings,
    VideoSpec,
)
from engine.adapters.blend import cover, fade_in, lay_over, overlap_share
from engine.config import DecodeConfig
from engine.errors import UserError
from engine.schedulers import ADVICE, fixed_shift

# What LTXVideoTransformer3DModel and AutoencoderKLLTXVideo fix in code, or have as the default of a key.
SCALING = (True, True, True, False)


class LtxAdapter(ModelAdapter):
    """LTXPipeline: packed latents, rotary tables as wide as the model, both passes of guidance in one batch.

    The weights make videos of a first picture too: it is the first latent frame, with timestep 0, as in LTXImageToVideoPipeline. The VAE is
    not causal: the exact decode takes the whole video at once.
    """

    name = "LTX-Video text-to-video"
    index_names: ClassVar[tuple[str, ...]] = ("LTXPipeline",)
    pipeline_class: ClassVar[Any] = LTXPipeline
    pipeline_classes: ClassVar[tuple[Any, ...]] = (LTXPipeline, LTXImageToVideoPipeline)
    transformer_class = LTXVideoTransformer3DModel
    vae_class = AutoencoderKLLTXVideo
    text_encoder_class = T5EncoderModel
    text_config_class = T5Config
    text_arguments = ("prompt_embeds", "prompt_attention_mask")
    batches_guidance = True
    frame_rate_matters = True
    decode_modes = ("whole", "framewise", "tiled")
    exact_decode_is_bounded = False
    latent_tensors = 2  # before and after a step
    single_file_marks = MappingProxyType(
        {"transformer": "patchify_proj.weight", "vae": "vae.decoder.conv_in.conv.weight"}
    )

    def video_spec(
        self, transformer: dict[str, Any], vae: dict[str, Any], index: Mapping[str, Any] | None = None
    ) -> VideoSpec:
        """See the base class; rotary positions are computed, so no length is too long for a table."""
        patch, patch_t = transformer.get("patch_size", 1), transformer.get("patch_size_t", 1)
        return VideoSpec(
            channels=self.latent_channels(vae),
            temporal_factor=_compression(vae, "temporal", vae.get("patch_size_t", 1)),
            spatial_factor=self.spatial_factor(vae),
            patch=(patch_t, patch, patch),
            pipeline_multiple=32,
            cuts_time=True,
            pictures=("first",),
        )

    def spatial_factor(self, vae: Mapping[str, Any]) -> int:
        """See the base class."""
        return _compression(vae, "spatial", vae.get("patch_size", 4))

    def latent_channels(self, vae: Mapping[str, Any]) -> int:
        """See the base class."""
        return vae.get("latent_channels", 128)

    def check_pipeline(self, pipe: LTXPipeline) -> None:
        """Refuse patches that the stock pipeline would handle differently."""
        config = self.transformer_of(pipe).config
        patch = (config.patch_size_t, config.patch_size)
        if patch != (1, 1):
            raise UserError(
                f"the transformer has patches of {patch[0]} x {patch[1]}; LTX-Video has one latent per token"
            )

    def check_call(self, arguments: Mapping[str, Any]) -> None:
        """Refuse a picture beside latents, which LTXImageToVideoPipeline takes instead of it."""
        if arguments.get("image") is not None and arguments.get("latents") is not None:
            raise UserError(
                "LTXImageToVideoPipeline ignores image= beside latents=, and takes their first latent frame for that of the picture; leave "
                "latents= out, or image= if that frame holds the picture"
            )

    def blocks(self, transformer: LTXVideoTransformer3DModel) -> nn.ModuleList:
        """See the base class."""
        return transformer.transformer_blocks

    def grid(self, transformer: LTXVideoTransformer3DModel, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """See the base class; read from the arguments, since packed latents [B, S, z] do not show their sizes."""
        frames, rows, columns = (inputs.get(name) for name in ("num_frames", "height", "width"))
        if frames is None or rows is None or columns is None:
            raise UserError(
                "the transformer was called without num_frames, height and width; call it through LTXPipeline"
            )
        return frames, rows, columns

    def shard_points(self, transformer: LTXVideoTransformer3DModel) -> tuple[nn.Module, nn.Module, nn.Module]:
        """See the base class."""
        return transformer.proj_in, transformer.rope, transformer.proj_out

    def shard_condition(self, transformer: LTXVideoTransformer3DModel) -> nn.Module:
        """See the base class; with one timestep for all tokens `shard_timesteps` changes nothing."""
        return transformer.time_embed

    def shard_timesteps(self, args: tuple, kwargs: dict, start: int, length: int) -> tuple[tuple, dict]:
        """Timesteps [B S] -> [B s]."""
        timesteps = args[0].unflatten(0, (kwargs["batch_size"], -1))
        if timesteps.shape[1] == 1:
            return args, kwargs
        return (timesteps.narrow(1, start, length).flatten(), *args[1:]), kwargs

    def shard_embedding(self, embedded: Tensor, start: int, length: int) -> Tensor:
        """[B, S, C] -> [B, s, C]."""
        return embedded.narrow(1, start, length)

    def shard_rotary(self, tables: tuple[Tensor, Tensor], start: int, length: int) -> tuple[Tensor, Tensor]:
        """Each [B, S, C] -> [B, s, C], copied: the tables are as large as hidden states in fp32, and the whole can go."""
        cos, sin = tables
        if length == cos.shape[1]:
            return cos, sin
        return cos.narrow(1, start, length).clone(), sin.narrow(1, start, length).clone()

    def qkv(
        self,
        attn: Any,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        on_value: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class. Each head has its own frequencies, so the rotation comes before the split into heads."""
        v = attn.to_v(hidden).unflatten(2, (attn.heads, -1))
        if on_value is not None:
            on_value(v)
        q = _rotate(attn.norm_q(attn.to_q(hidden)), *rotary)
        k = _rotate(attn.norm_k(attn.to_k(hidden)), *rotary)
        q, k = (x.unflatten(2, (attn.heads, -1)) for x in (q, k))
        return q, k, v

    def encode_text(
        self, pipe: LTXPipeline, prompts: Sequence[str], max_tokens: int, device: torch.device
    ) -> list[Text]:
        """Embeddings, and a mask that hides the padding from cross-attention."""
        texts: list[Text] = []
        for prompt in prompts:
            embed, mask, _, _ = pipe.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=max_tokens, device=device
            )
            dtype = pipe.transformer.dtype
            texts.append((embed.to(dtype), mask.to(dtype)))
        return texts

    def empty_text(self, transformer: LTXVideoTransformer3DModel, max_tokens: int, device: torch.device) -> Text:
        """See the base class."""
        shape = (1, max_tokens, transformer.config.caption_channels)
        embed = torch.empty(shape, dtype=transformer.dtype, device=device)
        return embed, torch.empty(shape[:2], dtype=transformer.dtype, device=device)

    def set_timesteps(
        self, scheduler: Any, num_steps: int, *, num_tokens: int, shift: str, device: torch.device | None
    ) -> dict[str, Any]:
        """Set evenly spaced sigmas, shifted by exp(mu) with mu linear in the tokens (0.9.0, 0.9.1), or by a fixed number (later)."""
        config = scheduler.config
        if not {"sigmas", "mu"} <= inspect.signature(scheduler.set_timesteps).parameters.keys():
            raise UserError(
                f"LTX-Video gives its scheduler sigmas and their shift mu, which {type(scheduler).__name__} does not take; {ADVICE}"
            )
        if config.get("shift_terminal") and num_steps == 1:
            raise UserError(
                f"one step cannot end at the scheduler's shift_terminal {config.shift_terminal} and begin at 1; "
                "use sampler.num_steps 2 or more"
            )
        mu = shift_exponent(config, num_tokens)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu, device=device)
        if not config.get("use_dynamic_shifting"):
            return {"shift": "fixed", "value": fixed_shift(scheduler)}
        return {"shift": shift, "value": float(np.exp(mu)), "mu": mu, "tokens": num_tokens}

    def predict(
        self,
        pipe: LTXPipeline,
        latents: Tensor,
        timestep: Tensor,
        texts: dict[str, Text],
        *,
        fps: int,
        expert: str = "transformer",
        condition: Condition | None = None,
    ) -> list[Tensor]:
        """See the base class."""
        scale = (pipe.vae_temporal_compression_ratio / fps, *2 * (pipe.vae_spatial_compression_ratio,))
        given = 0 if condition is None else condition.clean_frames
        clean = [index < given for index in range(latents.shape[2])]
        return self._forward(pipe, latents, timestep, texts, clean=clean, rope_interpolation_scale=scale)

    def _forward(
        self,
        pipe: Any,
        latents: Tensor,
        timestep: Tensor,
        texts: dict[str, Text],
        *,
        clean: Sequence[bool],
        **positions: Any,
    ) -> list[Tensor]:
        """A forward with the `positions` of its tokens, and timestep 0 in the frames that are `clean`.

        The batch is [uncond, cond], the order of the stock pipeline.
        """
        embeds, masks = zip(*reversed(texts.values()), strict=True)
        batch = len(texts)
        frames, rows, columns = latents.shape[2:]
        hidden = pack(latents)
        if (
            batch > 1
        ):  # alone they stay a view, as in the stock pipeline: a product of another layout may round otherwise
            hidden = torch.cat([hidden] * batch)
        timestep = timestep.expand(batch)
        if any(clean):  # a timestep of each token
            noisy = torch.tensor([not each for each in clean], dtype=torch.float32, device=latents.device)
            timestep = timestep.unsqueeze(-1) * noisy.repeat_interleave(rows * columns)
        with pipe.transformer.cache_context("cond_uncond"):
            packed = pipe.transformer(
                hidden_states=hidden.to(pipe.transformer.dtype),
                encoder_hidden_states=torch.cat(embeds),
                timestep=timestep,
                encoder_attention_mask=torch.cat(masks),
                num_frames=frames,
                height=rows,
                width=columns,
                return_dict=False,
                **positions,
            )[0]
        predictions = [unpack(prediction, frames, rows, columns) for prediction in packed.split(1)]
        return predictions[::-1]

    def guide(self, predictions: Sequence[Tensor], scale: float) -> Tensor:
        """In fp32, as the stock pipeline combines them."""
        return super().guide([prediction.float() for prediction in predictions], scale)

    def condition(self, pipe: LTXPipeline, pictures: Mapping[str, np.ndarray], *, num_frames: int) -> Condition:
        """See the base class: the first latent frame."""
        return Condition(latents=self.encode_pixels(pipe.vae, pictures["first"][None]))

    def time_settings(
        self, vae: Mapping[str, Any], mode: DecodeMode, config: DecodeConfig, *, num_latents: int, seed: int
    ) -> TimeSettings:
        """A video no longer than `decode.tile_frames` is not cut, nor is any in mode `whole`."""
        conditioned = bool(vae.get("timestep_conditioning", False))
        noisy = conditioned or any(vae.get("decoder_inject_noise", ()))
        common: dict[str, Any] = {
            "timestep": config.timestep if conditioned else None,
            "noise_scale": config.noise_scale if conditioned else 0.0,
            "seed": seed if noisy else None,
        }
        factor = _compression(vae, "temporal", vae.get("patch_size_t", 1))
        size = config.tile_frames // factor
        # A chunk sees one more latent frame than its frames need: the first of a decode stands for one frame only.
        longest = size if config.tiles == "diffusers" else size + 1
        if mode == "whole" or num_latents <= longest:
            return TimeSettings(**common)
        return TimeSettings(chunk=(config.stride_frames // factor, size + 1), tiles=config.tiles, **common)

    def latent_statistics(self, vae: AutoencoderKLLTXVideo) -> tuple[Tensor, Tensor]:
        """See the base class; the deviation holds the scaling factor."""
        mean, std = (x.view(1, -1, 1, 1, 1).to(vae.device, vae.dtype) for x in (vae.latents_mean, vae.latents_std))
        return mean, std / vae.config.scaling_factor

    def open_decoder(self, vae: AutoencoderKLLTXVideo, latents: Tensor, settings: TimeSettings) -> LatentDecoder:
        """See the base class."""
        return _ChunkDecoder(vae, latents, settings)


def shift_exponent(config: Any, num_tokens: int) -> float:
    """mu of a video of `num_tokens`: the line through the scheduler's two (tokens, shift) points, beyond them as well.

    A scheduler without these keys has the values that the stock pipeline assumes.
    """
    tokens = [config.get(f"{name}_image_seq_len", value) for name, value in (("base", 256), ("max", 4096))]
    shifts = [config.get(f"{name}_shift", value) for name, value in (("base", 0.5), ("max", 1.15))]
    slope = (shifts[1] - shifts[0]) / (tokens[1] - tokens[0])
    return num_tokens * slope + (shifts[0] - slope * tokens[0])


def pack(latents: Tensor) -> Tensor:
    """[B, z, F, h, w] -> [B, S, z], frame-major; a view."""
    return latents.flatten(2).transpose(1, 2)


def unpack(packed: Tensor, frames: int, rows: int, columns: int) -> Tensor:
    """[B, S, z] -> [B, z, F, h, w]."""
    return packed.transpose(1, 2).unflatten(2, (frames, rows, columns)).contiguous()


class _ChunkDecoder(LatentDecoder):
    """The LTX decoder on the whole video, or on chunks that overlap and fade into each other, as `use_framewise_decoding`."""

    def __init__(self, vae: AutoencoderKLLTXVideo, latents: Tensor, settings: TimeSettings) -> None:
        self._vae = vae
        self._latents = latents
        self._settings = settings
        self._factor = vae.temporal_compression_ratio
        self._mean, self._std = (
            x.view(1, -1, 1, 1, 1).to(vae.device, vae.dtype) for x in (vae.latents_mean, vae.latents_std)
        )
        self._noise = _decode_noise(latents.shape, settings) if settings.noise_scale else None
        self._injects = any(vae.config.decoder_inject_noise)
        stride, size = settings.chunk or (latents.shape[2], latents.shape[2])
        self.chunks = cover(latents.shape[2], size, stride, settings.tiles)

    def latents(self, index: int) -> Tensor:
        """See the base class; with its share of noise, where the decoder wants that."""
        vae, (start, stop) = self._vae, self.chunks[index]
        latents = self._latents[:, :, start:stop].to(vae.device, vae.dtype)
        latents = latents * self._std / vae.config.scaling_factor + self._mean
        if self._noise is None:
            return latents
        share = torch.tensor(self._settings.noise_scale, device=vae.device, dtype=vae.dtype)
        return (1 - share) * latents + share * self._noise[:, :, start:stop].to(latents)

    def start(self) -> None:
        """See the base class; chunks share no state before they are joined."""

    def step(self, latents: Tensor, state: Any, *, index: int, tile: int) -> Tensor:
        """See the base class. Every chunk but the first loses one frame.

        Frame f of a chunk that starts at latent frame s is the video's frame s * factor + f. The first is decoded from a single
        latent frame and already in the chunk before, so it is dropped. diffusers drops the last frame instead, so that its
        framewise decode is one frame late after the first chunk.
        """
        vae, settings = self._vae, self._settings
        timestep = None
        if settings.timestep is not None:
            timestep = torch.tensor([settings.timestep], device=vae.device, dtype=vae.dtype)
        with self._layer_noise(index, tile):
            frames = vae.decoder(latents, timestep)
        count = self.num_frames(index)
        return frames[:, :, :count] if settings.tiles == "diffusers" else frames[:, :, frames.shape[2] - count :]

    def num_frames(self, index: int) -> int:
        """See the base class."""
        start, stop = self.chunks[index]
        return (stop - start - 1) * self._factor + (1 if index == 0 else 0)

    def join(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Blend each chunk with the end of those before; frames that the next chunk also covers are left to it."""
        if self._settings.tiles == "diffusers":
            yield from self._join_as_diffusers(pieces)
            return
        frames = [
            (start * self._factor + (index > 0), (stop - 1) * self._factor + 1)
            for index, (start, stop) in enumerate(self.chunks)
        ]
        below = None  # what chunks so far made of frames that the next one covers too
        for index, piece in enumerate(pieces):
            if below is not None and (num_blended := below.shape[2]):
                first = piece[:, :, :num_blended]
                first.copy_(lay_over(below, first, overlap_share(frames, index)[:num_blended], dim=-3))
            begin, end = frames[index]
            num_done = (end if index + 1 == len(frames) else frames[index + 1][0]) - begin
            below = piece[:, :, num_done:]
            yield piece[:, :, :num_done]

    def _join_as_diffusers(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        left = (self._latents.shape[2] - 1) * self._factor + 1
        chunk = self._settings.chunk
        # Of the chunk's latent frames one more than it stands for; see `time_settings`.
        overlap = 0 if chunk is None else (chunk[1] - 1 - chunk[0]) * self._factor
        before = None
        for index, piece in enumerate(pieces):
            if before is not None:
                fade_in(piece, before, extent=overlap, dim=-3)
            keep = left if chunk is None else chunk[0] * self._factor + (index == 0)
            part = piece[:, :, : min(keep, left)]
            left -= part.shape[2]
            before = piece
            if part.shape[2]:
                yield part

    @contextmanager
    def _layer_noise(self, index: int, tile: int) -> Iterator[None]:
        """Seed the device's generator for the layers of the 0.9.1 decoder, and restore it afterwards.

        A tile's noise follows from the run's seed, its chunk and its number, so any rank that decodes it draws the same.
        """
        if not self._injects or self._vae.device.type == "meta":
            yield
            return
        device = self._vae.device  # torch.manual_seed would seed those of all GPUs
        drawn = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
        before = drawn.get_state()
        drawn.manual_seed(layer_noise_seed(self._settings.seed or 0, index, tile))
        try:
            yield
        finally:
            drawn.set_state(before)


def layer_noise_seed(seed: int, index: int, tile: int) -> int:
    """Seed of the noise inside the decoder for a tile of a chunk."""
    return (seed + 1_000_003 * index + 7919 * tile) % 2**63


def _decode_noise(shape: Sequence[int], settings: TimeSettings) -> Tensor:
    """The stock pipeline's draw for decoding: the second of a generator whose first is the noise of the run."""
    generator = torch.Generator("cpu").manual_seed(settings.seed or 0)
    torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def _compression(vae: Mapping[str, Any], axis: str, patch: int) -> int:
    """Pixels or frames per latent: given, or a doubling for every level of the encoder that scales."""
    given = vae.get(f"{axis}_compression_ratio")
    return patch * 2 ** sum(map(bool, vae.get("spatio_temporal_scaling", SCALING))) if given is None else given


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs over all heads, in fp32: x [B, s, C], cos and sin [B, s, C]."""
    pairs = x.unflatten(2, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


LTX = LtxAdapter()
