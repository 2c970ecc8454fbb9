"""`freenoise`: reshuffled noise, and attention inside overlapping views with triangular weights (arXiv 2310.15169)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import freespec
from freespec.methods.base import (
    Branches,
    Grid,
    Layer,
    Method,
    Noise,
    StepPlan,
    check_choice,
    check_stride,
    check_stride_covers,
)
from freespec.types import Device, Tensor
from freespec.windows import default_stride


@dataclass(frozen=True, kw_only=True)
class FreeNoise(Method):
    """Settings of FreeNoise. Its noise is `freespec.noise.reshuffle`, a separate setting (`sampler.noise`).

    Attributes:
        attention: `views`, as published, or `window`: the sliding window of the other methods, with FreeNoise's noise.
        stride: latent frames from one view to the next, and number that the noise shuffles at a time unless
            `sampler.noise_stride` is set; None is a quarter of the view (published: 4 for 16).
        last_view: `shifted` adds a view that ends with the video where the stride misses its last frames; `new_frames`
            lets that view count for those frames only.
        compat: as published, no such view: frames that the stride misses get no attention output at all (zeros).
    """

    noise: ClassVar[Noise] = "freenoise"

    attention: Literal["views", "window"] = "views"
    stride: int | None = None
    last_view: Literal["shifted", "new_frames"] = "shifted"
    compat: bool = False

    def __post_init__(self) -> None:
        """Check every number and word, since a wrong one would give a plausible video."""
        check_stride("freenoise", self.stride)
        check_choice("freenoise", "attention", self.attention, ("views", "window"))
        check_choice("freenoise", "last_view", self.last_view, ("shifted", "new_frames"))
        if self.compat and self.last_view != "shifted":
            raise ValueError(
                f"freenoise: compat has no last view, and last_view is {self.last_view}; set one of the two"
            )
        if self.attention == "window" and (self.compat or self.last_view != "shifted"):
            name = "compat true" if self.compat else f"last_view {self.last_view}"
            raise ValueError(
                f"freenoise: attention window has no views for {name}; leave it out, or use attention views"
            )

    @property
    def noise_stride(self) -> int | None:
        """As published: one stride for the views and the noise."""
        return self.stride

    @property
    def refused_axes(self) -> Mapping[str, str]:
        """Views cross any shard of the tokens."""
        return {"ring": "its views need all tokens of a head on one rank"} if self.attention == "views" else {}

    def check_window(self, window_frames: int) -> None:
        """Views must touch each other."""
        if self.attention == "views":
            check_stride_covers("freenoise", self.stride, window_frames)

    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        """The same branch in every step."""
        return [StepPlan(mode="views" if self.attention == "views" else "local") for _ in timesteps]

    def view_starts(self, grid: Grid) -> tuple[int, ...]:
        """Every `stride` frames, and one at the end where they miss it."""
        stride = self.stride or default_stride(grid.window_frames)
        return freespec.views.view_starts(grid.frames, grid.window_frames, stride, cover=not self.compat)

    def weights(self, step: StepPlan, grid: Grid, head_dim: int, device: Device) -> Tensor:
        """Triangular weights of each view, [V, W] fp64, normalised over the views of a frame."""
        starts = self.view_starts(grid)
        stride = self.stride or default_stride(grid.window_frames)
        new_only = self.last_view == "new_frames" and starts[-1] % stride != 0
        profile = freespec.views.triangle(grid.window_frames)
        return freespec.views.view_weights(starts, grid.frames, profile, last_new_only=new_only).to(device)

    def fuse(self, branches: Branches, weights: Tensor, layer: Layer) -> Tensor:
        """Weighted mean over the views of each frame."""
        return freespec.views.merge_views(branches.views, weights, self.view_starts(layer.grid), layer.grid.frames)
