"""Stage 1: the autoencoder. Stills first, where a step is cheap, then short clips.

Its decoder alone can be trained further at any time, since the cached latents come from the encoder.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from tiny.families import Family
from tiny.families.base import load_pipeline
from tiny.state import StagePlan, Trainee, load_average, numpy_rng, torch_rng, train_steps
from tiny.world import Scene, render, sample_scene

KL_WEIGHT = 3e-4
SEED = 1


VAE_PLAN = StagePlan(phases=((1, 8, 1000), (9, 3, 2000)), save_every=200)
# Clips of the native length last: after short ones alone, each of its later frames is up to 4 dB worse than its first.
DECODER_PLAN = StagePlan(phases=((9, 3, 2500), (33, 1, 1300)), lr=1e-3)


def to_video(clips: list[np.ndarray]) -> Tensor:
    """Clips uint8 [F, H, W, 3] -> float32 [B, 3, F, H, W] in -1..1."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def world_batch(rng: np.random.Generator, *, num_clips: int, num_frames: int, held_out: bool = False) -> Tensor:
    """Rendered clips of random scenes, float32 [num_clips, 3, num_frames, H, W] in -1..1."""
    return to_video([render(sample_scene(rng, held_out=held_out), num_frames) for _ in range(num_clips)])


def scene_of_stars(rng: np.random.Generator) -> Scene:
    """A random scene, in half of all cases one of a small star, whose notches the decoder learns last."""
    wanted = rng.random() < 0.5
    while True:
        scene = sample_scene(rng)
        if not wanted or (scene.shape, scene.size) == ("star", "small"):
            return scene


def clip_with_cuts(
    rng: np.random.Generator, num_frames: int, draw: Callable[[np.random.Generator], Scene] = sample_scene
) -> np.ndarray:
    """A clip uint8 [F, H, W, 3] whose scene changes before a quarter of its latent frames.

    Without cuts the decoder can learn to remember the colours of frame 0 in its causal cache; the latents then stop encoding them,
    and clips longer than those of training fade to gray.
    """
    clip = render(draw(rng), num_frames)
    for start in range(1, num_frames, 4):
        if rng.random() < 0.25:
            clip[start:] = render(draw(rng), num_frames - start)
    return clip


def vae_loss(vae: nn.Module, video: Tensor, noise_rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error) of a batch [B, 3, F, H, W]; errors at edges have extra weight, for sharp shapes."""
    posterior = vae.encode(video).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=noise_rng).to(video.device)
    decoded = vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0].float()
    mse = mse_loss(decoded, video)
    edges = sum((decoded.diff(dim=axis) - video.diff(dim=axis)).abs().mean() for axis in (3, 4))
    # Mean over the elements of the latent, in nats each.
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return l1_loss(decoded, video) + 2 * mse + 0.5 * edges + KL_WEIGHT * kl, mse


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error on the -1..1 scale, whose peak-to-peak is 2."""
    return float(10 * np.log10(4 / mse))


def train_vae(family: Family, work: Path, plan: StagePlan, device: torch.device, begin: Path | None = None) -> None:
    """Train the autoencoder, or continue; its state is `work/vae.safetensors`.

    A new training begins with random weights, or with those of the checkpoint in the folder `begin`.
    """
    torch.manual_seed(SEED)
    vae = family.build_vae()
    if begin is not None:
        vae.load_state_dict(load_pipeline(family, begin).vae.state_dict())
    _train(vae, work / "vae.safetensors", plan, device, sample_scene)


def train_decoder(family: Family, work: Path, plan: StagePlan, device: torch.device) -> None:
    """Train the decoder alone, which leaves cached latents valid; its state is `work/decoder.safetensors`."""
    vae = family.build_vae()
    load_average(vae, work / "vae.safetensors")
    for part in family.encoder_parts:
        vae.get_submodule(part).requires_grad_(False)
    _train(vae, work / "decoder.safetensors", plan, device, scene_of_stars)


def _train(
    vae: nn.Module, path: Path, plan: StagePlan, device: torch.device, draw: Callable[[np.random.Generator], Scene]
) -> None:
    """Train what is not frozen on scenes that `draw` gives, from the state in `path` if there is one."""
    trainee = Trainee(vae.to(device).train(), lr=plan.lr, ema_decay=0.998)

    def loss_of(step: int, num_frames: int, num_clips: int) -> tuple[Tensor, float]:
        rng = numpy_rng(SEED, step)
        video = to_video([clip_with_cuts(rng, num_frames, draw) for _ in range(num_clips)]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss, mse = vae_loss(trainee.module, video, torch_rng(SEED, step))
        return loss, mse.item()

    train_steps(trainee, path, plan, loss_of, warmup=50, describe=lambda mse: f"psnr {psnr(mse):.2f} dB")
