"""The interface between engine and model: `ModelAdapter`, and the types of its arguments.

No other file names a pipeline class. docs/adding-a-model.md explains the methods in order.
"""

import functools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from engine.adapters.blend import Tiles
from engine.config import DecodeConfig
from engine.errors import UserError, first_line
from engine.schedulers import ADVICE, check_flow

Range = tuple[int, int]
# Encoded text of one pass: embeddings [1, K, C], and for a model that masks padding a mask [1, K] of 0 and 1.
Text = tuple[Tensor, ...]
DecodeMode = Literal["whole", "framewise", "tiled"]
MOST_SIZE = 2**20


def join_texts(texts: Sequence[Text]) -> Text:
    """Concatenate texts [1, K, C], and masks [1, K] if the model has them, to [1, num_texts K, C]."""
    return tuple(torch.cat(parts, dim=1) for parts in zip(*texts, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSpec:
    """The numbers of a checkpoint that determine lengths and sizes, from its config.json files alone.

    Attributes:
        channels: latent channels z.
        temporal_factor: video frames per latent frame, except the first, which is one frame.
        spatial_factor: pixels per latent row or column.
        patch: latent frames, rows and columns per token.
        pipeline_multiple: multiple that its pipeline requires for height and width, whatever the VAE.
        max_positions: length of the rotary table of each axis; None if positions are computed.
        cuts_time: whether a decode may cut the video into chunks of `decode.tile_frames`.
        pictures: places at which the checkpoint was trained to be conditioned on a picture: `first`, `last`, `any`.
        needs: those of them that are required.
    """

    channels: int
    temporal_factor: int
    spatial_factor: int
    patch: tuple[int, int, int]
    pipeline_multiple: int
    max_positions: int | None = None
    cuts_time: bool = False
    pictures: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for invalid numbers, as configurations come from files."""
        others = ("cuts_time", "pictures", "needs")
        numbers = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in others}
        for name, value in numbers.items():
            sizes = value if isinstance(value, tuple) else (value,)
            optional = name == "max_positions" and value is None
            if not optional and not all(type(size) is int and 1 <= size <= MOST_SIZE for size in sizes):
                raise ValueError(f"{name} is {value!r:.60}")
        if len(self.patch) != 3:
            raise ValueError(f"patch is {self.patch!r:.60}")

    @property
    def takes_prefix(self) -> bool:
        """Whether latent frames that are given from the first on are conditions: free of noise at every step, with timestep 0."""
        return "first" in self.pictures and not self.needs

    @property
    def size_multiples(self) -> tuple[int, int]:
        """The multiples required for height and width in pixels: the pipeline's, and whole tokens."""
        _, rows, columns = self.patch
        factor = self.spatial_factor
        return math.lcm(self.pipeline_multiple, factor * rows), math.lcm(self.pipeline_multiple, factor * columns)

    def check_video(self, num_frames: int, height: int, width: int) -> None:
        """Raise UserError for a length or size that this checkpoint cannot make."""
        step = self.temporal_factor
        if num_frames < 1 or (num_frames - 1) % step:
            below = max(num_frames - 1, 0) // step * step + 1
            raise UserError(
                f"video.num_frames must be {step}k + 1, got {num_frames}; the nearest are {below} and {below + step}"
            )
        for name, size, multiple in zip(("height", "width"), (height, width), self.size_multiples, strict=True):
            if size < 1 or size % multiple:
                below = max(size // multiple, 1) * multiple
                raise UserError(
                    f"video.{name} must be a multiple of {multiple}, got {size}; "
                    f"the nearest are {below} and {below + multiple}"
                )
        self._check_positions(num_frames, height, width)

    def _check_positions(self, num_frames: int, height: int, width: int) -> None:
        most, step = self.max_positions, self.temporal_factor
        if most is None:
            return
        sizes = zip(
            self.latent_shape(num_frames, height, width)[2:], self.patch, ("frames", "rows", "columns"), strict=True
        )
        for size, patch, name in sizes:
            if size // patch > most:
                raise UserError(
                    f"{num_frames} frames of {height} x {width} are {size // patch} latent {name}, and the model's rotary "
                    f"table ends at {most}; make at most {(most - 1) * step + 1} frames"
                    if name == "frames"
                    else f"{height} x {width} pixels are {size // patch} token {name}, and the model's rotary table ends at "
                    f"{most}; make the video smaller"
                )

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        """Shape [1, z, F, h, w] of the latents of one video."""
        frames = (num_frames - 1) // self.temporal_factor + 1
        return (1, self.channels, frames, height // self.spatial_factor, width // self.spatial_factor)

    def num_frames(self, latent_frames: int) -> int:
        """Frames of so many latent frames: the first is one frame, every other as many as the VAE compresses into one."""
        return (latent_frames - 1) * self.temporal_factor + 1

    @property
    def token_step(self) -> int:
        """Frames of the video per frame of tokens, after the first."""
        return self.temporal_factor * self.patch[0]

    def native_frames(self, window_frames: int) -> int:
        """Frames of a video of native length, whose window is in frames of tokens."""
        return self.num_frames(window_frames * self.patch[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """Conditioning on given pictures, passed to every forward.

    Attributes:
        latents: [1, z, K, h, w] fp32, the first latent frames of the video, kept free of noise; None if there are none.
        channels: [1, c, F, h, w] fp32, concatenated to those of the latents; None if there are none.
        tokens: [P, K, C] of P pictures, which every frame's cross-attention sees beside the text; None if there are none.
        beside: [1, z, E, h, w] fp32, latent frames without noise whose tokens stand beside those of the video; None if there are none.
        moments: the frame of the video of each of `beside`, ascending.
    """

    latents: Tensor | None = None
    channels: Tensor | None = None
    tokens: Tensor | None = None
    beside: Tensor | None = None
    moments: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Condition":
        """The same on a device."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)}
        return replace(self, **moved)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        parts = (self.latents, self.channels, self.tokens, self.beside)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def clean_frames(self) -> int:
        """K, latent frames without noise, whose tokens have timestep 0."""
        return 0 if self.latents is None else self.latents.shape[2]

    def places(self, step: int) -> tuple[int, ...]:
        """The latent frame, of `step` frames, after which the tokens of each of `beside` stand."""
        return tuple(-(-moment // step) for moment in self.moments)


def order_of_tokens(num_frames: int, places: Sequence[int]) -> list[int]:
    """The frames of tokens in order: those of the video by index, and `num_frames` + i for the i-th of `Condition.beside`."""
    latent = [*range(num_frames), *places]
    return sorted(range(len(latent)), key=lambda index: (latent[index], index))


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeSettings:
    """Settings of a decode in time; the same on every rank, since they affect the frames.

    Attributes:
        chunk: latent frames that a chunk advances by (at most), and that it sees; None for the model's exact decode.
        tiles: placement and blending of chunks, see `blend.cover`.
        timestep: timestep given to a decoder that is conditioned on one; None for others.
        noise_scale: share of noise added to the latents of such a decoder.
        seed: of the CPU generator of that noise; None for a decoder without noise.
    """

    chunk: tuple[int, int] | None = None
    tiles: Tiles = "full"
    timestep: float | None = None
    noise_scale: float = 0.0
    seed: int | None = None

    @property
    def record(self) -> dict[str, Any]:
        """The entry of the record; empty if there is nothing to choose."""
        chunk = {"chunk_latents": self.chunk[1], "chunk_stride": self.chunk[0]} if self.chunk else {}
        conditioning = {} if self.timestep is None else {"timestep": self.timestep, "noise_scale": self.noise_scale}
        return chunk | conditioning | ({} if self.seed is None else {"noise_seed": self.seed})


class LatentDecoder(ABC):
    """One decode of a latent video by a VAE, in chunks of latent frames; a frame may also be cut into tiles.

    Attributes:
        chunks: latent frames [start, stop) of each chunk.
    """

    chunks: tuple[Range, ...]

    @abstractmethod
    def latents(self, index: int) -> Tensor:
        """Latents [1, z, t, h, w] of chunk `index` for the VAE: denormalised, on its device, in its dtype."""

    @abstractmethod
    def start(self) -> Any:
        """The state of a tile before its first chunk."""

    @abstractmethod
    def step(self, latents: Tensor, state: Any, *, index: int, tile: int) -> Tensor:
        """Decode a tile of chunk `index` to frames [1, 3, t, H, W], not clamped, and advance the tile's state."""

    @abstractmethod
    def num_frames(self, index: int) -> int:
        """Frames that `step` makes of chunk `index`."""

    @abstractmethod
    def join(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Whole frames of each chunk, in order -> the video's, as many parts as chunks; a part may be empty."""


# Names in files and folders of the authors' weights and of repacked ones.
_PHRASE = re.compile(r"(high|low)[-_ ]?noise", re.IGNORECASE)
_WORD = re.compile(r"(?:^|[-_. ])(high|low)(?=[-_. ]|$)", re.IGNORECASE)
_WITH_TWO = re.compile(r"wan[-_ ]?2[-_.]?2(?!.*5b)", re.IGNORECASE)


EXPERTS = ("transformer", "transformer_2")
"""Parts of a pipeline that denoise: the first at noisy timesteps, the second, of a checkpoint that has one, at the others."""


def half_of_two(found: str) -> UserError:
    """The error for one transformer without the other."""
    return UserError(
        f"this checkpoint has {found}: it denoises with two transformers, each for some of the steps (as Wan2.2 A14B does), and either of "
        "them alone gives a wrong video; load transformer, transformer_2 and boundary_ratio together, as from_pretrained does"
    )


def refuse_one_of_two(name: str) -> None:
    """Raise UserError for a path or hub name that says that its weights are one of two transformers.

    Only the name shows it: the tensors of a Wan2.2 A14B transformer have the names and shapes of Wan2.1 14B's.
    """
    if says_one_of_two(name):
        raise half_of_two(f"the name {'/'.join(Path(name).parts[-2:])}")


def says_one_of_two(name: str) -> bool:
    """Whether a path or hub name says that its weights are of one of two transformers."""
    parts = Path(name).parts[-2:]
    whole = "/".join(parts)
    if "a14b" in whole.lower() or _PHRASE.search(whole):
        return True
    return _WITH_TWO.search(whole) is not None and any(_WORD.search(part) for part in parts)


def says_expert(name: str) -> str | None:
    """`high` or `low` where a path or hub name says that its weights are of that transformer of two; None if it does not.

    The file's own name decides before its folder's, and `high_noise` before the word `high`. A name with both says neither.
    """
    for part in reversed(Path(name).parts[-2:]):
        for pattern in (_PHRASE, _WORD):
            said = {side.lower() for side in pattern.findall(part)}
            if len(said) == 1:
                return said.pop()
    return None


def as_frames(pixels: np.ndarray) -> Tensor:
    """Uint8 [T, H, W, 3] to fp32 [1, 3, T, H, W] in [-1, 1], with the bits of diffusers' VideoProcessor."""
    return 2.0 * (torch.from_numpy(pixels.copy()).permute(3, 0, 1, 2)[None].float() / 255.0) - 1.0


def unwrap(module: Any) -> Any:
    """The module without a wrapper of torch.compile."""
    return getattr(module, "_orig_mod", module)


class ModelAdapter(ABC):
    """One family of models in diffusers. Instances are stateless: everything is an argument.

    Attributes:
        name: its name in messages.
        index_names: classes that a model_index.json of such a checkpoint may name.
        pipeline_class: the stock text-to-video pipeline that loads it.
        pipeline_classes: all supported pipeline classes.
        transformer_class: class of `pipe.transformer`.
        vae_class: class of `pipe.vae`.
        text_encoder_class: class of `pipe.text_encoder`.
        text_config_class: class of its configuration.
        image_encoder_class: class of `pipe.image_encoder`, if `sees_pictures`.
        batches_guidance: whether the stock pipeline runs both passes of guidance as one batch, [uncond, cond].
        frame_rate_matters: whether the frame rate decides the latents.
        decode_modes: the ways to decode, the most exact first; `decode.mode` names one of them or `auto`.
        exact_decode_is_bounded: whether the memory of `whole` does not grow with the length of the video.
        latent_tensors: fp32 tensors of the latents' size that are alive between steps, the scheduler's included.
        single_file_marks: by part, the suffix of a tensor's name that identifies it in a single file of the model's authors.
        single_file_names: by suffix of a tensor's name that diffusers does not convert, the suffix that replaces it.
        counts_frames: whether temporal positions are frame numbers that grow beyond those of training, as `riflex` needs.
        text_arguments: arguments of the pipeline's call that take the tensors of a `Text`, in order.
    """

    name: ClassVar[str]
    index_names: ClassVar[tuple[str, ...]]
    pipeline_class: ClassVar[Any]
    pipeline_classes: ClassVar[tuple[Any, ...]]
    transformer_class: ClassVar[Any]
    vae_class: ClassVar[Any]
    text_encoder_class: ClassVar[Any]
    text_config_class: ClassVar[Any]
    image_encoder_class: ClassVar[Any] = None
    batches_guidance: ClassVar[bool]
    frame_rate_matters: ClassVar[bool]
    decode_modes: ClassVar[tuple[DecodeMode, ...]]
    exact_decode_is_bounded: ClassVar[bool]
    latent_tensors: ClassVar[int]
    single_file_marks: ClassVar[Mapping[str, str]]
    single_file_names: ClassVar[Mapping[str, str]] = MappingProxyType({})
    counts_frames: ClassVar[bool] = False
    text_arguments: ClassVar[tuple[str, ...]]

    # What a checkpoint is, before its weights are read.

    @abstractmethod
    def video_spec(
        self, transformer: dict[str, Any], vae: dict[str, Any], index: Mapping[str, Any] | None = None
    ) -> VideoSpec:
        """Read two config.json files and the model_index.json; keys that a checkpoint leaves out have the value of the diffusers class."""

    @abstractmethod
    def spatial_factor(self, vae: Mapping[str, Any]) -> int:
        """Pixels per latent row or column, from the VAE's configuration."""

    @abstractmethod
    def latent_channels(self, vae: Mapping[str, Any]) -> int:
        """Latent channels z, from the VAE's configuration."""

    @abstractmethod
    def check_pipeline(self, pipe: Any) -> None:
        """Raise UserError for pipelines of this class that would run but give a wrong video, whatever their scheduler."""

    def check_call(self, arguments: Mapping[str, Any]) -> None:
        """Raise UserError for arguments of a pipeline's call, by name, with which a method would fail or they would be ignored."""
        return

    def check_index(self, index: Mapping[str, Any]) -> None:
        """Raise UserError for a model_index.json of a checkpoint that would run and give a wrong video."""
        if index.get("boundary_ratio") is not None:
            raise half_of_two(f"boundary_ratio {index['boundary_ratio']}")

    def check_folder(self, folder: Path, index: Mapping[str, Any]) -> None:
        """`check_index`, and UserError for a second transformer that the model_index.json does not mention."""
        self.check_index(index)
        if "transformer_2" not in self.experts_named(index) and (folder / "transformer_2").exists():
            raise half_of_two("a transformer_2 that its model_index.json does not name")

    # The transformers. Most models have one; a second one denoises the timesteps below a boundary.

    def pipeline_of(self, index: Mapping[str, Any]) -> Any:
        """The class of pipelines that loads the checkpoint of a model_index.json."""
        return self.pipeline_class

    def sees_pictures(self, index: Mapping[str, Any]) -> bool:
        """Whether a checkpoint has an encoder of pictures, `image_encoder`, and its `image_processor`."""
        return False

    def image_tokens(self, transformer: Mapping[str, Any], image_encoder: Mapping[str, Any] | None) -> int:
        """Tokens of a `Condition` that cross-attention sees beside the text, from two config.json files."""
        return 0

    def text_tokens(self, transformer: Mapping[str, Any]) -> int | None:
        """The only number of text tokens that the stock cross-attention of this checkpoint takes; None for any number."""
        return None

    def stored_name(self, part: str, name: str) -> str:
        """The name in a part of the pipeline of a tensor of that name in its file."""
        return name

    def experts_named(self, index: Mapping[str, Any]) -> tuple[str, ...]:
        """The parts of a checkpoint that denoise, from its model_index.json."""
        return EXPERTS[:1]

    def expert_at(self, timestep: float, config: Mapping[str, Any]) -> str:
        """The part that denoises a timestep, from values that all ranks have.

        `config` is the pipeline's configuration or its model_index.json.
        """
        return EXPERTS[0]

    def experts(self, pipe: Any) -> dict[str, Any]:
        """The pipeline's transformers by part, without the wrapper of torch.compile; UserError for one of another model."""
        return {"transformer": self._transformer(pipe, "transformer")}

    def transformer_of(self, pipe: Any) -> Any:
        """The first of the pipeline's transformers, whose configuration all of them have."""
        return self._transformer(pipe, "transformer")

    def _transformer(self, pipe: Any, name: str) -> Any:
        transformer = unwrap(getattr(pipe, name, None))
        if not isinstance(transformer, self.transformer_class):
            found = f"no {name}" if transformer is None else f"a {type(transformer).__name__} as {name}"
            raise UserError(f"the {type(pipe).__name__} has {found}; give it a {self.transformer_class.__name__}")
        return transformer

    def try_scheduler(self, scheduler: Any) -> bool:
        """Whether the scheduler draws noise while it steps, from a trial as `engine.schedulers.check_flow` describes it.

        UserError for one that the model's pipeline cannot use, or with which it would run and give a wrong video; other errors
        are the scheduler's own, for a value of its configuration.
        """
        set_timesteps = functools.partial(self.set_timesteps, num_tokens=1, shift="native", device=None)
        return check_flow(scheduler, set_timesteps, model=self.name.split()[0])

    def check_scheduler(self, scheduler: Any) -> bool:
        """`try_scheduler`, with every error as a UserError."""
        try:
            return self.try_scheduler(scheduler)
        except UserError:
            raise
        except Exception as error:  # any error of a scheduler about an unexpected value
            raise UserError(
                f"the scheduler {type(scheduler).__name__} cannot be used ({type(error).__name__}: {first_line(error)}); {ADVICE}"
            ) from error

    def build(self, part: str, config: dict[str, Any]) -> Any:
        """A part of the pipeline (a transformer, vae or text_encoder) with random weights, from its configuration."""
        if part == "text_encoder":
            return self.text_encoder_class(self.text_config_class(**config))
        return (self.vae_class if part == "vae" else self.transformer_class).from_config(config)

    # Inside a forward: where tokens are made, mixed and gathered.

    def attention_modules(self, transformer: Any) -> list[Any]:
        """The self-attention module of every block, first block first."""
        return [block.attn1 for block in self.blocks(transformer)]

    @abstractmethod
    def blocks(self, transformer: Any) -> Iterable[Any]:
        """The transformer blocks, first block first."""

    @abstractmethod
    def grid(self, transformer: Any, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """Frames F, rows H and columns W of a forward's tokens, from its arguments by name."""

    @abstractmethod
    def shard_points(self, transformer: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Where tokens are sharded and gathered: patch embedding, rotary table, output projection.

        Between the first and the last everything but the self-attentions must work on each token by itself.
        """

    def shard_condition(self, transformer: Any) -> nn.Module | None:
        """The module that embeds per-token timesteps, if any; `shard_timesteps` selects a rank's tokens before it runs."""
        return None

    def shard_timesteps(self, args: tuple, kwargs: dict, start: int, length: int) -> tuple[tuple, dict]:
        """Select a rank's tokens from the arguments of `shard_condition`; called only if there is one."""
        raise AssertionError(f"{self.name} has one timestep for all tokens")

    def video_timestep(self, timestep: Tensor) -> Tensor:
        """The timestep [B] of each video, from the argument of a forward: [B], or [B, S] with one of each token.

        Of tokens those of given frames have 0, and all others the same.
        """
        if timestep.dim() != 2:
            return timestep
        if not bool(timestep.any()):
            raise UserError(
                "every token of the video has timestep 0: the given first frame is all of it; ask for more frames"
            )
        video = timestep.amax(dim=1)
        if bool(((timestep != video[:, None]) & (timestep != 0)).any()):
            raise UserError(
                "the tokens of a video have several timesteps that are not 0; give the frames with noise the timestep of the step"
            )
        return video

    @abstractmethod
    def shard_embedding(self, embedded: Tensor, start: int, length: int) -> Tensor:
        """Select a rank's tokens from the output of the patch embedding, in a shape that the model accepts."""

    @abstractmethod
    def shard_rotary(self, tables: tuple[Tensor, Tensor], start: int, length: int) -> tuple[Tensor, Tensor]:
        """Select a rank's rows of the rotary tables (cos, sin)."""

    def temporal_frequencies(self, transformer: Any) -> list[tuple[float, slice]]:
        """Radians per frame, and the columns of the rotary tables, of each pair that turns with time, the fastest first.

        Called only if `counts_frames`.
        """
        raise AssertionError(f"{self.name} does not count frames")

    @abstractmethod
    def qkv(
        self,
        attn: Any,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        on_value: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projected, normalised and rotated q, k, v [B, s, N, D] from hidden states [B, s, C], bit for bit the stock's.

        `on_value` is called with v as soon as it exists, so that it is sent while q and k are normalised and rotated.
        """

    def project_out(self, attn: Any, out: Tensor) -> Tensor:
        """Output projection of [B, s, N, D] to [B, s, C]: diffusers' attention modules keep it, and a dropout, in `to_out`."""
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))

    # Cross-attention to text, which a timeline replaces.

    def cross_attention_modules(self, transformer: Any) -> list[Any]:
        """The cross-attention module of every block, first block first."""
        return [block.attn2 for block in self.blocks(transformer)]

    def check_texts(self, transformer: Any) -> None:
        """Raise UserError for a transformer whose cross-attention attends to more than texts as to texts."""
        return

    def cross_qkv(self, attn: Any, hidden: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projected and normalised q [B, s, N, D] of hidden states [B, s, C], and k, v [B, K, N, D] of text [B, K, C]."""
        if getattr(attn, "fused_projections", False) and hasattr(attn, "to_kv"):  # not LTX's, which keeps both
            k, v = attn.to_kv(text).chunk(2, dim=-1)
        else:
            k, v = attn.to_k(text), attn.to_v(text)
        q, k = attn.norm_q(attn.to_q(hidden)), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        return q, k, v

    def added_kv(self, attn: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [B, K, N, D] of the tokens [B, K, C] of pictures; their attention is added to that of the text."""
        raise AssertionError(f"{self.name} has no tokens of pictures")

    # A run.

    def clean_prompt(self, prompt: str) -> str:
        """Clean a prompt as the stock pipeline does before the tokenizer."""
        return prompt

    @abstractmethod
    def encode_text(self, pipe: Any, prompts: Sequence[str], max_tokens: int, device: torch.device) -> list[Text]:
        """Encode each prompt in the transformer's dtype; none has more than `max_tokens` tokens.

        `device` is the text encoder's, which may differ from the transformer's.
        """

    @abstractmethod
    def empty_text(self, transformer: Any, max_tokens: int, device: torch.device) -> Text:
        """Tensors of the shapes and dtypes of a prompt's text, for a rank that receives it."""

    @abstractmethod
    def set_timesteps(
        self, scheduler: Any, num_steps: int, *, num_tokens: int, shift: str, device: torch.device | None
    ) -> dict[str, Any]:
        """Set the scheduler's timesteps as the stock pipeline does for a video of `num_tokens`; returns what to record.

        The tokens are those of latents. Whether they are the video's or those of the native length is `shift`, the setting
        `sampler.shift`, which is for the record here.
        """

    @abstractmethod
    def predict(
        self,
        pipe: Any,
        latents: Tensor,
        timestep: Tensor,
        texts: dict[str, Text],
        *,
        fps: int,
        expert: str = "transformer",
        condition: Condition | None = None,
    ) -> list[Tensor]:
        """One forward: a prediction [1, z, F, h, w] for each text, in order, from fp32 latents of that shape.

        Args:
            pipe: the pipeline.
            latents: [1, z, F, h, w] fp32.
            timestep: of the scheduler, no dimensions.
            texts: by pass, `cond` or `uncond`: both of them where `batches_guidance`, otherwise one.
            fps: frames per second of the video.
            expert: the part of the pipeline that denoises, see `expert_at`.
            condition: of given pictures, on the latents' device; its latents are in place.
        """

    def guide(self, predictions: Sequence[Tensor], scale: float) -> Tensor:
        """Classifier-free guidance: uncond + scale (cond - uncond) of [cond, uncond]; of [cond] alone, that."""
        if len(predictions) == 1:
            return predictions[0]
        cond, uncond = predictions
        return uncond + scale * (cond - uncond)

    # Latents to frames, and back.

    def condition(self, pipe: Any, pictures: Mapping[str, np.ndarray], *, num_frames: int) -> Condition:
        """Build the condition from pictures, uint8 [H, W, 3], at places of `VideoSpec.pictures`; called with at least one."""
        raise AssertionError(f"{self.name} was not trained with pictures")

    def encode_pictures(self, vae: Any, pictures: Mapping[str, Tensor], *, num_frames: int) -> Tensor:
        """Latents of the video between pictures [1, 3, 1, H, W], for a `Condition`; called only for `VideoSpec.needs`."""
        raise AssertionError(f"{self.name} needs no pictures")

    def empty_condition(self, transformer: Any, shape: Sequence[int], image_tokens: int) -> Condition | None:
        """The required condition for latents of this shape, on the meta device; None if none is required."""
        return None

    def encode(self, vae: Any, frames: Tensor) -> Tensor:
        """Frames [1, 3, T, H, W] in [-1, 1] to latents [1, z, F, h, w] as the transformer sees them (normalised)."""
        latents = vae.encode(frames.to(vae.device, vae.dtype)).latent_dist.mode()
        mean, std = self.latent_statistics(vae)
        return (latents - mean) / std

    def encode_pixels(self, vae: Any, pixels: np.ndarray) -> Tensor:
        """`encode` of uint8 [T, H, W, 3], in fp32."""
        return self.encode(vae, as_frames(pixels)).float()

    @abstractmethod
    def latent_statistics(self, vae: Any) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the VAE's latents, [1, z, 1, 1, 1] each, by which latents are normalised."""

    @abstractmethod
    def time_settings(
        self, vae: Mapping[str, Any], mode: DecodeMode, config: DecodeConfig, *, num_latents: int, seed: int
    ) -> TimeSettings:
        """The settings with which `mode` decodes `num_latents` latent frames, from the VAE's configuration and `decode`."""

    @abstractmethod
    def open_decoder(self, vae: Any, latents: Tensor, settings: TimeSettings) -> LatentDecoder:
        """Open a decode of latents [1, z, F, h, w] as the transformer sees them (normalised)."""
