"""Eigendecompositions of symmetric matrices, by one of several solvers on a GPU; a failure gives NaN.

A matrix that is not finite, a solver that does not converge and wrong vectors would raise on one rank while the others wait in a
collective. NaN reaches every rank, and the check of each step's latents raises on all of them together.
"""

import importlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

Solver = Callable[[Tensor], tuple[Tensor, Tensor]]

# From here on torch hands all matrices of a CUDA batch to cuSOLVER at once; before, those of more than 32 rows one by one.
BATCHED_SINCE = (2, 12)
BATCHED_ROWS = 32
# What solvers raise: torch's and CuPy's are RuntimeErrors, NumPy's LinAlgError is a ValueError.
FAILURES = (RuntimeError, ValueError)
HOST_THREADS = 8  # at most: a batch has a few dozen matrices, and several ranks share the host
ROUNDINGS = 1000  # per row that a decomposition may be off by: Jacobi and QR stay within a few, wrong vectors are off by 0.1 and more


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending [.., n], and eigenvectors as columns [.., n, n], of symmetric matrices [.., n, n] (fp32 or fp64).

    A matrix that is not finite gives NaN. On a GPU the solver is the one of `use`, and a batch of which one matrix is wrong, or
    does not converge, gives NaN too, with a warning that says why.
    """
    finite, broken = _finite_or_identity(matrices)
    decompose = torch.linalg.eigh if matrices.device.type == "cpu" else _eigh_checked
    values, vectors = decompose(finite)
    return values.masked_fill(broken[..., None], torch.nan), vectors.masked_fill(broken[..., None, None], torch.nan)


def eigvalsh(matrices: Tensor) -> Tensor:
    """The eigenvalues of `eigh` alone, which are cheaper on a CPU."""
    finite, broken = _finite_or_identity(matrices)
    return torch.linalg.eigvalsh(finite).masked_fill(broken[..., None], torch.nan)


def on_host(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """LAPACK on the CPU, a share of the matrices to each of several threads; the result on the matrices' device."""
    *batch, rows, _ = matrices.shape
    parts = matrices.reshape(-1, rows, rows).cpu().tensor_split(_host_threads())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of each of the threads
    try:
        found = list(_pool().map(torch.linalg.eigh, (part for part in parts if part.shape[0])))
    finally:
        torch.set_num_threads(threads)
    values, vectors = (torch.cat(parts).to(matrices.device) for parts in zip(*found, strict=True))
    return values.view(*batch, rows), vectors.view(*batch, rows, rows)


def by_cupy(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """cuSOLVER's batched Jacobi through CuPy, on the current stream; ImportError without CuPy."""
    cupy = importlib.import_module("cupy")
    *batch, rows, _ = matrices.shape
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(matrices.device).cuda_stream)
    with cupy.cuda.Device(matrices.device.index or 0), stream:
        found = cupy.linalg.eigh(cupy.from_dlpack(matrices.reshape(-1, rows, rows).contiguous()))
        values, vectors = (torch.from_dlpack(part) for part in found)
    return values.reshape(*batch, rows), vectors.reshape(*batch, rows, rows)


SOLVERS: dict[str, Solver] = {"torch": torch.linalg.eigh, "host": on_host, "cupy": by_cupy}


def candidates(device: torch.device, rows: int, torch_version: str = torch.__version__) -> tuple[str, ...]:
    """Solvers for matrices of this many rows, the default first; all of them where torch would decompose one matrix at a time."""
    release = tuple(int(part) for part in torch_version.split("+", maxsplit=1)[0].split(".")[:2])
    batched = device.type == "cpu" or rows <= BATCHED_ROWS or release >= BATCHED_SINCE
    return ("torch",) if batched else tuple(SOLVERS)


class _Process:
    """The solver of this process on GPUs, as `torch.backends.cuda.preferred_linalg_library` is one, and how it last failed."""

    solver = "torch"
    failure: str | None = None


def use(solver: str) -> None:
    """Set the solver on GPUs for the whole process, one of SOLVERS. All ranks of a video must set the same."""
    if solver not in SOLVERS:
        raise ValueError(f"unknown eigensolver {solver!r}; choose one of {', '.join(SOLVERS)}")
    _Process.solver = solver


def used() -> str:
    """The solver of this process on GPUs."""
    return _Process.solver


def take_failure() -> str | None:
    """Return and clear why a decomposition of this process gave NaN, for the error that reports the NaN."""
    failure, _Process.failure = _Process.failure, None
    return failure


def fault(matrices: Tensor, values: Tensor, vectors: Tensor) -> str | None:
    """Describe why this is not an eigendecomposition of the finite matrices; None if V is orthonormal and A V = V diag(values)."""
    if matrices.numel() == 0:
        return None
    rows = matrices.shape[-1]
    identity = torch.eye(rows, dtype=matrices.dtype, device=matrices.device)
    largest = matrices.abs().amax((-1, -2), keepdim=True).clamp_min(torch.finfo(matrices.dtype).tiny)
    turned = (vectors.mT @ vectors - identity).abs().amax()
    moved = ((matrices / largest) @ vectors - vectors * (values[..., None, :] / largest)).abs().amax()
    errors = torch.stack((turned, moved)).tolist()  # one wait for the device
    limit = ROUNDINGS * rows * torch.finfo(matrices.dtype).eps
    if all(error <= limit for error in errors):  # NaN is wrong as well
        return None
    return (
        f"eigenvectors of {matrices.numel() // rows**2} matrices of {rows} rows are off by {errors[0]:.1e} from orthonormal and "
        f"{errors[1]:.1e} from their matrices, where rounding is {limit:.1e}"
    )


def _eigh_checked(matrices: Tensor) -> tuple[Tensor, Tensor]:
    if matrices.numel() == 0:  # a rank without heads, or without a share of them
        return matrices.new_empty(matrices.shape[:-1]), matrices
    return _eigh(matrices, used())


# A custom operator: a compiled block takes it as one call, whatever the solver does.
@torch.library.custom_op("freespec::eigh", mutates_args=())
def _eigh(matrices: Tensor, solver: str) -> tuple[Tensor, Tensor]:
    """Decompose finite matrices; NaN and a warning if the solver fails or is wrong. Out of memory is raised."""
    try:
        values, vectors = SOLVERS[solver](matrices)
        reason = fault(matrices, values, vectors)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
    if reason is None:
        return values.contiguous(), vectors.contiguous()
    _Process.failure = f"eigensolver {solver} on {matrices.device}: {reason}"
    warnings.warn(f"{_Process.failure}; the result is NaN", stacklevel=2)
    return torch.full_like(matrices[..., 0], torch.nan), torch.full_like(matrices, torch.nan)


@_eigh.register_fake
def _eigh_shapes(matrices: Tensor, solver: str) -> tuple[Tensor, Tensor]:
    return matrices.new_empty(matrices.shape[:-1]), matrices.new_empty(matrices.shape)


def _host_threads() -> int:
    return min(HOST_THREADS, os.cpu_count() or 1)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_host_threads(), "eigh", initializer=torch.set_num_threads, initargs=(1,))


def _finite_or_identity(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices with the identity in place of those that are not finite, and which those are, [..] bool."""
    broken = ~torch.isfinite(matrices).all(-1).all(-1)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.where(broken[..., None, None], identity, matrices), broken
