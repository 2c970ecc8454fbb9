"""The interface of a model family for training, export and evaluation."""

from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn
from transformers import T5Tokenizer

from tiny.world import VOCABULARY

TEXT_DIM = 64
TEXT_LENGTH = 32
"""Tokens a prompt is padded to in most training steps."""

NATIVE_FRAMES = 33
LATENT_FRAMES = 9
FLOW_SHIFT = 3.0
"""Shift of the noise levels in training: x -> shift x / (1 + (shift - 1) x)."""


TEXT_ENCODER = {
    "d_model": TEXT_DIM,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
}
"""Sizes of a T5 encoder, for T5Config or UMT5Config: two layers are enough for the grammar of the captions."""


class Denoiser(nn.Module):
    """Transformer and text encoder as one module, since they are trained together."""

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module) -> None:
        """The output layer starts at zero, so that training starts from no velocity."""
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder
        nn.init.zeros_(transformer.proj_out.weight)
        nn.init.zeros_(transformer.proj_out.bias)

    def encode_text(self, token_ids: Tensor, mask: Tensor, text_length: int) -> Any:
        """Token ids and mask [B, k] -> what `forward` takes as text, padded to `text_length` as the pipeline does."""
        raise NotImplementedError

    def forward(self, latent: Tensor, timestep: Tensor, text: Any) -> Tensor:
        """Noisy latents [B, z, F, h, w], timesteps in 0..1000 and a text -> velocity [B, z, F, h, w].

        Timesteps are [B], or [B, F] of each latent frame for a family that learns to continue given frames.
        """
        raise NotImplementedError


class Family(Protocol):
    """One model family: its classes, built with random weights at a hundredth of their size.

    Attributes:
        title: its name in the model card.
        pipeline: the class of the pipeline that is exported.
        classes: the classes in the checkpoint.
        pipeline_text_length: tokens the stock pipeline pads a prompt to.
        latent_grid: rows and columns of a latent frame.
        encoder_parts: modules of the autoencoder that the cached latents come from.
        picture_pipeline: the stock pipeline of videos that begin with a picture, for a family that learns to continue given frames.
    """

    title: str
    pipeline: type[DiffusionPipeline]
    classes: tuple[str, ...]
    pipeline_text_length: int
    latent_grid: tuple[int, int]
    encoder_parts: tuple[str, ...]
    picture_pipeline: type[DiffusionPipeline] | None

    def build_vae(self, mean: Tensor | None = None, std: Tensor | None = None) -> nn.Module:
        """The autoencoder; `mean` and `std` [z] of its latents are what the pipeline normalises them with."""

    def build_denoiser(self, vocab_size: int) -> Denoiser:
        """Transformer and text encoder with random weights."""

    def blocks(self, denoiser: Denoiser) -> nn.ModuleList:
        """The transformer's blocks: compiled in training, and trained with Muon."""

    def build_scheduler(self) -> SchedulerMixin:
        """The scheduler of the exported pipeline."""

    def sampling_arguments(self) -> dict[str, Any]:
        """What the pipeline's call needs beyond prompt, size, steps, guidance and generator."""


def build_tokenizer(max_length: int) -> T5Tokenizer:
    """A tokenizer of whole words; a word it does not know becomes `▁` and `<unk>`."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), (",", -2.0), (".", -2.0)]
    pieces += [(f"▁{word}", -2.0) for word in VOCABULARY]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def assemble_pipeline(family: Family, vae: nn.Module, denoiser: Denoiser) -> DiffusionPipeline:
    """The stock pipeline around trained parts."""
    return family.pipeline(
        tokenizer=build_tokenizer(family.pipeline_text_length),
        text_encoder=denoiser.text_encoder.eval(),
        vae=vae.eval(),
        scheduler=family.build_scheduler(),
        transformer=denoiser.transformer.eval(),
    )


def load_pipeline(family: Family, folder: Path) -> DiffusionPipeline:
    """Load a checkpoint in float32, without progress bars."""
    pipe = family.pipeline.from_pretrained(str(folder), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
