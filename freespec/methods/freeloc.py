"""`freeloc`: far keys at coarse temporal positions in some layers, and fewer of them in others (arXiv 2603.25209)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from freespec.methods.base import Grid, Method, StepPlan, Tier

# Published for 21 latent frames: exact and half-exact distances at 2 times that length and at 4 times, dense and striped distances,
# and exact distances of anchors. Other native lengths have their share.
PUBLISHED_NATIVE = 21
NEAR, MIDDLE = {2: 12, 4: 10}, {2: 20, 4: 14}
LONG = 3  # times the native length from which the second of both is taken
DENSE, STRIPED, ANCHORED = 8, 24, 12


@dataclass(frozen=True, kw_only=True)
class FreeLOC(Method):
    """Settings of FreeLOC: each layer has one of two treatments, in every step; null lengths are the published share of the native one.

    `position_layers` attend to all keys (VRPR). Those nearer than `near_frames` have their own temporal positions, those nearer than
    `middle_frames` positions in groups of `middle_group` frames, all others in groups of `far_group`, so that every relative position
    is one of training. `sparse_layers` attend to fewer keys (TSA): whole frames nearer than `dense_frames`, a stripe of rows nearer
    than `striped_frames`, and the first and last frames, whose positions are in groups beyond `anchor_near_frames`. Layers in neither
    list have full attention.

    Attributes:
        position_layers: layers, counted from 0; null: all that are not in `sparse_layers`.
        sparse_layers: layers, counted from 0. The published ones are of Wan2.1 1.3B (configs/wan2.1-t2v-1.3b.yaml).
        near_frames: distances below this are exact.
        middle_frames: distances below this are in groups of `middle_group`.
        middle_group: frames that share a position, 2 or more.
        far_group: the same beyond; more where so few would exceed the native length.
        dense_frames: distances below this are seen whole.
        striped_frames: distances below this are seen as a stripe.
        stripe: rows above and below a query's own that the stripe has, as a share of all, rounded up.
        first_frames: frames at the start that every query sees.
        last_frames: frames at the end that every query sees.
        anchor_near_frames: distances of first and last frames below this are exact.
    """

    position_layers: tuple[int, ...] | None = None
    sparse_layers: tuple[int, ...] = ()
    near_frames: int | None = None
    middle_frames: int | None = None
    middle_group: int = 2
    far_group: int = 8
    dense_frames: int | None = None
    striped_frames: int | None = None
    stripe: float = 0.125
    first_frames: int = 1
    last_frames: int = 3
    anchor_near_frames: int | None = None

    def __post_init__(self) -> None:
        """Check every number, since a wrong one would give a plausible video."""
        positions = self.position_layers or ()
        if twice := sorted({*positions} & {*self.sparse_layers}):
            raise ValueError(f"freeloc: layer {twice[0]} is in position_layers and in sparse_layers; leave it in one")
        if (least := min((*positions, *self.sparse_layers), default=0)) < 0:
            raise ValueError(f"freeloc: layers are counted from 0, got {least}")
        for name in ("near_frames", "middle_frames", "dense_frames", "striped_frames", "anchor_near_frames"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"freeloc: {name} must be 1 or more, got {value}")
        if min(self.middle_group, self.far_group) < 2:
            raise ValueError(
                f"freeloc: middle_group and far_group must be 2 or more, got {self.middle_group} and {self.far_group}"
            )
        if not 0.0 <= self.stripe <= 1.0:
            raise ValueError(f"freeloc: stripe must lie in [0, 1], got {self.stripe}")
        if min(self.first_frames, self.last_frames) < 0:
            raise ValueError(
                f"freeloc: first_frames and last_frames must be 0 or more, got {self.first_frames} and {self.last_frames}"
            )

    @property
    def refused_axes(self) -> Mapping[str, str]:
        """Tiers are counted in whole frames of the video."""
        return {"ring": "its tiers need all tokens of a head on one rank"}

    def check_window(self, window_frames: int) -> None:
        """A native length that leaves positions for the keys beyond the exact ones, at any length of the video."""
        for frames in (LONG * window_frames - 1, LONG * window_frames):  # either of the published pairs
            near, middle, used = self._exact(frames, window_frames)
            one, two = self._named("near_frames", near), self._named("middle_frames", middle)
            if near >= window_frames:
                raise ValueError(f"freeloc: {one} must be less than the native length of {window_frames} frames")
            if near > middle:
                raise ValueError(f"freeloc: {one} is more than {two}; lower it, or give a larger middle_frames")
            if used >= window_frames:
                raise ValueError(
                    f"freeloc: {one}, {two} and middle_group {self.middle_group} take {used} positions of a native length of "
                    f"{window_frames} frames and leave none for farther keys; lower near_frames or middle_frames"
                )
        if (anchor := self._share(self.anchor_near_frames, ANCHORED, window_frames)) >= window_frames:
            raise ValueError(
                f"freeloc: anchor_near_frames must be less than the native length of {window_frames} frames, got {anchor}"
            )
        dense, striped = self._sparse(window_frames)
        if striped < dense:
            raise ValueError(f"freeloc: striped_frames {striped} is less than dense_frames {dense}")

    def check_layers(self, num_layers: int) -> None:
        """Layers that exist."""
        for name in ("position_layers", "sparse_layers"):
            if (last := max(getattr(self, name) or (), default=0)) >= num_layers:
                raise ValueError(
                    f"freeloc: {name} has layer {last}, and the model has {num_layers}, 0 to {num_layers - 1}; layers are those of one "
                    "checkpoint"
                )

    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        """Tiers in every step."""
        return [StepPlan(mode="tiers") for _ in timesteps]

    def tiers(self, grid: Grid, num_layers: int) -> Sequence[tuple[Tier, ...]]:
        """The tiers of each layer, by its treatment."""
        frames = grid.frames
        whole = (Tier(start=(0,) * frames, stop=(frames,) * frames),)
        positions, sparse = self._position_tiers(frames, grid.window_frames), self._sparse_tiers(grid)
        layers = range(num_layers)
        positioned = layers if self.position_layers is None else self.position_layers
        return [
            sparse if layer in self.sparse_layers else positions if layer in positioned else whole for layer in layers
        ]

    def _position_tiers(self, frames: int, native: int) -> tuple[Tier, ...]:
        """Exact distances, and half-exact and coarse ones of the past and of the future: every frame is seen once."""
        near, middle, used = self._exact(frames, native)
        group = self._group(frames, middle, used, native)
        halves = near - near // self.middle_group
        coarse = used - middle // group
        return (
            _around(frames, near),
            *_grouped(frames, near, middle, group=self.middle_group, shift=halves),
            *_grouped(frames, middle, frames, group=group, shift=coarse, last=native - 1),
        )

    def _sparse_tiers(self, grid: Grid) -> tuple[Tier, ...]:
        """Near frames, stripes of those farther away, and first and last frames at any distance."""
        frames, native = grid.frames, grid.window_frames
        dense, striped = self._sparse(native)
        first = min(self.first_frames, frames)
        last = max(frames - self.last_frames, first)
        rows = math.ceil(self.stripe * grid.rows)
        exact = self._share(self.anchor_near_frames, ANCHORED, native)
        group = self._group(frames, exact, exact, native)
        shift = exact - exact // group
        anchors = (0, first), (last, frames)
        near_anchors = [_cut(tier, *ends) for ends in anchors for tier in _sides(frames, dense, exact)]
        far_anchors = [
            _cut(tier, *ends)
            for ends in anchors
            for tier in _grouped(frames, max(dense, exact), frames, group=group, shift=shift, last=native - 1)
        ]
        stripes = [_cut(tier, first, last, rows) for tier in _sides(frames, dense, striped)]
        made = (_around(frames, dense), *stripes, *near_anchors, *far_anchors)
        return tuple(tier for tier in made if any(map(int.__lt__, tier.start, tier.stop)))

    def _named(self, name: str, value: int) -> str:
        """A setting and its value, for a message."""
        return f"{name} {value}" + ("" if getattr(self, name) is not None else " (default)")

    def _exact(self, frames: int, native: int) -> tuple[int, int, int]:
        """Distances that are exact, and half-exact; and the number of relative positions that both take."""
        times = 4 if frames >= LONG * native else 2
        near = self._share(self.near_frames, NEAR[times], native)
        middle = self.middle_frames
        if middle is None:  # the published share, and less where it would leave no position for farther keys
            middle = min(self._share(None, MIDDLE[times], native), near + (native - 1 - near) * self.middle_group)
        return near, middle, near - (near - middle) // self.middle_group

    def _sparse(self, native: int) -> tuple[int, int]:
        """Distances that are seen whole, and as a stripe."""
        return self._share(self.dense_frames, DENSE, native), self._share(self.striped_frames, STRIPED, native)

    def _group(self, frames: int, exact: int, used: int, native: int) -> int:
        """Frames to a coarse position: `far_group`, or as many as bring all distances from `exact` on to the positions not used."""
        return max(self.far_group, -(-(frames - exact) // (native - used)))

    @staticmethod
    def _share(given: int | None, published: int, native: int) -> int:
        return given if given is not None else max(1, round(published * native / PUBLISHED_NATIVE))


def _around(frames: int, reach: int) -> Tier:
    """Frames nearer than `reach`, at their own positions."""
    numbers = range(frames)
    return Tier(
        start=tuple(max(frame - reach + 1, 0) for frame in numbers),
        stop=tuple(min(frame + reach, frames) for frame in numbers),
    )


def _sides(frames: int, reach: int, stop: int) -> tuple[Tier, Tier]:
    """Frames of the past and of the future at distances [reach, stop), at their own positions."""
    numbers = range(frames)
    return (
        Tier(
            start=tuple(max(frame - stop + 1, 0) for frame in numbers),
            stop=tuple(max(frame - reach + 1, 0) for frame in numbers),
        ),
        Tier(
            start=tuple(min(frame + reach, frames) for frame in numbers),
            stop=tuple(min(frame + stop, frames) for frame in numbers),
        ),
    )


def _grouped(
    frames: int, reach: int, stop: int, *, group: int, shift: int, last: int | None = None
) -> tuple[Tier, Tier]:
    """Frames at distances [reach, stop), `group` to a position; the later of query and key is `shift` later, `last` at most.

    Positions of other frames than the video's have no row in a rotary table.
    """
    coarse = tuple(frame // group for frame in range(frames))
    later = tuple(min(position + shift, frames - 2 if last is None else last) for position in coarse)
    past, future = _sides(frames, reach, stop)
    return (
        Tier(start=past.start, stop=past.stop, q_positions=later, k_positions=coarse),
        Tier(start=future.start, stop=future.stop, q_positions=coarse, k_positions=later),
    )


def _cut(tier: Tier, first: int, stop: int, rows: int | None = None) -> Tier:
    """The part of a tier with frames [first, stop), in stripes of rows if given."""
    return Tier(
        start=tuple(max(start, first) for start in tier.start),
        stop=tuple(min(end, stop) for end in tier.stop),
        q_positions=tier.q_positions,
        k_positions=tier.k_positions,
        rows=rows,
    )
