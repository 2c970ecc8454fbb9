"""Latent frames that are known before denoising and keep their value.

Before every step they replace what was denoised, at the noise of the step or at MAX_NOISE if that is less: x_s = (1 - s) x_0 + s n,
s = min(sigma, MAX_NOISE), with the initial noise n. All other frames attend to them, and at the end they equal x_0. Model and method
are unchanged.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from engine.adapters import ModelAdapter, VideoSpec
from engine.denoise.saved import load_latents
from engine.errors import UserError
from engine.given.frames import MAX_NOISE, GivenFrames, GivenImage, span_of
from engine.given.image import read_image
from engine.media.read_video import check_colours, frame_rate, measure, read_video
from engine.ranks.agreement import from_first
from parallel.mesh import SeqMesh

_LATENTS = ".safetensors"
# A video at 23.976 frames a second may be continued at 24.
_RATE_ERROR = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """Known latent frames.

    Attributes:
        latents: [1, z, K, h, w] fp32 of the known frames, in order.
        frames: their indices, int64 [K].
        noise: the run's first noise at those frames, as `latents`; None until it is drawn.
    """

    latents: Tensor
    frames: Tensor
    noise: Tensor | None = None

    def with_noise(self, noise: Tensor, device: torch.device) -> "Known":
        """Move to a device and select the noise of the known frames from that of the whole video, [1, z, F, h, w]."""
        frames = self.frames.to(device)
        return Known(
            latents=self.latents.to(device), frames=frames, noise=noise.to(device).index_select(2, frames).contiguous()
        )

    def put(self, latents: Tensor, sigma: float) -> Tensor:
        """Replace the known frames in latents [1, z, F, h, w], at noise level sigma or MAX_NOISE, whichever is less."""
        assert self.noise is not None
        level = min(sigma, MAX_NOISE)
        here = self.latents if level == 0.0 else (1.0 - level) * self.latents + level * self.noise
        return latents.index_copy(2, self.frames, here.to(latents.dtype))


def check_given(
    given: GivenFrames, spec: VideoSpec, *, num_frames: int, height: int, width: int, fps: int
) -> list[str]:
    """Check the given files without a model; returns notes for the user, one sentence each.

    Raises:
        UserError: a file cannot be read or has another size or rate, the video to continue is as long as the new one, or two
            files fill one latent frame.
    """
    step, begun = spec.temporal_factor, 0
    notes: list[str] = []
    if given.extend is not None:
        begun, notes = _look_at_begun(given.extend, spec, height=height, width=width, fps=fps)
        if spec.num_frames(begun) >= num_frames:
            raise UserError(
                f"--extend {given.extend} has {spec.num_frames(begun)} frames, and video.num_frames, which counts them, is "
                f"{num_frames}; ask for more"
            )
    taken: dict[int, GivenImage] = {}
    for image in given.images:
        read_image(image.path, height, width)
        latent = given.latent(image, num_frames, fps, step)
        if latent < begun:
            raise UserError(
                f"--given {image.where}={image.path} lies in the frames of --extend {given.extend}; leave it out"
            )
        if latent in taken:
            raise UserError(
                f"--given {taken[latent].where} and {image.where} fall into one latent frame (frames {span_of(latent, step)}); leave one out"
            )
        taken[latent] = image
    return [*notes, *given.describe(num_frames=num_frames, fps=fps, step=step)]


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
    """Encode the given frames to latents, on the CPU, without noise.

    An image at the first frame is one latent frame; elsewhere it is encoded as a still video, whose second latent frame is used.
    Of a video the last frames that fill whole latent frames are encoded; latents are used as they are.

    Raises:
        UserError: see `check_given`.
    """
    check_given(given, spec, num_frames=num_frames, height=height, width=width, fps=fps)
    step = spec.temporal_factor
    by_frame: dict[int, Tensor] = {}
    if given.extend is not None:
        by_frame = dict(enumerate(_read_begun(given.extend, adapter, vae, spec, size=(height, width)).split(1, dim=2)))
    for image in given.images:
        latent = given.latent(image, num_frames, fps, step)
        pixels = np.repeat(read_image(image.path, height, width)[None], 1 if latent == 0 else 1 + step, axis=0)
        by_frame[latent] = encode_frames(adapter, vae, pixels)[:, :, -1:]
    frames = sorted(by_frame)
    return Known(latents=torch.cat([by_frame[frame] for frame in frames], dim=2), frames=torch.tensor(frames))


def read_known_on_ranks(
    given: GivenFrames, adapter: ModelAdapter, vae: torch.nn.Module, spec: VideoSpec, *, mesh: SeqMesh, **size: int
) -> Known:
    """`read_known` by rank 0, which alone may see the files, for every rank."""

    def read() -> bytes:
        known = read_known(given, adapter, vae, spec, **size)
        return safetensors.torch.save({"latents": known.latents, "frames": known.frames})

    return Known(**safetensors.torch.load(from_first(mesh, read, "given frames")))


def _look_at_begun(path: Path, spec: VideoSpec, *, height: int, width: int, fps: int) -> tuple[int, list[str]]:
    """Latent frames of the video to continue, and a note if some of its frames are left out."""
    if not path.is_file():
        raise UserError(f"cannot read --extend {path}: it is not a file")
    if path.suffix == _LATENTS:
        return _load_begun(path, spec, height, width).shape[2], []
    size, rate = measure(path), frame_rate(path)
    if size is None or size[0] == 0 or rate is None:
        raise UserError(f"--extend {path} cannot be read as a video")
    check_colours(path)
    frames, rows, columns = size
    if (rows, columns) != (height, width):
        raise UserError(
            f"--extend {path} is {rows} x {columns} pixels, and the video is {height} x {width}; set video.height "
            "and video.width to its size"
        )
    if abs(rate - fps) > _RATE_ERROR * fps:
        raise UserError(
            f"--extend {path} has {float(rate):g} frames a second, and video.fps is {fps}; set video.fps to its rate, or convert it"
        )
    latents = _whole_latents(frames, spec)
    left_out = frames - spec.num_frames(latents)
    notes = [f"of {path.name} the first {left_out} of {frames} frames are left out, which fill no latent frame"]
    return latents, notes if left_out else []


def _whole_latents(frames: int, spec: VideoSpec) -> int:
    """The number of latent frames that the last frames of a video fill: one frame for the first, `temporal_factor` for each other."""
    return (frames - 1) // spec.temporal_factor + 1


def _load_begun(path: Path, spec: VideoSpec, height: int, width: int) -> Tensor:
    latents = load_latents(path)[0].float()
    wanted = spec.latent_shape(spec.num_frames(1), height, width)
    if (
        latents.dim() != 5
        or (*latents.shape[:2], *latents.shape[3:]) != (*wanted[:2], *wanted[3:])
        or not latents.numel()
    ):
        raise UserError(
            f"--extend {path} holds latents of shape {list(latents.shape)}, and this video's are [{wanted[0]}, {wanted[1]}, F, "
            f"{wanted[3]}, {wanted[4]}]; give latents of the same model and size"
        )
    if not latents.isfinite().all():
        raise UserError(f"--extend {path} holds numbers that are not finite; make it again")
    return latents


def _read_begun(
    path: Path, adapter: ModelAdapter, vae: torch.nn.Module, spec: VideoSpec, *, size: tuple[int, int]
) -> Tensor:
    """Latents [1, z, F, h, w] of the video to continue."""
    if path.suffix == _LATENTS:
        return _load_begun(path, spec, *size)
    found = measure(path)
    kept = spec.num_frames(_whole_latents(found[0] if found else 1, spec))
    return encode_frames(adapter, vae, np.stack(deque(read_video(path), maxlen=kept)))


@torch.no_grad()
def encode_frames(adapter: ModelAdapter, vae: torch.nn.Module, pixels: np.ndarray) -> Tensor:
    """Encode uint8 [T, H, W, 3] to latents [1, z, F, h, w], fp32 on the CPU."""
    frames = torch.from_numpy(pixels.copy()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
    return adapter.encode(vae, frames).float().cpu()
