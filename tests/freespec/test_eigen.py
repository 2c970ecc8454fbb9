"""Matrices that are not finite and solvers that are wrong: not a number out, no error; and the solvers of a GPU, on a CPU."""

import sys
import tomllib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from freespec import eigen, spectrum
from freespec.methods import FreeSpec, Grid, StepPlan
from tests.freespec.cases import features
from tests.freespec.layers import fuse_spectra


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_that_is_not_finite_leaves_the_others_bit_for_bit(bad: float) -> None:
    grams = spectrum.gram(features(0, (2, 20, 3, 4)))
    expected = (*torch.linalg.eigh(grams), torch.linalg.eigvalsh(grams))
    broken = grams.clone()
    broken[1, 2, 3, 0] = bad
    for of_broken, whole in zip((*eigen.eigh(broken), eigen.eigvalsh(broken)), expected, strict=True):
        assert of_broken[1, 2].isnan().all()
        of_broken[1, 2] = whole[1, 2]
        assert torch.equal(of_broken, whole)
    decompositions: tuple[Callable, ...] = (torch.linalg.eigh, torch.linalg.eigvalsh)
    for decompose in decompositions:
        with pytest.raises(torch.linalg.LinAlgError):  # what this is for
            decompose(broken)


@pytest.mark.parametrize("basis", ["local", "global"])
@pytest.mark.parametrize("branch", [0, 1])
def test_a_head_that_overflowed_is_not_a_number_after_the_fusion(basis: str, branch: int) -> None:
    outputs = [features(seed, (1, 20, 3, 4)) for seed in (0, 1)]
    method = FreeSpec(basis=basis, residual="none")
    grid = Grid(frames=20, rows=1, columns=1, window_frames=5)
    weights = method.weights(StepPlan(mode="dual", progress=0.3), grid, 4, torch.device("cpu"))
    whole = fuse_spectra(method, *outputs, weights)
    outputs[branch][0, 7, 1, 2] = torch.inf
    fused = fuse_spectra(method, *outputs, weights)
    assert fused[:, :, 1].isnan().all()
    assert torch.equal(fused[:, :, ::2], whole[:, :, ::2])


def grams_of(num_matrices: int = 5, rows: int = 12) -> torch.Tensor:
    return spectrum.gram(features(1, (1, 40, num_matrices, rows)))[0]


def off_in_one(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A solver whose vectors of one matrix are those of another, as a batched one was reported to return."""
    values, vectors = torch.linalg.eigh(matrices)
    vectors[1] = vectors[2]
    return values, vectors


def not_orthonormal(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A solver with a vector that is too long by a millionth."""
    values, vectors = torch.linalg.eigh(matrices)
    vectors[..., 3] *= 1 + 1e-6
    return values, vectors


def gives_up(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A solver that does not converge."""
    raise torch.linalg.LinAlgError("linalg.eigh: (Batch element 1): failed to converge.")


def library_fails(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As torch reports what cuSOLVER could not do: no LinAlgError."""
    raise RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnXsyevBatched`")


def numpy_gives_up(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As CuPy reports it."""
    raise np.linalg.LinAlgError("The algorithm failed to converge")


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_a_decomposition_is_checked_against_its_matrices(scale: float) -> None:
    matrices = scale * grams_of()
    values, vectors = torch.linalg.eigh(matrices)
    assert eigen.fault(matrices, values, vectors) is None
    assert eigen.fault(torch.zeros_like(matrices), torch.zeros_like(values), vectors) is None
    assert eigen.fault(matrices[:0], values[:0], vectors[:0]) is None
    for solver in (off_in_one, not_orthonormal):
        assert "are off by" in str(eigen.fault(matrices, *solver(matrices)))
    assert "are off by" in str(eigen.fault(matrices, values.flip(-1), vectors))
    assert "nan" in str(eigen.fault(matrices, values, vectors * torch.nan))


@pytest.mark.parametrize("solver", [off_in_one, not_orthonormal, gives_up, library_fails, numpy_gives_up])
def test_a_wrong_solver_gives_no_numbers_and_a_warning(solver: eigen.Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU goes through, on the CPU; every rank meets the NaN in its latents."""
    matrices = grams_of()
    expected = torch.linalg.eigh(matrices)
    for actual, right in zip(eigen._eigh(matrices, "torch"), expected, strict=True):
        assert torch.equal(actual, right)
    monkeypatch.setitem(eigen.SOLVERS, "wrong", solver)
    with pytest.warns(UserWarning, match=r"eigensolver wrong on cpu: .*; the result is NaN"):
        values, vectors = eigen._eigh(matrices, "wrong")
    assert values.isnan().all()
    assert vectors.isnan().all()
    assert str(eigen.take_failure()).startswith("eigensolver wrong on cpu: ")
    assert eigen.take_failure() is None
    assert (values.shape, vectors.shape) == (matrices.shape[:-1], matrices.shape)


def test_out_of_memory_is_not_a_wrong_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its own line, which says what would need less."""

    def full(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(eigen.SOLVERS, "wrong", full)
    with pytest.raises(torch.OutOfMemoryError):
        eigen._eigh(grams_of(), "wrong")


@pytest.mark.parametrize("shape", [(24, 16), (3, 16), (1, 16)])
def test_the_host_decomposes_on_several_threads(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigen, "_host_threads", lambda: 4)
    eigen._pool.cache_clear()
    matrices = grams_of(*shape).unflatten(0, (1, -1))
    threads = torch.get_num_threads()
    for actual, expected in zip(eigen.on_host(matrices), torch.linalg.eigh(matrices), strict=True):
        assert torch.equal(actual, expected)
    assert torch.get_num_threads() == threads


def test_cupy_decomposes_on_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interface by NumPy: what is handed over and taken back is ours to get right."""
    seen: list[object] = []
    cuda = SimpleNamespace(
        ExternalStream=lambda pointer: seen.append(pointer) or nullcontext(),
        Device=lambda index: seen.append(index) or nullcontext(),
    )
    cupy = SimpleNamespace(cuda=cuda, linalg=np.linalg, from_dlpack=np.from_dlpack)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(cuda_stream=77))
    matrices = grams_of().unflatten(0, (1, -1))
    values, vectors = eigen.by_cupy(matrices)
    assert eigen.fault(matrices, values, vectors) is None
    assert seen == [77, 0]
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError):
        eigen.by_cupy(matrices)


def test_solvers_are_chosen_among_only_where_torch_would_loop() -> None:
    gpu, every = torch.device("cuda"), ("torch", "host", "cupy")
    assert eigen.candidates(gpu, 128, "2.11.0+cu130") == every
    assert eigen.candidates(gpu, 32, "2.11.0+cu130") == ("torch",)
    for version in ("2.12.0", "2.13.0a0+git1234567", "3.0.0"):
        assert eigen.candidates(gpu, 128, version) == ("torch",)
    assert eigen.candidates(torch.device("cpu"), 128, "2.11.0+cpu") == ("torch",)
    with pytest.raises(ValueError, match="unknown eigensolver 'magma'; choose one of torch, host, cupy"):
        eigen.use("magma")


def test_it_is_one_operator_for_a_compiled_block() -> None:
    torch.library.opcheck(torch.ops.freespec.eigh.default, (grams_of(), "torch"))


def test_the_package_asks_for_a_torch_that_decomposes_in_batches() -> None:
    root = Path(__file__).parents[2]
    needs = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    [allowed] = [need.specifier for need in map(Requirement, needs) if need.name == "torch"]
    before, since = (".".join(map(str, (eigen.BATCHED_SINCE[0], minor, 0))) for minor in (11, eigen.BATCHED_SINCE[1]))
    assert since in allowed
    assert before not in allowed
    pins = (root / "constraints.txt").read_text().splitlines()
    [pinned] = [pin.removeprefix("torch==") for pin in pins if pin.startswith("torch==")]
    assert pinned in allowed
    assert eigen.candidates(torch.device("cuda"), 128, pinned) == ("torch",)
    assert eigen.candidates(torch.device("cuda"), 128, before) == ("torch", "host", "cupy")
