"""The interface of a method: its noise, the branches of each denoising step, and their fusion."""

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from freespec.types import Device, Tensor

Mode = Literal["global", "local", "dual", "views", "views_global", "frames", "tiers"]
FrameSet = Sequence[Sequence[int]]  # of each frame of queries the frames of its keys, ascending
Noise = Literal["iid", "freenoise", "mean_reuse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One denoising step: which branches every self-attention layer computes, and the progress of its fusion.

    `global` and `local` are one branch that is the layer's output; `dual` is both, `views` attention inside overlapping
    views, `views_global` those and the global branch with scaled queries, `frames` attention to the frames that the method
    selects for each frame: these four call the method's `fuse`. `tiers` is attention to keys in tiers by distance, merged to one output.
    `number` is for methods that select different frames in each step.
    """

    mode: Mode
    progress: float = 0.0
    number: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The tokens of a video, frame-major: `frames` x `rows` x `columns`, and the native length `window_frames`.

    `frames` counts pictures whose tokens stand beside those of the video, each as a frame after that of its moment.
    """

    frames: int
    rows: int
    columns: int
    window_frames: int

    @property
    def frame_tokens(self) -> int:
        """Tokens of one frame."""
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """S, tokens of the video."""
        return self.frames * self.frame_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """Keys that each frame of queries sees, and the temporal positions at which it sees them.

    Attributes:
        start: for each frame of queries, the first frame of its keys.
        stop: one past the last; no more than `start` for no keys.
        q_positions: position of each frame as queries, in latent frames; None with `k_positions` for their own.
        k_positions: position of each frame as keys.
        rows: rows above and below a query's own whose tokens are seen; None for whole frames.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]
    q_positions: tuple[int, ...] | None = None
    k_positions: tuple[int, ...] | None = None
    rows: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Branches:
    """Attention outputs of one layer, by the mode of its step.

    Attributes:
        o_local: the sliding window's output [B, s, N, D] (`dual`).
        o_global: the global branch's output [B, s, N, D] (`dual`, `views_global`).
        views: attention inside each view of `Method.view_starts`, [B, window_frames * frame_tokens, N, D] each. Views are
            computed lazily, once each, so that accumulating them needs the memory of one.
        sets: attention of each of `Method.frame_sets`, [B, S, N, D] each (`frames`), computed likewise.
    """

    o_local: Tensor | None = None
    o_global: Tensor | None = None
    views: Iterable[Tensor] = ()
    sets: Iterable[Tensor] = ()


def call(function: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """Call a function of matrices, alone."""
    return function(*matrices)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """The grid of the branches, and sums over the shares of other ranks.

    A rank has s of the S tokens for some of the heads: `sum_tokens` adds the contributions of all token shards (ring), `sum_heads` those
    of all shares of the heads (ulysses). On one rank both return their argument. `max_tokens` is the elementwise maximum over token
    shards, set on a CPU, where sums must have the same bits in any layout. `share_heads` applies a function to matrices [B, N, D, D]
    that all token shards hold: each shard computes some items and heads, passed as [1, some, D, D], and all get every result.
    """

    grid: Grid
    sum_tokens: Callable[[Tensor], Tensor]
    sum_heads: Callable[[Tensor], Tensor]
    max_tokens: Callable[[Tensor], Tensor] | None = None
    share_heads: Callable[..., Tensor] = call


@dataclass(frozen=True, kw_only=True)
class Method(metaclass=abc.ABCMeta):
    """A method for long videos. Its fields are its hyperparameters; it holds no tensor and no state of a run.

    A subclass implements `plan` and overrides other methods as needed. At native length, F <= F0, the engine runs the base model
    and calls only `plan`.
    """

    #: Initial noise of the method, unless `sampler.noise` is set.
    noise: ClassVar[Noise] = "iid"

    @property
    def noise_stride(self) -> int | None:
        """Latent frames that `freenoise` noise shuffles at a time with this method; None: a quarter of the window."""
        return None

    @property
    def refused_axes(self) -> Mapping[str, str]:
        """Axes of the mesh (`ring`, `ulysses`) that must be 1, each with the reason; {} for any layout."""
        return {}

    def check_window(self, window_frames: int) -> None:
        """Raise ValueError if the settings do not suit a native length of `window_frames`; most methods take any."""
        return

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError if the settings do not suit a model of so many layers; most methods treat all alike."""
        return

    @abc.abstractmethod
    def plan(self, timesteps: Sequence[float]) -> list[StepPlan]:
        """The mode of each step, from the scheduler's timesteps (1000 = pure noise), first step first."""

    def view_starts(self, grid: Grid) -> tuple[int, ...]:
        """First frame of each view; every view has `window_frames` frames. Called in modes with views only."""
        raise AssertionError(f"{type(self).__name__} has no views")

    def frame_sets(self, step: StepPlan, grid: Grid) -> Sequence[FrameSet]:
        """The frames that each frame sees, for each branch of mode `frames`."""
        raise AssertionError(f"{type(self).__name__} selects no frames")

    def tiers(self, grid: Grid, num_layers: int) -> Sequence[tuple[Tier, ...]]:
        """The tiers of each layer in mode `tiers`, disjoint; a query sees a key of its own frame in one of them."""
        raise AssertionError(f"{type(self).__name__} has no tiers")

    @property
    def rest_kernel(self) -> Any:
        """Kernel (freespec.kernels) for the keys outside the windows of dual steps; None for that of the settings."""
        return None

    def query_scale(self, grid: Grid) -> float:
        """Factor of the queries of the global branch in mode `views_global`."""
        return 1.0

    def weights(self, step: StepPlan, grid: Grid, head_dim: int, device: Device) -> Any:
        """Tensors that `fuse` needs in this step. Made once per step, because numbers would recompile a compiled block."""
        return None

    def fuse(self, branches: Branches, weights: Any, layer: Layer) -> Tensor:
        """One layer's output [B, s, N, D] from its branches."""
        raise AssertionError(f"{type(self).__name__} has no step that fuses")


def has_rest_kernel(method: Method) -> bool:
    """Whether the method has its own kernel for the keys outside the windows; imports none."""
    return type(method).rest_kernel is not Method.rest_kernel


def names_frames(method: Method) -> bool:
    """Whether the steps of the method are of mode `frames`."""
    return method.plan([1000.0, 1.0])[0].mode == "frames"


def names_tiers(method: Method) -> bool:
    """Whether the steps of the method are of mode `tiers`."""
    return method.plan([1000.0, 1.0])[0].mode == "tiers"


def check_rest_kernel(method: Method, name: str, *, dual: str, complement: str) -> None:
    """Raise ValueError for kernels of the keys outside the windows that the method's own would replace."""
    if has_rest_kernel(method) and (dual == "triton" or complement != "same"):
        setting = f"attention.dual {dual}" if dual == "triton" else f"attention.complement {complement}"
        raise ValueError(
            f"method {name} attends to the keys outside the windows in its own way, and {setting} would leave that out; "
            "use attention.dual strided and attention.complement same"
        )


def check_choice(method: str, name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ValueError unless the setting has one of these words."""
    if value not in allowed:
        raise ValueError(f"{method}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def check_stride(method: str, stride: int | None) -> None:
    """Raise ValueError unless the distance between views is a number of frames, or None for the published quarter."""
    if stride is not None and stride < 1:
        raise ValueError(f"{method}: stride must be 1 or more frames, got {stride}")


def check_stride_covers(method: str, stride: int | None, window_frames: int) -> None:
    """Raise ValueError if views that start every `stride` frames leave frames between them."""
    if stride is not None and stride > window_frames:
        raise ValueError(
            f"{method}: stride {stride} is more than the {window_frames} frames of a view, so that "
            f"{stride - window_frames} between two views would get no attention at all; take {window_frames} or less"
        )
