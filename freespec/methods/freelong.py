"""`freelong`: low frequencies of the global branch, high ones of the local branch (arXiv 2407.19918)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import freespec
from freespec.methods.base import Branches, Grid, Layer, Method, Noise, StepPlan
from freespec.types import Device, Tensor

Matrices = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class FreeLong(Method):
    """Settings of FreeLong: O_l + LPF(O_g - O_l) in every layer and step, with FreeNoise's reshuffled noise.

    The local branch is the engine's window of exactly `window_frames` frames; the published code has one frame more in the
    middle of the video for even lengths, and exactly as many for odd ones.

    Attributes:
        cutoff_time: deviation of the Gaussian over temporal frequency, in Nyquists.
        cutoff_space: the same over vertical and horizontal frequency.
        taps: None is the filter itself; an odd number cuts it to a blur of that many weights per axis (11 are within 1e-3).
        compat: the published frequency grid, whose zero lies half a bin off for an odd number of frames, rows or columns.
    """

    noise: ClassVar[Noise] = "freenoise"

    cutoff_time: float = 0.25
    cutoff_space: float = 0.25
    taps: int | None = None
    compat: bool = False

    def __post_init__(self) -> None:
        """Check every number, since a wrong one would give a plausible video."""
        for name in ("cutoff_time", "cutoff_space"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"freelong: {name} must be a finite number, more than 0, got {getattr(self, name)}")
        if self.taps is not None and (self.taps < 1 or self.taps % 2 == 0):
            raise ValueError(f"freelong: taps must be an odd number, 1 or more, got {self.taps}")
        if self.taps is not None and self.compat:
            raise ValueError("freelong: taps have no published frequency grid; set one of taps and compat")

    @property
    def refused_axes(self) -> Mapping[str, str]:
        """The filter mixes all frames, rows and columns of a head."""
        return {"ring": "its low-pass filter needs all tokens of a head on one rank"}

    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        """Both branches in every step."""
        return [StepPlan(mode="dual") for _ in timesteps]

    def weights(self, step: StepPlan, grid: Grid, head_dim: int, device: Device) -> Matrices:
        """One matrix per axis: over frames, rows and columns."""
        return (
            self._matrix(grid.frames, self.cutoff_time).to(device),
            self._matrix(grid.rows, self.cutoff_space).to(device),
            self._matrix(grid.columns, self.cutoff_space).to(device),
        )

    def fuse(self, branches: Branches, weights: Matrices, layer: Layer) -> Tensor:
        """O_l + LPF(O_g - O_l), [B, s, N, D]."""
        o_local, o_global, grid = branches.o_local, branches.o_global, layer.grid
        assert o_local is not None and o_global is not None, "freelong fuses two branches"
        size = (grid.frames, grid.rows, grid.columns)
        return freespec.lowpass.add_low(o_local, o_local, o_global, weights, size=size)

    def _matrix(self, size: int, cutoff: float) -> Tensor:
        if self.compat:
            return freespec.lowpass.uncentred_blur_matrix(size, cutoff)
        if self.taps is not None:
            return freespec.lowpass.tap_matrix(size, cutoff, self.taps)
        return freespec.lowpass.blur_matrix(size, cutoff)
