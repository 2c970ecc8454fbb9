"""Latent frames that are known before a video is denoised, and keep their value.

At every step they are put in place of what was denoised, at the step's noise: x_t = (1 - sigma) x_0 + sigma n, with the noise n that
the run began with, so that they move on the straight line of flow matching. Every other frame attends to them, and at the end they are
x_0 itself. Nothing of the model or the method changes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.adapters import ModelAdapter, VideoSpec
from engine.checkpoint import load_latents
from engine.errors import UserError
from engine.given import GivenFrames, GivenImage, span_of
from engine.read_image import read_image
from engine.read_video import read_video

_LATENTS = ".safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """Latent frames that are known.

    Attributes:
        latents: [1, z, K, h, w] fp32 of the known frames, in order.
        frames: their indices, int64 [K].
        noise: the run's first noise at those frames, as `latents`; None until it is drawn.
    """

    latents: Tensor
    frames: Tensor
    noise: Tensor | None = None

    def with_noise(self, noise: Tensor, device: torch.device) -> "Known":
        """The same on a device, with noise [1, z, F, h, w] of the whole video."""
        frames = self.frames.to(device)
        return Known(
            latents=self.latents.to(device), frames=frames, noise=noise.to(device).index_select(2, frames).contiguous()
        )

    def put(self, latents: Tensor, sigma: float) -> Tensor:
        """Latents [1, z, F, h, w] with the known frames at the noise sigma."""
        assert self.noise is not None
        here = self.latents if sigma == 0.0 else (1.0 - sigma) * self.latents + sigma * self.noise
        return latents.index_copy(2, self.frames, here.to(latents.dtype))


def check_given(given: GivenFrames, *, num_frames: int, height: int, width: int, fps: int, step: int) -> None:
    """Raise UserError for files that cannot be read, and for two images in one latent frame."""
    taken: dict[int, GivenImage] = {}
    for image in given.images:
        read_image(image.path, height, width)
        latent = given.latent(image, num_frames, fps, step)
        if latent in taken:
            raise UserError(
                f"--given {taken[latent].where} and {image.where} fall into one latent frame (frames {span_of(latent, step)}); leave one out"
            )
        taken[latent] = image
    if given.extend is not None and not given.extend.is_file():
        raise UserError(f"--extend {given.extend} is no file")


@torch.no_grad()
def read_known(
    given: GivenFrames,
    adapter: ModelAdapter,
    vae: torch.nn.Module,
    spec: VideoSpec,
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: int,
) -> Known:
    """The latents of what is given, on the CPU, without noise.

    A picture at the first frame is one latent frame; elsewhere it is encoded as a still, of which the second latent frame is taken.
    A video is encoded from its end on, as many frames as latent frames hold; latents are taken as they are.

    Raises:
        UserError: a file cannot be read or has another size, or what is gone on from is as long as the video.
    """
    step = spec.temporal_factor
    by_frame: dict[int, Tensor] = {}
    if given.extend is not None:
        begun = _read_begun(given.extend, adapter, vae, spec, height=height, width=width)
        total = spec.latent_shape(num_frames, height, width)[2]
        if begun.shape[2] >= total:
            raise UserError(
                f"--extend {given.extend} has {spec.num_frames(begun.shape[2])} frames, and video.num_frames, which counts them, is "
                f"{num_frames}; ask for more"
            )
        by_frame = dict(enumerate(begun.split(1, dim=2)))
    for image in given.images:
        latent = given.latent(image, num_frames, fps, step)
        if latent in by_frame:
            raise UserError(
                f"--given {image.where}={image.path} lies in the frames of --extend {given.extend}; leave it out"
            )
        pixels = np.repeat(read_image(image.path, height, width)[None], 1 if latent == 0 else 1 + step, axis=0)
        by_frame[latent] = _encode(adapter, vae, pixels)[:, :, -1:]
    frames = sorted(by_frame)
    return Known(latents=torch.cat([by_frame[frame] for frame in frames], dim=2), frames=torch.tensor(frames))


def _read_begun(
    path: Path,
    adapter: ModelAdapter,
    vae: torch.nn.Module,
    spec: VideoSpec,
    *,
    height: int,
    width: int,
) -> Tensor:
    """Latents [1, z, F, h, w] of the video that is gone on from."""
    if path.suffix == _LATENTS:
        latents = load_latents(path)[0].float()
        wanted = spec.latent_shape(spec.num_frames(1), height, width)
        if latents.dim() != 5 or (*latents.shape[:2], *latents.shape[3:]) != (*wanted[:2], *wanted[3:]):
            raise UserError(
                f"--extend {path} holds latents of shape {list(latents.shape)}, and this video's are [{wanted[0]}, {wanted[1]}, F, "
                f"{wanted[3]}, {wanted[4]}]; give latents of the same model and size"
            )
        if not latents.isfinite().all():
            raise UserError(f"--extend {path} holds numbers that are not finite; make it again")
        return latents
    pixels = np.stack(list(read_video(path)))
    if pixels.shape[1:3] != (height, width):
        raise UserError(
            f"--extend {path} is {pixels.shape[1]} x {pixels.shape[2]} pixels, and the video is {height} x {width}; set video.height "
            "and video.width to its size"
        )
    keep = (len(pixels) - 1) // spec.temporal_factor * spec.temporal_factor + 1
    return _encode(adapter, vae, pixels[-keep:])


def _encode(adapter: ModelAdapter, vae: torch.nn.Module, pixels: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] to latents [1, z, F, h, w], fp32 on the CPU."""
    frames = torch.from_numpy(pixels.copy()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
    return adapter.encode(vae, frames).float().cpu()
