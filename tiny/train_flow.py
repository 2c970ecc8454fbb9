"""Stage 3: the transformer and the text encoder, together, by flow matching on the cached latents.

With s the noise level, x_s = (1 - s) x_0 + s noise, the model is given x_s, 1000 s and the text, and learns the velocity noise - x_0.
A family that learns to continue given frames sees the first latent frames of some clips without noise, at timestep 0 (LTX-Video,
arXiv:2501.00103): one, as of a picture, in half of those clips, otherwise any number.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import PreTrainedTokenizerBase

from tiny.attention import cpu_attention
from tiny.families import Denoiser, Family
from tiny.families.base import FLOW_SHIFT, TEXT_LENGTH, build_tokenizer, load_pipeline
from tiny.latents import load_latents, training_scene
from tiny.state import StagePlan, Trainee, numpy_rng, torch_rng, train_steps
from tiny.world import caption

SEED = 3
GIVEN_SHARE = 0.3
"""Share of the clips whose first latent frames are given."""

MUON_WEIGHTS = ("blocks.",)
"""Substring of the names of all weights of a transformer's blocks, and of no others."""


# The autoencoder is causal, so the first latent frames of a clip are the latents of a shorter clip: what shapes and colours are called
# is learned from stills, at a tenth of the cost of a clip.
FLOW_PLAN = StagePlan(phases=((1, 32, 1500), (5, 12, 1500), (9, 8, 5000)))


def training_caption(index: int, rng: np.random.Generator) -> str:
    """A caption of the cached clip `index`: empty for 10 % (for guidance), sometimes with an unknown word or as a sentence."""
    if rng.random() < 0.1:
        return ""
    words = caption(training_scene(index), rng).split(" ")
    if rng.random() < 0.1:
        # Every word outside the vocabulary becomes `<unk>`; the model learns to ignore it.
        words.insert(int(rng.integers(len(words) + 1)), "shiny")
    text = " ".join(words)
    return text[0].upper() + text[1:] + "." if rng.random() < 0.15 else text


def flow_batch(
    latents: Tensor, rng: torch.Generator, *, given_share: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean latents [B, z, F, h, w] -> (noisy latents, timesteps in 0..1000, velocity to learn, which frames to learn it of).

    The last is bool [B, F]. Timesteps are [B], or with a given share, which needs a second frame, those of each frame, [B, F].
    """
    level = torch.rand(latents.shape[0], generator=rng)
    level = FLOW_SHIFT * level / (1 + (FLOW_SHIFT - 1) * level)
    noise = torch.randn(latents.shape, generator=rng)
    learned = torch.ones(latents.shape[0], latents.shape[2], dtype=torch.bool)
    if given_share and latents.shape[2] > 1:
        given, one = (torch.rand(latents.shape[0], generator=rng) < share for share in (given_share, 0.5))
        several = torch.randint(1, latents.shape[2], given.shape, generator=rng)
        learned = torch.arange(latents.shape[2]) >= (given * torch.where(one, 1, several))[:, None]
        level = level[:, None] * learned
    s = level.view(latents.shape[0], 1, -1, 1, 1)
    return (1 - s) * latents + s * noise, 1000 * level, noise - latents, learned


def flow_loss(
    model: Denoiser,
    latents: Tensor,
    captions: list[str],
    tokenizer: PreTrainedTokenizerBase,
    step: int,
    *,
    given_share: float = 0.0,
) -> Tensor:
    """Mean squared error of the velocity for normalised latents [B, z, F, h, w] on the CPU, over the frames that are not given."""
    device = model.transformer.device
    batch = flow_batch(latents, torch_rng(SEED, step), given_share=given_share)
    noisy, timestep, velocity, learned = (part.to(device) for part in batch)
    tokens = tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    text_length = tokenizer.model_max_length if step % 8 == 0 else TEXT_LENGTH
    with torch.autocast(device.type, torch.bfloat16), cpu_attention(device):
        text = model.encode_text(tokens.input_ids.to(device), tokens.attention_mask.to(device), text_length)
        predicted = model(noisy, timestep, text)
    return mse_loss(predicted.float().movedim(2, 1)[learned], velocity.movedim(2, 1)[learned])


def train_flow(family: Family, work: Path, plan: StagePlan, device: torch.device, begin: Path | None = None) -> None:
    """Train transformer and text encoder, or continue; their state is `work/flow.safetensors`.

    A new training begins with random weights, or with those of the checkpoint in the folder `begin`.
    """
    latents, mean, std = load_latents(work)
    mean, std = (part[None, :, None, None, None] for part in (mean, std))
    tokenizer = build_tokenizer(family.pipeline_text_length)
    torch.manual_seed(SEED)
    denoiser = family.build_denoiser(len(tokenizer))
    if begin is not None:
        pipe = load_pipeline(family, begin)
        denoiser.transformer.load_state_dict(pipe.transformer.state_dict())
        denoiser.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    trainee = Trainee(denoiser.to(device).train(), lr=plan.lr, ema_decay=0.998, muon=MUON_WEIGHTS)
    if plan.compiled:
        for block in family.blocks(trainee.module):
            block.compile(dynamic=False)

    def loss_of(step: int, num_frames: int, num_clips: int) -> tuple[Tensor, float]:
        rng = numpy_rng(SEED, step)
        indices = rng.integers(len(latents), size=num_clips)
        captions = [training_caption(int(index), rng) for index in indices]
        batch = (latents[indices, :, :num_frames].float() - mean) / std
        share = GIVEN_SHARE if family.picture_pipeline else 0.0
        loss = flow_loss(trainee.module, batch, captions, tokenizer, step, given_share=share)
        return loss, loss.item()

    path = work / "flow.safetensors"
    train_steps(trainee, path, plan, loss_of, warmup=200, describe=lambda loss: f"loss {loss:.4f}")
