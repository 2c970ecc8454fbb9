"""`freelong_pp`: several windows, each for a band of frequencies: the wider the window, the lower (arXiv 2507.00162)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import freespec
from freespec.methods.base import Branches, FrameSet, Grid, Layer, Method, Noise, StepPlan
from freespec.types import Device, Tensor

Matrices = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class FreeLongPP(Method):
    """Settings of FreeLong++: O_1 + LPF_2(O_2 - O_1) + LPF_4(O_4 - O_2) + .. in every layer and step.

    O_a is attention in windows of `a` native lengths, a = 1, 2, 4, .. until one window has the whole video. LPF_a keeps what lies
    below the band of the next narrower window.

    Attributes:
        cutoff_time: deviation of the Gaussian LPF_a over temporal frequency, times a, in Nyquists (published: 1 / 2a).
        cutoff_space: the same over vertical and horizontal frequency, for every a.
        key_stride: the widest branch sees the keys of every so many frames (published: 1, and 2 as a faster form).
    """

    noise: ClassVar[Noise] = "freenoise"

    cutoff_time: float = 0.5
    cutoff_space: float = 0.25
    key_stride: int = 1

    def __post_init__(self) -> None:
        """Check every number, since a wrong one would give a plausible video."""
        for name in ("cutoff_time", "cutoff_space"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"freelong_pp: {name} must be a finite number, more than 0, got {getattr(self, name)}")
        if self.key_stride < 1:
            raise ValueError(f"freelong_pp: key_stride must be 1 or more frames, got {self.key_stride}")

    @property
    def refused_axes(self) -> Mapping[str, str]:
        """The filters mix all frames, rows and columns of a head."""
        return {"ring": "its filters need all tokens of a head on one rank"}

    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        """All windows in every step."""
        return [StepPlan(mode="frames") for _ in timesteps]

    def frame_sets(self, step: StepPlan, grid: Grid) -> Sequence[FrameSet]:
        """The windows of each scale, the narrowest first, shifted at the ends; the widest is the same for every frame."""
        *windows, _ = (scale * grid.window_frames for scale in self._scales(grid))
        starts = [[min(max(f - width // 2, 0), grid.frames - width) for f in range(grid.frames)] for width in windows]
        sets: list[FrameSet] = [
            [range(start, start + width) for start in each] for width, each in zip(windows, starts, strict=True)
        ]
        return [*sets, [range(0, grid.frames, self.key_stride)] * grid.frames]

    def weights(self, step: StepPlan, grid: Grid, head_dim: int, device: Device) -> list[Matrices]:
        """For each scale but the first one matrix per axis: over frames, rows and columns."""
        blur = freespec.lowpass.blur_matrix
        space = [blur(size, self.cutoff_space).to(device) for size in (grid.rows, grid.columns)]
        return [
            (blur(grid.frames, self.cutoff_time / scale).to(device), space[0], space[1])
            for scale in self._scales(grid)[1:]
        ]

    def fuse(self, branches: Branches, weights: list[Matrices], layer: Layer) -> Tensor:
        """The sum of all bands, [B, S, N, D], added up in fp32 at least."""
        size = (layer.grid.frames, layer.grid.rows, layer.grid.columns)
        sets = iter(branches.sets)
        narrow = next(sets)
        total = narrow if narrow.element_size() > 4 else narrow.float()
        for wide, matrices in zip(sets, weights, strict=True):
            total = freespec.lowpass.add_low(total, narrow, wide, matrices, size=size)
            narrow = wide
        return total.to(narrow.dtype)

    def _scales(self, grid: Grid) -> list[int]:
        """Windows in native lengths: 1, 2, 4, .. up to the first that has the whole video."""
        scales = [1]
        while scales[-1] * grid.window_frames < grid.frames:
            scales.append(2 * scales[-1])
        return scales
