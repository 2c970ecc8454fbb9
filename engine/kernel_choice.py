"""Choose the attention kernel of `auto`, and the eigensolver on a GPU: the fastest one that is correct on this device.

Candidates are timed once per process at the video's shape if there are several: kernels on CUDA in half precision, solvers
before torch 2.12. All ranks use rank 0's choice, so that they compute the same.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.adapters import VideoSpec
from engine.config import RunConfig
from engine.errors import UserError, describe_out_of_memory, first_line, is_out_of_memory
from engine.progress import note
from engine.ranks.agreement import broadcast_bytes, from_first, raise_together
from engine.ranks.layouts import Ranks
from freespec import eigen
from freespec.attention import WindowedAttention
from freespec.kernels import candidates, preferred, select_complement, select_dual, select_kernel
from freespec.methods import Grid
from parallel.mesh import SeqMesh

# Part of a layer: all keys for some queries and heads. Enough to saturate a GPU, and 0.3 GB at 126,360 tokens.
QUERY_FRAMES, HEADS = 4, 4
CALLS = 3
# Queries that are compared with plain attention, which materialises its logits: the last ones, of the last strided window.
CHECKED = 8
ROUNDINGS = 4  # tolerance of an output; sums over many keys add far less rounding than half precision does
SUM_ROUNDING = 2**-18
LSE_ERROR = 1e-2  # absolute; logits are of the order of 1 here
# What torch and kernel packages raise for an unsupported device, dtype or layout.
UNSUPPORTED = (RuntimeError, ValueError, TypeError, AssertionError, ImportError, MemoryError)
Parts = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """The chosen kernel, for the record.

    Attributes:
        kernel: the name.
        why: `given`, `the only one here`, `measured`, or `the first that is correct here`.
        seconds: time of part of a layer, global and dual, by kernel.
        left_out: kernels that do not run here, or are wrong, with the reason.
    """

    kernel: str
    why: str
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LayerPart:
    """The shape at which kernels are timed."""

    num_frames: int
    frame_tokens: int
    window_frames: int
    heads: int
    head_dim: int

    def attention(self, name: str, device: torch.device, dtype: torch.dtype) -> WindowedAttention:
        """The layer with this kernel; ValueError for an unavailable kernel."""
        return WindowedAttention(
            num_frames=self.num_frames,
            frame_tokens=self.frame_tokens,
            window_frames=self.window_frames,
            kernel=select_kernel(name, device, dtype),
        )


@dataclass(frozen=True, kw_only=True)
class SolverChoice:
    """The eigensolver of this process on its device, for the record.

    Attributes:
        solver: one of freespec.eigen.SOLVERS.
        why: `the only one here`, or `measured`.
        seconds: time for the matrices of one fusion, by solver.
        left_out: solvers that do not run here, or are wrong, with the reason.
    """

    solver: str
    why: str
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def select_kernels(
    device: torch.device, dtype: torch.dtype, *, kernel: str, dual: str, complement: str
) -> dict[str, Any]:
    """The kernels of `freespec.attention.WindowedAttention`, by their settings; ValueError for one that does not run here."""
    return {
        "kernel": select_kernel(kernel, device, dtype),
        "dual_kernel": select_dual(dual, device, dtype),
        "rest_kernel": select_complement(complement, device, dtype, dual=dual),
    }


def choose_on_ranks(
    config: RunConfig, spec: VideoSpec, transformer: Any, ranks: Ranks, device: torch.device
) -> KernelChoice:
    """`choose_kernel` for the video of a configuration, by rank 0 for all; parallel.provider xfuser has its own kernel."""
    if ranks.hybrid is not None:
        return KernelChoice(kernel=config.attention.kernel, why="xfuser's")
    _, _, *latents = spec.latent_shape(config.video.num_frames, config.video.height, config.video.width)
    frames, rows, columns = (size // patch for size, patch in zip(latents, spec.patch, strict=True))
    part = LayerPart(
        num_frames=frames,
        frame_tokens=rows * columns,
        window_frames=min(config.method.window_frames, frames),
        heads=min(transformer.config.num_attention_heads, HEADS),
        head_dim=transformer.config.attention_head_dim,
    )
    return _by_rank_0(ranks.mesh, lambda: choose_kernel(config.attention.kernel, part, device, transformer.dtype))


def choose_for_pipeline(mesh: SeqMesh, grid: Grid, *, head_dim: int, where: tuple[torch.device, torch.dtype]) -> str:
    """Choose the kernel of `auto` for a user's pipeline, once its video is known: the first candidate that is correct.

    Rank 0 chooses for all ranks. On a GPU each candidate is compared with plain attention first; a note names those that
    differ or do not run. Raises UserError, on all ranks, if none is correct.
    """
    names = candidates(*where)
    if len(names) == 1:
        return names[0]
    part = LayerPart(
        num_frames=grid.frames,
        frame_tokens=grid.frame_tokens,
        window_frames=min(grid.window_frames, grid.frames),
        heads=HEADS,
        head_dim=head_dim,
    )
    chosen = _by_rank_0(mesh, lambda: fastest(names, part, *where, timed=False))
    if chosen.left_out and mesh.world.rank == 0:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in chosen.left_out.items())
        note(f"attention kernel {chosen.kernel}, as others cannot be used here ({reasons})")
    return chosen.kernel


def _by_rank_0(mesh: SeqMesh, choose: Callable[[], KernelChoice]) -> KernelChoice:
    """Rank 0's choice on every rank, or its UserError."""
    data = from_first(mesh, lambda: json.dumps(dataclasses.asdict(choose())).encode(), "attention kernel")
    return KernelChoice(**json.loads(data))


def choose_kernel(name: str, part: LayerPart, device: torch.device, dtype: torch.dtype) -> KernelChoice:
    """Resolve a kernel setting; UserError if it is `auto` and no kernel is correct."""
    if name != "auto":
        return KernelChoice(kernel=name, why="given")
    names = candidates(device, dtype)
    return (
        KernelChoice(kernel=names[0], why="the only one here")
        if len(names) == 1
        else fastest(names, part, device, dtype)
    )


@functools.cache  # once a process: engines of one video's shape share it
def fastest(
    names: tuple[str, ...], part: LayerPart, device: torch.device, dtype: torch.dtype, *, timed: bool = True
) -> KernelChoice:
    """Return the first kernel that equals plain attention, or one that is clearly faster at global and dual attention together.

    Without `timed`, only the first correct one.
    """
    qkv, q_start = draw(part, device, dtype)
    expected = check_rows(part.attention("plain", device, dtype), qkv, q_start)
    seconds: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            layer = part.attention(name, device, dtype)
            difference = wrong(check_rows(layer, qkv, q_start), expected, dtype)
            if difference is None and not timed:
                return KernelChoice(kernel=name, why="the first that is correct here", left_out=left_out)
            if difference is None:
                seconds[name] = seconds_of(lambda layer=layer: both_kinds(layer, qkv, q_start), device)  # type: ignore[misc]
        except UNSUPPORTED as error:
            difference = why_not(error, f"attention kernel {name} was tried on {device}")
        if difference is not None:
            left_out[name] = difference
    if not seconds:
        raise UserError(f"no attention kernel runs here: {left_out}; set attention.kernel, for example to plain")
    return KernelChoice(kernel=preferred(seconds), why="measured", seconds=seconds, left_out=left_out)


def draw(part: LayerPart, device: torch.device, dtype: torch.dtype) -> tuple[Parts, int]:
    """Draw normal q for some frames in the middle and k, v for all, [1, s, N, D]; and return the first token of q."""
    frames = min(QUERY_FRAMES, part.num_frames)
    q_start = (part.num_frames - frames) // 2 * part.frame_tokens
    generator = torch.Generator(device).manual_seed(0)

    def normal(tokens: int) -> Tensor:
        sizes = (1, tokens, part.heads, part.head_dim)
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

    tokens = part.num_frames * part.frame_tokens
    return (normal(frames * part.frame_tokens), normal(tokens), normal(tokens)), q_start


def both_kinds(layer: WindowedAttention, qkv: Parts, q_start: int) -> Parts:
    """Run a global and a dual call: out [1, s, N, D] and lse [1, s, N] of global, local and both."""
    q, k, v = qkv
    local, global_ = layer.dual(q, k, v, q_start, 0, dtype=q.dtype)
    return (*layer.dense(q, k, v), *local, *global_)


def check_rows(layer: WindowedAttention, qkv: Parts, q_start: int) -> Parts:
    """`both_kinds` at the checked queries; plain attention computes no others."""
    q, k, v = qkv
    last = q[:, -CHECKED:]
    if layer.kernel is select_kernel("plain", q.device, q.dtype):
        return both_kinds(layer, (last, k, v), q_start + q.shape[1] - last.shape[1])
    return tuple(part[:, -last.shape[1] :] for part in both_kinds(layer, qkv, q_start))


def wrong(actual: Parts, expected: Parts, dtype: torch.dtype) -> str | None:
    """Describe outputs or log-sum-exps that differ from plain attention by more than rounding; None if none does."""
    for got, right in zip(actual, expected, strict=True):
        difference = got.float() - right.float()
        if got.dim() == 4:
            error, limit = (
                float(difference.norm() / right.float().norm()),
                ROUNDINGS * max(torch.finfo(dtype).eps / 2, SUM_ROUNDING),
            )
        else:
            error, limit = float(difference.abs().max()), LSE_ERROR
        if not error <= limit:  # NaN counts as wrong
            return f"is off by {error:.1e} from plain attention, where rounding is {limit:.1e}"
    return None


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the shortest time of some calls, after one warm-up call."""
    times = []
    for _ in range(1 + CALLS):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def choose_solver(mesh: SeqMesh, *, num_matrices: int, rows: int, device: torch.device) -> SolverChoice:
    """Choose the eigensolver for the matrices of one fusion, [num_matrices, rows, rows] fp64, and set it for this process.

    All ranks time at once, since they share the host's cores, and use rank 0's choice; each checks it on its own device.
    Raises UserError, on all ranks together, if one of them has no correct solver.
    """
    if device.type == "cpu":
        return SolverChoice(solver="torch", why="the only one here")
    names, first = eigen.candidates(device, rows), mesh.world.rank == 0
    mine = raise_together(mesh, lambda: fastest_solver(names, num_matrices, rows, device, first))
    data = broadcast_bytes(mesh, json.dumps(dataclasses.asdict(mine)).encode(), "eigensolver")
    chosen = SolverChoice(**json.loads(data))
    if mesh.world.size > 1:
        raise_together(mesh, lambda: fastest_solver((chosen.solver,), num_matrices, rows, device, False))
    eigen.use(chosen.solver)
    return chosen


@functools.cache  # once a process: methods and engines of one shape share it
def fastest_solver(
    names: tuple[str, ...], num_matrices: int, rows: int, device: torch.device, tells: bool
) -> SolverChoice:
    """Return the first correct solver, or one that is clearly faster; `tells` prints a note."""
    matrices = draw_grams(num_matrices, rows).to(device)
    seconds: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name in names:
        solver = eigen.SOLVERS[name]
        try:
            reason = eigen.fault(matrices, *solver(matrices))
            if reason is None:
                timed = len(names) > 1
                seconds[name] = seconds_of(partial(solver, matrices), device) if timed else 0.0
        except UNSUPPORTED as error:
            reason = why_not(error, f"eigensolver {name} was tried on {device}")
        if reason is not None:
            left_out[name] = reason
    if not seconds:
        raise UserError(
            f"no eigensolver is correct on {device}: {left_out}; use another version of torch or of its CUDA"
        )
    if len(names) == 1:
        return SolverChoice(solver=names[0], why="the only one here")
    chosen = preferred(seconds)
    if tells:
        times = ", ".join(f"{name} {value * 1e3:.3g} ms" for name, value in seconds.items())
        note(
            f"torch {torch.__version__} decomposes a batch of matrices on a GPU one by one; a fusion's {num_matrices} of {rows} rows "
            f"take {times}: using {chosen}. torch 2.12 and later do not need this"
        )
    return SolverChoice(solver=chosen, why="measured", seconds=seconds, left_out=left_out)


def draw_grams(num_matrices: int, rows: int) -> Tensor:
    """Draw Gram matrices of features whose singular values fall to a hundredth, [num_matrices, rows, rows] fp64, on the CPU."""
    generator = torch.Generator("cpu").manual_seed(0)
    falling = torch.logspace(0, -2, rows, dtype=torch.float64)
    features = falling * torch.randn(num_matrices, 4 * rows, rows, generator=generator, dtype=torch.float64)
    return features.mT @ features


def why_not(error: Exception, when: str) -> str:
    """Return why a trial failed; UserError for exhausted memory, which is not the kernel's fault."""
    if is_out_of_memory(error):
        raise UserError(describe_out_of_memory(error, when=when)) from error
    return first_line(error)[:200]
