"""A video on cfg x ring x ulysses ranks in integers: possible degrees, and what the busiest rank holds and sends."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Literal, cast

from engine.config import MethodConfig, SamplerConfig, VideoConfig
from engine.errors import as_user_error
from engine.given.frames import Places
from engine.planner.model import FP32_BYTES, ModelSpec
from engine.ranks.layouts import Degrees, refused_axes
from freespec.far_keys import far_tokens
from freespec.methods import LVSA, FreeNoise, Grid, Method, Mode, Tier
from freespec.methods.base import names_frames, names_tiers
from freespec.windows import window_range
from parallel.shards import (
    HaloRange,
    LayerShape,
    Route,
    SequencePlan,
    cfg_bytes,
    choose_local_route,
    gather_bytes,
    halo_needs,
    layer_bytes_by_rank,
    length,
    token_unit,
)
from parallel.shards import Mode as SentMode

PASSES = 2  # with guidance: conditional and unconditional
VIEW_MODES: tuple[Mode, ...] = ("views_global", "views")
FP64_BYTES = 8
WHOLE_MODES: tuple[Mode, ...] = (*VIEW_MODES, "frames", "tiers")  # of all tokens of a head on one rank
NOTHING_GIVEN = Places()
TEMPORAL_GRAMS = 3  # of both branches and between them, frames x frames


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one rank computes of one forward.

    Attributes:
        tokens: S, all tokens of the video.
        window: tokens that a query of the local branch sees.
        shard: s, this rank's tokens outside attention.
        queries: r, its tokens inside attention.
        heads: n, its heads inside attention.
    """

    tokens: int
    window: int
    shard: int
    queries: int
    heads: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One video over ranks.

    Attributes:
        spec: the checkpoint.
        degrees: cfg, ring, ulysses.
        frames: F, latent frames, and pictures whose tokens stand beside them.
        rows: H, rows of tokens of a frame.
        columns: W, tokens of a row.
        window_frames: F0, frames of the local window, F at most.
        text: K, text tokens.
        passes: forwards of one step: 2 with guidance.
        itemsize: bytes of a number in the transformer.
        local_route: how local steps cross the ulysses axis.
        num_views: views of a step with views; with views ring is 1.
        set_frames: frames of keys of a query in a step that names them, all branches together.
        tier_tokens: keys of a query in a step with tiers, the mean over queries and layers; 0 for a method without tiers.
        weight_share: bytes of the transformer that each rank sends the others in every forward (model.weights zero3).
        even: whether parallel.provider takes even shards alone.
        kept: tokens of each frame that dual steps attend to outside the windows; None for all.
        given: places of conditions without noise.
        cache: sampler.cache.
    """

    spec: ModelSpec
    degrees: Degrees
    frames: int
    rows: int
    columns: int
    window_frames: int
    text: int
    passes: int
    itemsize: int
    local_route: Route
    num_views: int = 1
    set_frames: int = 0
    tier_tokens: int = 0
    weight_share: int = 0
    even: bool = False
    kept: int | None = None
    given: Places = NOTHING_GIVEN
    cache: str = "none"

    @property
    def video_frames(self) -> int:
        """Latent frames of the video alone."""
        return self.frames - len(self.given.moments)

    @property
    def frame_tokens(self) -> int:
        """H·W, tokens of a frame."""
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """S."""
        return self.frames * self.frame_tokens

    @property
    def sequence(self) -> SequencePlan:
        """Tokens and heads over ring x ulysses."""
        return plan_sequence(self.tokens, self.spec.heads, self.degrees, even=self.even)

    @property
    def halo(self) -> HaloRange:
        """Keys that the windows of some queries hold."""
        return _halo(self.frames, self.frame_tokens, self.window_frames)

    @property
    def forwards(self) -> int:
        """Passes of one step that one rank runs, one after the other or as one batch."""
        return self.passes // self.degrees[0]

    @property
    def calls(self) -> int:
        """Number of times that one rank calls the transformer in one step."""
        return 1 if self.spec.adapter.batches_guidance else self.forwards

    @property
    def batch(self) -> int:
        """B, videos in one forward: models differ in whether guidance is two forwards or a batch of two."""
        return self.forwards if self.spec.adapter.batches_guidance else 1

    def attention_plan(self, mode: Mode) -> SequencePlan:
        """The plan that attention of this mode follows: local steps may keep all heads on each shard."""
        return self.sequence.on_shards() if mode == "local" and self.local_route == "halo" else self.sequence

    def share(self, mode: Mode) -> Share:
        """What the busiest rank computes of one forward."""
        plan = self.attention_plan(mode)
        return Share(
            tokens=self.tokens,
            window=self.window_frames * self.frame_tokens,
            shard=max(map(length, plan.shards)),
            queries=max(map(length, plan.ring_shards)),
            heads=max(map(length, plan.head_shares)),
        )

    def thins(self, mode: Mode) -> bool:
        """Whether steps of this mode attend to a sample of the keys outside the windows."""
        return mode == "dual" and self.kept is not None

    @property
    def kept_tokens(self) -> int:
        """Tokens of the sample, which every rank of a ring gathers."""
        return self.frames * (self.kept or 0)

    def keys(self, mode: Mode) -> int:
        """Keys that a query sees in both branches together, those of views aside."""
        window = self.window_frames * self.frame_tokens
        if self.thins(mode):
            return window + (self.frames - self.window_frames) * (self.kept or 0)
        return {
            "local": window,
            "views": 0,
            "frames": self.set_frames * self.frame_tokens,
            "tiers": self.tier_tokens,
        }.get(mode, self.tokens)

    def near_keys(self, mode: Mode) -> int:
        """Most tokens whose keys a rank holds beside its own q, k and v before the ring turns; 0 without a ring."""
        plan = self.attention_plan(mode)
        if plan.ring == 1:
            return 0
        if mode == "global":
            return max(map(length, plan.ring_shards))
        return max(map(length, halo_needs(plan.ring_shards, self.halo, plan.tokens)))

    def step_bytes(self, mode: Mode) -> dict[str, int]:
        """Bytes that the busiest rank sends in one step by kind: all_to_all, halo, ring, far, grams, gather, cfg, weights."""
        plan = self.attention_plan(mode)
        shape = LayerShape(batch=1, head_dim=self.spec.head_dim, itemsize=self.itemsize)
        # Views are attended where the whole heads are, so they travel as a global step does.
        moves = "global" if mode in WHOLE_MODES else mode
        by_rank = layer_bytes_by_rank(plan, cast(SentMode, moves), shape=shape, halo=self.halo)
        calls = self.spec.layers * self.forwards
        busiest = {kind: calls * max(of_rank[kind] for of_rank in by_rank) for kind in by_rank[0]}
        values = latent_values(self)
        return {
            "all_to_all": busiest["all_to_all"],
            "halo": busiest["halo"],
            "ring": 0 if self.thins(mode) else busiest["ring"],
            "far": calls * self._far_bytes() if self.thins(mode) else 0,
            "grams": calls * self._temporal_gram_bytes() if mode == "views_global" else busiest["reduce"],
            "gather": self.forwards * gather_bytes(self.sequence, token_bytes=values * self.itemsize),
            "cfg": cfg_bytes(self.degrees[0], prediction_bytes=prediction_bytes(self)),
            "weights": self.calls * self.weight_share * (prod(self.degrees) - 1),
        }

    def _far_bytes(self) -> int:
        """Bytes of the sample in the largest ring shard, k and v, to each other member of the ring; up to a few tokens."""
        plan = self.sequence
        shard, heads = (max(map(length, spans)) for spans in (plan.ring_shards, plan.head_shares))
        sample = -(-shard * self.kept_tokens // self.tokens)
        return 2 * sample * heads * self.spec.head_dim * self.itemsize * (plan.ring - 1)

    def _temporal_gram_bytes(self) -> int:
        """Bytes of the frames x frames matrices of every view but the first, to each other member of the ulysses axis."""
        matrices = TEMPORAL_GRAMS * (self.num_views - 1) * self.window_frames**2
        return matrices * FP64_BYTES * (self.degrees[2] - 1)

    def axis_span(self, kind: str, mode: Mode) -> int:
        """Neighbouring world ranks that a message of this kind can cross; ulysses is the innermost axis."""
        cfg, ring, ulysses = self.degrees
        if kind == "all_to_all" or (kind == "grams" and mode in VIEW_MODES):
            return ulysses
        return cfg * ring * ulysses if kind in ("cfg", "weights") else ring * ulysses


def lay_out(  # noqa: PLR0913 - a video, its ranks, and settings of attention
    spec: ModelSpec,
    degrees: Degrees,
    video: VideoConfig,
    sampler: SamplerConfig,
    method: MethodConfig,
    *,
    itemsize: int,
    local_route: Literal["auto", "halo", "all_to_all"],
    even: bool = False,
    far: int | str = "all",
    given: Places = NOTHING_GIVEN,
) -> Layout:
    """The layout of a video; `local_route: auto` takes fewer bytes, as the engine does. UserError for too few `far` keys."""
    frames, rows, columns = spec.token_grid(video.num_frames, video.height, video.width)
    frames += len(given.moments)
    frame_tokens = rows * columns
    window_frames = min(method.window_frames, frames)
    with as_user_error():
        kept = far_tokens(far, num_frames=frames, frame_tokens=frame_tokens, window_frames=window_frames)
    if local_route == "auto":
        sequence = plan_sequence(frames * frame_tokens, spec.heads, degrees, even=even)
        shape = LayerShape(batch=1, head_dim=spec.head_dim, itemsize=itemsize)
        local_route = choose_local_route(sequence, shape=shape, halo=_halo(frames, frame_tokens, window_frames))
    return Layout(
        spec=spec,
        degrees=degrees,
        frames=frames,
        rows=rows,
        columns=columns,
        window_frames=window_frames,
        text=sampler.max_text_tokens,
        passes=num_passes(sampler),
        itemsize=itemsize,
        local_route=local_route,
        num_views=_count_views(method, frames, frame_tokens),
        set_frames=_count_set_frames(method, frames, frame_tokens),
        tier_tokens=_count_tier_tokens(
            method.method, Grid(frames=frames, rows=rows, columns=columns, window_frames=window_frames), spec.layers
        ),
        even=even,
        kept=kept,
        given=given,
        cache=sampler.cache,
    )


def plan_sequence(tokens: int, heads: int, degrees: Degrees, *, even: bool) -> SequencePlan:
    """Tokens and heads over ranks of these degrees, in `even` shards or in whole units."""
    _, ring, ulysses = degrees
    unit = token_unit(tokens, ring * ulysses, even=even)
    return SequencePlan(tokens=tokens, heads=heads, ring=ring, ulysses=ulysses, unit=unit)


def _count_views(method: MethodConfig, frames: int, frame_tokens: int) -> int:
    """Number of views of the method, or of FreeNoise's published stride for a method without views."""
    grid = Grid(frames=frames, rows=1, columns=frame_tokens, window_frames=min(method.window_frames, frames))
    made = method.method
    has_views = any(step.mode in VIEW_MODES for step in made.plan([1000.0, 1.0]))
    return len((made if has_views else FreeNoise()).view_starts(grid))


def _count_set_frames(method: MethodConfig, frames: int, frame_tokens: int) -> int:
    """Frames of keys of a query of the method, or of LVSA for a method that names no frames."""
    grid = Grid(frames=frames, rows=1, columns=frame_tokens, window_frames=min(method.window_frames, frames))
    made = method.method if names_frames(method.method) else LVSA()
    return sum(max(map(len, each)) for each in made.frame_sets(made.plan([1000.0, 1.0])[0], grid))


def _count_tier_tokens(method: Method, grid: Grid, num_layers: int) -> int:
    """Keys of a query of a method with tiers, the mean over queries and layers."""
    if not names_tiers(method) or grid.frames <= grid.window_frames:
        return 0

    def seen(tier: Tier) -> float:
        reach = grid.rows if tier.rows is None else tier.rows
        rows = [min(row + reach + 1, grid.rows) - max(row - reach, 0) for row in range(grid.rows)]
        frames = sum(max(stop - start, 0) for start, stop in zip(tier.start, tier.stop, strict=True))
        return frames * sum(rows) * grid.columns / (grid.frames * grid.rows)

    layers = method.tiers(grid, num_layers)
    of_kind = {tiers: sum(map(seen, tiers)) for tiers in set(layers)}
    return round(sum(of_kind[tiers] for tiers in layers) / num_layers)


def num_passes(sampler: SamplerConfig) -> int:
    """Forwards of one denoising step."""
    return PASSES if sampler.guidance_scale > 1.0 else 1


def feasible_degrees(
    world_size: int, *, heads: int, passes: int, tokens: int, refused: Collection[str] = ()
) -> list[Degrees]:
    """Every (cfg, ring, ulysses) whose product is the world size and that the engine runs.

    cfg is at most the number of passes; heads that ulysses does not divide are for ring 1 only; every rank has a token.
    `refused` names axes that the method cannot have.
    """
    return [
        (cfg, sequence // ulysses, ulysses)
        for cfg in range(1, passes + 1)
        if world_size % cfg == 0 and (sequence := world_size // cfg) <= tokens
        for ulysses in range(1, sequence + 1)
        if sequence % ulysses == 0 and (heads % ulysses == 0 or ulysses == sequence)
        if not refused_axes(refused, (cfg, sequence // ulysses, ulysses))
    ]


def latent_values(layout: Layout) -> int:
    """Numbers per token, in the latents and in a prediction."""
    return layout.spec.video.channels * prod(layout.spec.video.patch)


def latent_bytes(layout: Layout) -> int:
    """Bytes of the video's latents in fp32."""
    return layout.video_frames * layout.frame_tokens * latent_values(layout) * FP32_BYTES


def prediction_bytes(layout: Layout) -> int:
    """Bytes of the prediction of one pass for the video."""
    return layout.video_frames * layout.frame_tokens * latent_values(layout) * layout.itemsize


def _halo(frames: int, frame_tokens: int, window_frames: int) -> HaloRange:
    return partial(window_range, num_frames=frames, frame_tokens=frame_tokens, window_frames=window_frames)
