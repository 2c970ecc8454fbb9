"""The noise that a video starts from, the same on any device."""

import torch
from torch import Tensor

from freespec.methods import Noise
from freespec.noise import relate_frames


def draw_noise(
    shape: tuple[int, ...], seed: int | torch.Generator, kind: Noise = "iid", *, window_frames: int = 1, stride: int = 1
) -> Tensor:
    """Draw standard normal noise [1, z, F, h, w], fp32 on the CPU, from a CPU generator, as the stock pipelines do.

    Kinds other than `iid` relate the frames after the first `window_frames` to those (freespec.noise), with further draws from
    the same generator. A generator in place of a seed continues from its state.
    """
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    return relate_frames(noise, kind, window_frames=window_frames, stride=stride, generator=generator)
