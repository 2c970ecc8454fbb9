"""`lvsa`: a narrow window and anchor frames that move from step to step, as many keys as at native length (arXiv 2605.31057)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from freespec.methods.base import Branches, FrameSet, Grid, Layer, Method, StepPlan
from freespec.types import Tensor


@dataclass(frozen=True, kw_only=True)
class LVSA(Method):
    """Settings of LVSA: each frame sees anchor frames and a window around it, in every layer and step.

    Attributes:
        half_width: latent frames on either side of a frame that its window has, beside anchors in it (published: 12 frames of
            the video, 3 latent frames of Wan).
        first_frames: latent frames at the start that are anchors in every step.
        budget: frames that a query sees, over those of the native length; the distance of anchors follows from it. The window
            and the first frames are seen even if they are more.
        rotate: anchors move by one frame each step.
    """

    half_width: int = 3
    first_frames: int = 1
    budget: float = 1.0
    rotate: bool = True

    def __post_init__(self) -> None:
        """Check every number, since a wrong one would give a plausible video."""
        if self.half_width < 0 or self.first_frames < 0:
            raise ValueError(
                f"lvsa: half_width and first_frames must be 0 or more, got {self.half_width} and {self.first_frames}"
            )
        if not 0.0 < self.budget < float("inf"):
            raise ValueError(f"lvsa: budget must be a finite number, more than 0, got {self.budget}")

    @property
    def refused_axes(self) -> Mapping[str, str]:
        """Anchors are spread over the whole video."""
        return {"ring": "its anchor frames need all tokens of a head on one rank"}

    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        """Frames of their own for each frame, in every step."""
        return [StepPlan(mode="frames", number=number) for number in range(len(timesteps))]

    def frame_sets(self, step: StepPlan, grid: Grid) -> Sequence[FrameSet]:
        """Anchors and window of each frame."""
        interval = self._interval(grid)
        anchors = self._anchors(grid.frames, interval, step.number % interval if self.rotate else 0)
        return [[sorted(anchors | self._window(frame, grid.frames, anchors)) for frame in range(grid.frames)]]

    def fuse(self, branches: Branches, weights: Any, layer: Layer) -> Tensor:
        """The one branch, [B, S, N, D]."""
        [out] = branches.sets
        return out

    def _frames_seen(self, window_frames: int) -> int:
        return max(self.first_frames + 1, int(window_frames * self.budget))

    def _interval(self, grid: Grid) -> int:
        """Frames from one anchor to the next: the larger of two rules, the published code's.

        The first is the largest that has as many anchors as the budget leaves beside the window, the second the quotient of
        frames and budget, both less those that are seen anyway.
        """
        seen, frames = self._frames_seen(grid.window_frames), grid.frames
        if frames <= seen:
            return 1
        wanted = max(self.first_frames, seen - min(2 * self.half_width + 1, frames))
        counts = {every: len(self._anchors(frames, every, 0)) for every in range(1, frames + 1)}
        by_count = max((every for every, count in counts.items() if count >= wanted), default=1)
        mandatory = 2 * self.half_width + self.first_frames
        return max(by_count, -(-max(frames - mandatory, seen - mandatory) // max(seen - mandatory, 1)))

    def _anchors(self, frames: int, interval: int, offset: int) -> set[int]:
        """The first frames, and every `interval`-th from `offset` on, round the end: as many of them at any offset."""
        spread = {(offset + index * interval) % frames for index in range(-(-frames // interval))}
        return spread | set(range(min(self.first_frames, frames)))

    def _window(self, frame: int, frames: int, anchors: set[int]) -> set[int]:
        """2 half_width + 1 frames around one, shifted at the ends, grown left and right in turn until so many are no anchors."""
        if self.half_width == 0:
            return set()
        width = 2 * self.half_width
        first = max(0, min(frame - self.half_width, frames - 1 - width))
        last = min(frames - 1, max(frame + self.half_width, width))
        wanted = min(width + 1, frames - len(anchors))
        left = True
        while len(set(range(first, last + 1)) - anchors) < wanted:
            if left and first > 0:
                first -= 1
            elif not left and last < frames - 1:
                last += 1
            left = not left
        return set(range(first, last + 1))
