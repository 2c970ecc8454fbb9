"""Pictures of a running video without its VAE: a linear map from latents to colours, fitted once per VAE by least squares."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from engine.errors import UserError
from engine.files.tensors import DAMAGED, read_metadata
from engine.files.whole import atomic_path
from engine.media.contact_sheet import spaced
from engine.paths import SHIPPED

FOLDER = SHIPPED / "configs" / "previews"
MOST_FRAMES, MOST_PIXELS = 24, 208
_NORMALISED_BY = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")


@dataclass(frozen=True, kw_only=True)
class PreviewFactors:
    """A linear map from one latent position to the colours of r x r pixels of a small picture.

    Attributes:
        weight: [z, 3 r r], for normalised latents and colours in [0, 1]; pixels by row, column and channel.
        bias: [3 r r].
        vae: `vae_digest` of the VAE that they were fitted for.
    """

    weight: Tensor
    bias: Tensor
    vae: str

    def colours(self, latents: Tensor) -> Tensor:
        """Colours [F, h r, w r, 3] of latents [z, F, h, w], not clamped."""
        r = math.isqrt(len(self.bias) // 3)
        mapped = latents.movedim(0, -1) @ self.weight + self.bias
        frames, rows, columns, _ = mapped.shape
        pixels = mapped.reshape(frames, rows, columns, r, r, 3).permute(0, 1, 3, 2, 4, 5)
        return pixels.reshape(frames, rows * r, columns * r, 3)

    def save(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Write them whole or not at all, with `facts` about the fit."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        with atomic_path(path) as part:
            part.write_bytes(safetensors.torch.save(tensors, {"vae": self.vae, "fit": json.dumps(facts)}))


def load_factors(path: Path) -> PreviewFactors:
    """Read factors; UserError for another file."""
    try:
        metadata = read_metadata(path) or {}
        tensors = safetensors.torch.load(path.read_bytes())
        weight, bias = tensors["weight"].float(), tensors["bias"].float()
        r = math.isqrt(len(bias) // 3)
        if weight.ndim != 2 or weight.shape[1:] != bias.shape or 3 * r * r != len(bias):
            raise ValueError(f"its shapes are {tuple(weight.shape)} and {tuple(bias.shape)}")
        return PreviewFactors(weight=weight, bias=bias, vae=metadata["vae"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (UserError, *DAMAGED) as error:
        raise UserError(f"{path} holds no factors of a preview ({error}); make them with previews.py") from error


def find_factors(vae: Any, given: Path | None = None) -> PreviewFactors | None:
    """The factors of a VAE: those of the file `given`, or of one in configs/previews; None if that has none.

    UserError for a file that was fitted for another VAE, whose colours would be wrong.
    """
    digest = vae_digest(vae)
    if given is None:
        paths = sorted(FOLDER.glob("*.safetensors"))
        return next((load_factors(path) for path in paths if (read_metadata(path) or {}).get("vae") == digest), None)
    factors = load_factors(given)
    if factors.vae != digest:
        raise UserError(f"{given} was fitted for another VAE; fit one for this with previews.py")
    return factors


def vae_digest(vae: Any) -> str:
    """SHA-256 of a VAE: the first and last numbers of each tensor, as bf16 so that the dtype it is loaded in changes nothing, and
    how its latents are normalised.
    """
    digest = hashlib.sha256()
    tensors = sorted(vae.state_dict().items())
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
    ends = [torch.cat((flat[:8], flat[-8:])) for _, tensor in tensors if len(flat := tensor.detach().flatten())]
    sample = torch.cat([each.float() for each in ends]).to(torch.bfloat16).cpu()
    digest.update(sample.view(torch.int16).numpy().tobytes())
    digest.update(json.dumps([vae.config.get(name) for name in _NORMALISED_BY]).encode())
    return digest.hexdigest()


@dataclass
class PreviewFit:
    """Least squares of decoded pixels on latents, over any number of videos.

    Attributes:
        pixels: r, rows and columns of the picture per latent row and column.
        step: frames per latent frame, after the first.
    """

    pixels: int
    step: int
    _xx: Any = field(default=0.0, init=False)
    _xy: Any = field(default=0.0, init=False)
    _y: Any = field(default=0.0, init=False)
    _yy: Any = field(default=0.0, init=False)

    def add(self, latents: Tensor, frames: np.ndarray) -> None:
        """Add a video: latents [z, F, h, w], and its frames, uint8 [T, H, W, 3]."""
        x = latents.double().movedim(0, -1).flatten(0, 2)
        x = torch.cat((x, torch.ones(len(x), 1, dtype=x.dtype)), dim=1)
        y = self.targets(frames, latents.shape[2:]).flatten(0, 2)
        self._xx, self._xy = self._xx + x.T @ x, self._xy + x.T @ y
        self._y, self._yy = self._y + y.sum(0), self._yy + y.square().sum(0)

    def targets(self, frames: np.ndarray, size: tuple[int, ...]) -> Tensor:
        """Colours [F, h, w, 3 r r] that each latent of `size` (h, w) stands for: means over its frames and over its pixels."""
        r, (rows, columns) = self.pixels, size
        first = torch.from_numpy(frames[:1]).double()
        rest = torch.from_numpy(frames[1:]).double().unflatten(0, (-1, self.step)).mean(1)
        small = torch.cat((first, rest)).movedim(-1, 1) / 255
        small = torch.nn.functional.adaptive_avg_pool2d(small, (rows * r, columns * r))
        cells = small.reshape(len(small), 3, rows, r, columns, r)
        return cells.permute(0, 2, 4, 3, 5, 1).flatten(3)

    def solve(self, vae: str) -> tuple[PreviewFactors, float]:
        """The factors, and the share of the variance that they explain."""
        solved = torch.linalg.lstsq(self._xx, self._xy, driver="gelsd").solution
        count = self._xx[-1, -1]
        left = (self._yy - 2 * (solved * self._xy).sum(0) + (solved * (self._xx @ solved)).sum(0)).sum()
        share = 1 - float(left / (self._yy - self._y.square() / count).sum())
        return PreviewFactors(weight=solved[:-1].float(), bias=solved[-1].float(), vae=vae), share


@dataclass(frozen=True, kw_only=True)
class Previewer:
    """Writes a preview of a running video every few steps, from the predicted final latents.

    Attributes:
        factors: of the VAE.
        path: the animated WebP, written atomically.
        every: steps between previews; the last step has one.
        seconds: length of the video.
    """

    factors: PreviewFactors
    path: Path
    every: int
    seconds: float

    def __call__(self, finished: int, total: int, latents: Tensor, velocity: Tensor, sigma: float) -> None:
        """Take latents [1, z, F, h, w] before a step, and the velocity and noise level there; `finished` counts this step."""
        if finished % self.every and finished != total:
            return
        kept = spaced(latents.shape[2], MOST_FRAMES)
        estimate = latents[0, :, kept] - sigma * velocity[0, :, kept]
        write_preview(self.path, self.factors.colours(estimate.float().cpu()), seconds=self.seconds)


def write_preview(path: Path, colours: Tensor, *, seconds: float) -> None:
    """Write colours [F, H, W, 3] in [0, 1] as a looping animated WebP of at most `MOST_PIXELS` a side."""
    frames = (colours.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    pictures = [Image.fromarray(frame) for frame in frames]
    for picture in pictures:
        picture.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.BOX)
    each = max(20, round(1000 * seconds / len(pictures)))
    with atomic_path(path) as part, part.open("wb") as file:
        options = {"save_all": True, "append_images": pictures[1:], "duration": each, "loop": 0}
        pictures[0].save(file, "WEBP", quality=70, method=1, **options)
