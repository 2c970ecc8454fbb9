"""Initial noise of long videos: independent frames, or frames derived from those of the first native length.

All functions take fp32 noise [B, z, F, h, w] that was drawn whole, from the run's CPU generator, and give a new tensor of
that shape. Every frame of `reshuffle` is a frame of the first W; `reuse_mean` shares one mean over time.
"""

import torch
from torch import Tensor

from freespec.methods.base import Noise


def relate_frames(noise: Tensor, kind: Noise, *, window_frames: int, stride: int, generator: torch.Generator) -> Tensor:
    """Noise of this kind from iid noise: `iid` unchanged, `freenoise` by `reshuffle`, `mean_reuse` by `reuse_mean`."""
    if kind == "freenoise":
        return reshuffle(noise, window_frames=window_frames, stride=stride, generator=generator)
    return reuse_mean(noise, window_frames=window_frames) if kind == "mean_reuse" else noise


def reshuffle(noise: Tensor, *, window_frames: int, stride: int, generator: torch.Generator) -> Tensor:
    """FreeNoise's noise: for f = W, W + s, .. frames [f, f + s) are frames [f - W, f - W + s), shuffled.

    One order for all channels and pixels, drawn from `generator`. A last piece of fewer than s frames takes the first of
    its shuffled ones (the published code fails there).
    """
    if window_frames < 1 or not 1 <= stride <= window_frames:
        raise ValueError(f"noise needs 1 <= stride <= window, got stride {stride} and window {window_frames}")
    out, num_frames = noise.clone(), noise.shape[2]
    for start in range(window_frames, num_frames, stride):
        order = torch.randperm(stride, generator=generator)
        source = out[:, :, start - window_frames + order]
        stop = min(start + stride, num_frames)
        out[:, :, start:stop] = source[:, :, : stop - start]
    return out


def reuse_mean(noise: Tensor, *, window_frames: int) -> Tensor:
    """FreePCA's noise: each chunk of W frames has the mean over time of the first chunk, pixel by pixel.

    A last chunk of fewer frames is moved by its own mean. The shuffle of the published code changes no mean and is left out.
    """
    if window_frames < 1:
        raise ValueError(f"noise needs a window of 1 frame or more, got {window_frames}")
    chunks = noise.split(window_frames, dim=2)
    mean = chunks[0].mean(2, keepdim=True)
    return torch.cat([chunks[0], *(chunk - chunk.mean(2, keepdim=True) + mean for chunk in chunks[1:])], dim=2)
