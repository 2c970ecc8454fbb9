"""`freepca`: shared principal components over time from the global branch, the rest from views (arXiv 2505.01172)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

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


class ViewWeights(NamedTuple):
    """`merge` [V, W] fp64: weight of each frame of a view; `counts` [V] int64: components that a view takes."""

    merge: Tensor
    counts: Tensor


@dataclass(frozen=True, kw_only=True)
class FreePCA(Method):
    """Settings of FreePCA: in the noisy steps every view but the first is fused with its part of the global branch.

    View m takes its min(m, `components`) most similar components, and its mean over time, from the global branch. Its noise
    is `freespec.noise.reuse_mean`, a separate setting (`sampler.noise`).

    Attributes:
        domain: whether `fused_share` is of the `timestep` (1000 = pure noise), as published, or of the `step` numbers.
        fused_share: share of the run that fuses, counted from noise (published: while t > 250 of 1000).
        components: most components that a view takes.
        stride: latent frames from one view to the next; None is a quarter of the view (published: 4 for 16).
        query_scale_by: entropy factor sqrt(log keys / log native keys) of the global branch's queries, with keys counted in
            `tokens` or, as in a model that attends over time alone, in `frames`; `none`: 1.
        compat: as published, frames that the stride misses are in no view and get zeros, and the null direction of centred
            rows is ranked among the components.
    """

    noise: ClassVar[Noise] = "mean_reuse"

    domain: Literal["timestep", "step"] = "timestep"
    fused_share: float = 0.75
    components: int = 3
    stride: int | None = None
    query_scale_by: Literal["tokens", "frames", "none"] = "tokens"
    compat: bool = False

    def __post_init__(self) -> None:
        """Check every number and word, since a wrong one would give a plausible video."""
        check_stride("freepca", self.stride)
        check_choice("freepca", "domain", self.domain, ("timestep", "step"))
        check_choice("freepca", "query_scale_by", self.query_scale_by, ("tokens", "frames", "none"))
        if not 0.0 <= self.fused_share <= 1.0:
            raise ValueError(f"freepca: fused_share must lie in [0, 1], got {self.fused_share}")
        if self.components < 0:
            raise ValueError(f"freepca: components must be 0 or more, got {self.components}")

    @property
    def refused_axes(self) -> Mapping[str, str]:
        """Views cross any shard of the tokens; heads may be split, since their sums are added up."""
        return {"ring": "its views need all tokens of a head on one rank"}

    def check_window(self, window_frames: int) -> None:
        """Views must touch each other."""
        check_stride_covers("freepca", self.stride, window_frames)

    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        """Views and the global branch while t > 1000 (1 - fused_share), or in the first ceil(fused_share n) of n steps; then views."""
        if self.domain == "timestep":
            stop = freespec.schedule.last_timestep(self.fused_share)
            fused = [t > stop for t in timesteps]
        else:
            num_fused = freespec.schedule.first_steps(self.fused_share, len(timesteps))
            fused = [index < num_fused for index in range(len(timesteps))]
        return [StepPlan(mode="views_global" if each else "views") for each in fused]

    def view_starts(self, grid: Grid) -> tuple[int, ...]:
        """Every `stride` frames, and one at the end where they miss it."""
        stride = self.stride or default_stride(grid.window_frames)
        return freespec.views.view_starts(grid.frames, grid.window_frames, stride, cover=not self.compat)

    def query_scale(self, grid: Grid) -> float:
        """sqrt(log keys / log native keys): longer sets of keys spread attention, larger queries sharpen it again."""
        if self.query_scale_by == "none":
            return 1.0
        per_frame = grid.frame_tokens if self.query_scale_by == "tokens" else 1
        native = grid.window_frames * per_frame
        if native < 2:  # log 1 = 0: attention over one key has no entropy to keep
            return 1.0
        return math.sqrt(math.log(grid.frames * per_frame) / math.log(native))

    def weights(self, step: StepPlan, grid: Grid, head_dim: int, device: Device) -> ViewWeights:
        """Equal weights over the views of a frame, and min(m, components) components for view m = 0, 1, .."""
        starts = self.view_starts(grid)
        merge = freespec.views.view_weights(starts, grid.frames, [1] * grid.window_frames)
        counts = [min(index, self.components) for index in range(len(starts))]
        return ViewWeights(merge=merge.to(device), counts=merge.new_tensor(counts).long().to(device))

    def fuse(self, branches: Branches, weights: ViewWeights, layer: Layer) -> Tensor:
        """The mean over views, each but the first fused first in steps that have a global branch."""
        starts, grid = self.view_starts(layer.grid), layer.grid
        outputs: Iterable[Tensor] = branches.views
        if branches.o_global is not None:
            outputs = self._fused(list(branches.views), branches.o_global, weights, layer)
        return freespec.views.merge_views(outputs, weights.merge, starts, grid.frames)

    def _fused(self, outputs: list[Tensor], o_global: Tensor, weights: ViewWeights, layer: Layer) -> Iterable[Tensor]:
        """The views with their shared components exchanged, in place of a global slice each.

        The sums of all views go over the ranks together: one small message per layer.
        """
        grid = layer.grid
        window = grid.window_frames
        slices = [o_global[:, a * grid.frame_tokens :][:, : window * grid.frame_tokens] for a in self.view_starts(grid)]
        pairs = list(zip(outputs, slices, strict=True))
        yield outputs[0]
        if not pairs[1:]:
            return
        total = layer.sum_heads(freespec.components.grams_of_views(pairs[1:], window))
        projection = freespec.components.shared_projection(total, weights.counts[1:], compat=self.compat)
        local, far = freespec.components.mixing_matrices(projection)
        for index, (view, part) in enumerate(pairs[1:]):
            yield freespec.components.mix_frames(view, part, (local[index], far[index]))
