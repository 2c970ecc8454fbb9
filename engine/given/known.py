"""Latent frames that are known before denoising and keep their value.

Before every step they replace what was denoised, at the noise of the step or at `max_noise` if that is less: x_s = (1 - s) x_0 + s n,
s = min(sigma, max_noise), with the initial noise n. All other frames attend to them, and at the end they equal x_0. Model and method
are unchanged. A picture where the checkpoint was trained for one is its `Condition` instead, and so are the first latent frames of a
checkpoint that `takes_prefix`: those of a video to continue, or of a picture, never have noise.
"""

import contextlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from engine.adapters import ModelAdapter, VideoSpec
from engine.adapters.base import Condition
from engine.config import ANY_FRAME
from engine.decode.pieces import make_ready
from engine.errors import UserError
from engine.files.latents import load_latents
from engine.given.frames import MAX_NOISE, GivenFrames, GivenImage, span_of
from engine.given.image import read_image
from engine.media.read_video import check_colours, frame_rate, measure, read_video
from engine.ranks.agreement import from_first
from parallel.mesh import SeqMesh

_LATENTS = ".safetensors"
# A video at 23.976 frames a second may be continued at 24.
_RATE_ERROR = 0.01
_NO_VIDEO = "--extend {} cannot be read as a video"


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """Known latent frames.

    Attributes:
        latents: [1, z, K, h, w] fp32 of the known frames, in order.
        frames: their indices, int64 [K].
        noise: the run's first noise at those frames, as `latents`; None until it is drawn.
        max_noise: the most noise that they have before a step.
        clean: how many of them, from the first on, have no noise at any step: those of a `Condition`.
    """

    latents: Tensor
    frames: Tensor
    noise: Tensor | None = None
    max_noise: float | None = None
    clean: int = 0

    def with_noise(self, noise: Tensor, device: torch.device, max_noise: float = MAX_NOISE) -> "Known":
        """Move to a device and select the noise of the known frames from that of the whole video, [1, z, F, h, w]."""
        frames = self.frames.to(device)
        own = noise.to(device).index_select(2, frames).contiguous()
        return replace(self, latents=self.latents.to(device), frames=frames, noise=own, max_noise=max_noise)

    def put(self, latents: Tensor, sigma: float) -> Tensor:
        """Replace the known frames in latents [1, z, F, h, w], at noise level sigma or `max_noise`, whichever is less."""
        assert self.noise is not None and self.max_noise is not None
        level = min(sigma, self.max_noise)
        here = self.latents if level == 0.0 else (1.0 - level) * self.latents + level * self.noise
        if self.clean:
            here = torch.cat([self.latents[:, :, : self.clean], here[:, :, self.clean :]], dim=2)
        return latents.index_copy(2, self.frames, here.to(latents.dtype))


def check_given(
    given: GivenFrames | None, spec: VideoSpec, *, num_frames: int, height: int, width: int, fps: int
) -> list[str]:
    """Check the given files without a model; returns notes for the user, one sentence each.

    Raises:
        UserError: a picture is missing without which the checkpoint makes no video, or such a checkpoint is given a video to continue, a
            file cannot be read or has another size or rate, the video to continue is as long as the new one, two files fill one latent
            frame, or no frame is left to make.
    """
    check_places(given, spec, num_frames=num_frames, fps=fps)
    if given is None:
        return []
    notes: list[str] = []
    if given.extend is not None:
        begun, notes = _look_at_begun(given.extend, spec, height=height, width=width, fps=fps)
        if spec.num_frames(begun) >= num_frames:
            raise UserError(
                f"--extend {given.extend} has {spec.num_frames(begun)} frames, and video.num_frames, which counts them, is "
                f"{num_frames}; ask for more"
            )
        check_places(given, spec, num_frames=num_frames, fps=fps, begun=begun)
        notes += _describe_prefix(given.extend, spec, begun)
    for image in given.images:
        read_image(image.path, height, width)
    return [*notes, *given.describe(num_frames=num_frames, fps=fps, step=spec.temporal_factor, pictures=spec.pictures)]


def check_places(given: GivenFrames | None, spec: VideoSpec, *, num_frames: int, fps: int, begun: int = 1) -> None:
    """Check where the given frames lie, without opening a file.

    `begun` is the number of latent frames of the video to continue, if there is one; it has at least one.

    Raises:
        UserError: a picture is missing without which the checkpoint makes no video, one lies beyond the video or in what is continued,
            two of them fill one latent frame, or no frame is left to make.
    """
    check_needs(given, spec, num_frames=num_frames, fps=fps)
    if given is not None:
        _check_room(given, spec, num_frames=num_frames, fps=fps, begun=begun)


def lengths_with(given: GivenFrames | None, spec: VideoSpec, lengths: Iterable[int], *, fps: int) -> list[int]:
    """Those of these numbers of frames that have the given frames and one left to make.

    Of a video to continue whose file is not here one latent frame counts.
    """
    if given is None:
        return list(lengths)
    begun = 1 if given.extend is None or not given.extend.exists() else count_begun(given.extend, spec)
    found = []
    for frames in lengths:
        with contextlib.suppress(UserError):
            _check_room(given, spec, num_frames=frames, fps=fps, begun=begun)
            found.append(frames)
    return found


def count_begun(path: Path, spec: VideoSpec) -> int:
    """Latent frames of a video to continue, which is saved latents or a video file; UserError if it cannot be read."""
    if path.suffix == _LATENTS:
        return _read_latents(path, spec.latent_shape(spec.num_frames(1), 0, 0)[:2]).shape[2]
    return _whole_latents(_measured(path)[0], spec)


def _check_room(given: GivenFrames, spec: VideoSpec, *, num_frames: int, fps: int, begun: int) -> None:
    step = spec.temporal_factor
    begun = 0 if given.extend is None else begun
    taken: dict[int, GivenImage] = {}
    apart = ANY_FRAME in spec.pictures  # each picture has tokens of its own
    for image in given.images:
        latent = given.latent(image, num_frames, fps, step)
        if latent < begun:
            raise UserError(
                f"--given {image.where}={image.path} lies in the frames of --extend {given.extend}; leave it out"
            )
        place = round(image.frame(num_frames, fps)) if apart else latent
        if place in taken:
            where = f"on one frame ({place})" if apart else f"into one latent frame (frames {span_of(latent, step)})"
            raise UserError(f"--given {taken[place].where} and {image.where} fall {where}; leave one out")
        taken[place] = image
    # What a checkpoint sees as channels, or beside the video, is denoised all the same.
    trained = given.trained(num_frames=num_frames, fps=fps, pictures=spec.pictures)
    seen = [image for place, image in trained.items() if place != "first" or not spec.takes_prefix]
    fixed = begun + sum(image not in seen for image in given.images)
    if fixed >= spec.latent_shape(num_frames, 0, 0)[2]:
        raise UserError(
            f"the given frames fill the whole video of {num_frames} frame{'s' * (num_frames > 1)}, and none is left to make; set "
            f"video.num_frames to {num_frames + step} or more"
        )


def refuse_extend(given: GivenFrames | None, spec: VideoSpec) -> None:
    """Raise UserError for a video to continue, if the checkpoint was trained to be given pictures."""
    if spec.needs and given is not None and given.extend is not None:
        last = " and a picture as --given last=FILE" if "last" in spec.needs else ""
        raise UserError(
            f"--extend {given.extend} is refused: this checkpoint makes videos of pictures and cannot continue one; leave it out and "
            f"give the video's last frame as --given first=FILE{last}, or choose a text-to-video checkpoint"
        )


def check_needs(given: GivenFrames | None, spec: VideoSpec, *, num_frames: int, fps: int) -> None:
    """Raise UserError for a checkpoint that was trained to be given pictures, without one of them or with a video to continue."""
    refuse_extend(given, spec)
    there = {} if given is None else given.trained(num_frames=num_frames, fps=fps, pictures=spec.needs)
    missing = [place for place in spec.needs if place not in there]
    if missing and len(spec.needs) > spec.latent_shape(num_frames, 0, 0)[2]:
        raise UserError(
            f"this checkpoint makes videos between two pictures, which one frame cannot have; set video.num_frames to "
            f"{num_frames + spec.temporal_factor} or more"
        )
    if missing:
        flags, which = (" and ".join(word.format(place) for place in missing) for word in ("--given {}=FILE", "{}"))
        raise UserError(
            f"this checkpoint makes videos of pictures, and no picture is given for the {which} frame; give {flags}"
        )


def read_given(
    given: GivenFrames,
    adapter: ModelAdapter,
    pipe: Any,
    spec: VideoSpec,
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: int,
) -> tuple[Known | None, Condition | None]:
    """Encode the given frames, on the CPU, without noise: those that stay known, and the condition of the others.

    An image at the first frame is one latent frame; elsewhere it is encoded as a still video, whose second latent frame is used.
    Of a video the last frames that fill whole latent frames are encoded; latents are used as they are.

    Raises:
        UserError: see `check_given`.
    """
    check_given(given, spec, num_frames=num_frames, height=height, width=width, fps=fps)
    step = spec.temporal_factor
    trained = given.trained(num_frames=num_frames, fps=fps, pictures=spec.pictures)
    condition = None
    if trained:
        pixels = {place: read_image(image.path, height, width) for place, image in trained.items()}
        make_ready(pipe.vae)
        with torch.no_grad():
            condition = adapter.condition(pipe, pixels, num_frames=num_frames)
    by_frame: dict[int, Tensor] = {}
    if given.extend is not None:
        begun = _read_begun(given.extend, adapter, pipe.vae, spec, size=(height, width))
        by_frame = dict(enumerate(begun.split(1, dim=2)))
        if spec.takes_prefix:
            condition = replace(condition or Condition(), latents=begun)
    elif condition is not None and condition.latents is not None:
        by_frame = dict(enumerate(condition.latents.cpu().split(1, dim=2)))
    for image in given.images:
        if image in trained.values():
            continue
        latent = given.latent(image, num_frames, fps, step)
        still = np.repeat(read_image(image.path, height, width)[None], 1 if latent == 0 else 1 + step, axis=0)
        by_frame[latent] = encode_frames(adapter, pipe.vae, still)[:, :, -1:]
    if not by_frame:
        return None, condition
    frames = sorted(by_frame)
    known = torch.cat([by_frame[frame] for frame in frames], dim=2)
    clean = 0 if condition is None else condition.clean_frames
    return Known(latents=known, frames=torch.tensor(frames), clean=clean), condition


def read_given_on_ranks(
    given: GivenFrames, adapter: ModelAdapter, pipe: Any, spec: VideoSpec, *, mesh: SeqMesh, **size: int
) -> tuple[Known | None, Condition | None]:
    """`read_given` by rank 0, which alone may see the files, for every rank."""

    def read() -> bytes:
        known, condition = read_given(given, adapter, pipe, spec, **size)
        return safetensors.torch.save(_packed("known", known) | _packed("condition", condition))

    found = safetensors.torch.load(from_first(mesh, read, "given frames"))
    known, condition = (_unpacked(name, found) for name in ("known", "condition"))
    if known:
        known |= {"clean": int(known["clean"])}
    if condition:
        condition |= {"moments": tuple(condition["moments"].int().tolist())}
    return Known(**known) if known else None, Condition(**condition) if condition else None


def _packed(name: str, value: Known | Condition | None) -> dict[str, Tensor]:
    """The tensors and numbers of a dataclass that are set, as tensors by dotted name."""
    every = {} if value is None else {field.name: getattr(value, field.name) for field in fields(value)}
    return {
        f"{name}.{key}": torch.as_tensor(part).cpu().contiguous() for key, part in every.items() if part is not None
    }


def _unpacked(name: str, found: dict[str, Tensor]) -> dict[str, Any]:
    return {key.removeprefix(f"{name}."): part for key, part in found.items() if key.startswith(f"{name}.")}


def _look_at_begun(path: Path, spec: VideoSpec, *, height: int, width: int, fps: int) -> tuple[int, list[str]]:
    """Latent frames of the video to continue, and a note if some of its frames are left out."""
    if not path.is_file():
        raise UserError(f"cannot read --extend {path}: it is not a file")
    if path.suffix == _LATENTS:
        return _load_begun(path, spec, height, width).shape[2], []
    frames, rows, columns = _measured(path)
    rate = frame_rate(path)
    if rate is None:
        raise UserError(_NO_VIDEO.format(path))
    check_colours(path)
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


def _measured(path: Path) -> tuple[int, int, int]:
    """Frames, rows and columns of a video to continue."""
    size = measure(path)
    if size is None or size[0] == 0:
        raise UserError(_NO_VIDEO.format(path))
    return size


def _describe_prefix(path: Path, spec: VideoSpec, begun: int) -> list[str]:
    """A note if the video to continue is a condition, and whether the checkpoint's own pipeline takes so much of it."""
    if not spec.takes_prefix:
        return []
    last = spec.num_frames(begun) - 1
    frames = f"frames 0 to {last}" if last else "frame 0"
    trained = ANY_FRAME in spec.pictures or begun == 1
    alone = "; diffusers' pipeline of this checkpoint takes frame 0 alone"
    said = ", which this checkpoint was trained for" if trained else alone
    return [f"{path.name} is the condition of {frames}{said}"]


def _whole_latents(frames: int, spec: VideoSpec) -> int:
    """The number of latent frames that the last frames of a video fill: one frame for the first, `temporal_factor` for each other."""
    return (frames - 1) // spec.temporal_factor + 1


def _load_begun(path: Path, spec: VideoSpec, height: int, width: int) -> Tensor:
    batch, channels, _, *size = spec.latent_shape(spec.num_frames(1), height, width)
    latents = _read_latents(path, (batch, channels), size).float()
    if not latents.isfinite().all():
        raise UserError(f"--extend {path} holds numbers that are not finite; make it again")
    return latents


def _read_latents(path: Path, first: Sequence[int], size: Sequence[int] | None = None) -> Tensor:
    """Latents [*first, F, *size] to continue, of any size if none is given; UserError for others."""
    latents = load_latents(path)[0]
    shape = list(latents.shape)
    if len(shape) != 5 or shape[:2] != list(first) or (size and shape[3:] != list(size)) or not latents.numel():
        wanted = ", ".join(map(str, [*first, "F", *(size or ("h", "w"))]))
        raise UserError(
            f"--extend {path} holds latents of shape {shape}, and this video's are [{wanted}]; give latents of the same model and size"
        )
    return latents


def _read_begun(
    path: Path, adapter: ModelAdapter, vae: torch.nn.Module, spec: VideoSpec, *, size: tuple[int, int]
) -> Tensor:
    """Latents [1, z, F, h, w] of the video to continue."""
    if path.suffix == _LATENTS:
        return _load_begun(path, spec, *size)
    kept = spec.num_frames(count_begun(path, spec))
    return encode_frames(adapter, vae, np.stack(deque(read_video(path), maxlen=kept)))


@torch.no_grad()
def encode_frames(adapter: ModelAdapter, vae: torch.nn.Module, pixels: np.ndarray) -> Tensor:
    """Encode uint8 [T, H, W, 3] to latents [1, z, F, h, w], fp32 on the CPU."""
    return adapter.encode_pixels(vae, pixels).cpu()
