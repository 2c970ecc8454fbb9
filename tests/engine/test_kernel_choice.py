"""What `attention.kernel auto` becomes: the fastest kernel that is right, rank 0's choice on every rank."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

from engine import kernel_choice
from engine.config import AttentionConfig, MethodConfig, ModelConfig, RunConfig, VideoConfig
from engine.errors import UserError
from engine.kernel_choice import (
    KernelChoice,
    LayerPart,
    choose_kernel,
    choose_on_ranks,
    choose_solver,
    fastest,
    fastest_solver,
)
from engine.ranks.group_of_one import GROUP_OF_ONE
from engine.ranks.layouts import Ranks
from freespec import eigen, kernels
from freespec.kernels import cpu_flash
from tests.engine.golden import mesh_of
from tests.pretend_cuda import pretend_cuda
from tests.ranks import run_ranks

CPU = torch.device("cpu")
PART = LayerPart(num_frames=9, frame_tokens=10, window_frames=3, heads=2, head_dim=8)


def nothing(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The fastest of all."""
    return torch.zeros_like(q), torch.zeros(q.shape[:3])


def first_window(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Right but for the strides of a batch of windows."""
    return cpu_flash(q, k[:1].expand_as(k), v[:1].expand_as(v))


def base_two(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Right but for the base of its log-sum-exp."""
    out, lse = cpu_flash(q, k, v)
    return out, lse / math.log(2)


def not_a_number(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What an overflow leaves."""
    out, lse = cpu_flash(q, k, v)
    return out * torch.nan, lse


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As torch refuses."""
    raise RuntimeError("No available kernel.\nAborting execution.")


@pytest.fixture
def more_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {f"cpu_{f.__name__}": f for f in (nothing, first_window, base_two, not_a_number, unsupported)}
    monkeypatch.setattr(kernels, "KERNELS", kernels.KERNELS | broken)
    monkeypatch.setattr(kernels, "NAMES", (*kernels.NAMES, *broken))


@pytest.mark.parametrize(
    "frames", [9, 3, 2]
)  # windows that slide, the native length, less than the frames that are drawn
def test_the_fastest_right_kernel_wins_with_its_time_noted(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    took = iter([2.0, 1.0])
    monkeypatch.setattr(kernel_choice, "seconds_of", lambda _call, _device: next(took))
    part = LayerPart(num_frames=frames, frame_tokens=10, window_frames=min(3, frames), heads=2, head_dim=16)
    chosen = fastest(("plain", "cpu_flash", "cuda_fa3"), part, CPU, torch.float32)
    assert (chosen.kernel, chosen.why) == ("cpu_flash", "measured")
    assert chosen.seconds == {"plain": 2.0, "cpu_flash": 1.0}
    assert chosen.left_out == {"cuda_fa3": "attention kernel 'cuda_fa3' does not run on cpu; use auto or plain"}


@pytest.mark.parametrize(("seconds", "winner"), [((1.0, 0.95), "plain"), ((1.0, 0.85), "cpu_flash")])
def test_near_a_tie_the_usual_kernel_stays(
    seconds: tuple[float, float], winner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = iter(seconds)
    monkeypatch.setattr(kernel_choice, "seconds_of", lambda _call, _device: next(took))
    part = LayerPart(num_frames=7, frame_tokens=10, window_frames=3, heads=2, head_dim=24)
    fastest.cache_clear()
    assert fastest(("plain", "cpu_flash"), part, CPU, torch.float32).kernel == winner


@pytest.mark.usefixtures("more_kernels")
def test_a_wrong_kernel_never_wins() -> None:
    names = ("cpu_nothing", "cpu_first_window", "cpu_base_two", "cpu_not_a_number", "cpu_unsupported", "cpu_flash")
    chosen = fastest(names, PART, CPU, torch.float32)
    assert chosen.kernel == "cpu_flash"
    assert chosen.seconds["cpu_flash"] > 0
    assert chosen.left_out.pop("cpu_unsupported") == "No available kernel."
    assert set(chosen.left_out) == set(names[:4])
    errors = {name: float(why.split()[3]) for name, why in chosen.left_out.items() if name != "cpu_not_a_number"}
    assert min(errors.values()) > 0.1  # far more than rounding, and each for its own reason


@pytest.mark.usefixtures("more_kernels")
def test_no_right_kernel_is_an_error() -> None:
    with pytest.raises(UserError, match=r"no attention kernel runs here: .*set attention.kernel, for example to plain"):
        fastest(("cpu_nothing",), PART, CPU, torch.float32)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_memory_that_runs_out_chooses_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another kernel, or solver, would be taken for what else happens to have the memory: another video by rounding."""

    def runs_out(*_tensors: Tensor) -> tuple[Tensor, Tensor]:
        raise error

    monkeypatch.setattr(kernels, "KERNELS", kernels.KERNELS | {"cpu_runs_out": runs_out})
    monkeypatch.setattr(kernels, "NAMES", (*kernels.NAMES, "cpu_runs_out"))
    with pytest.raises(UserError, match=r"out of memory while attention kernel cpu_runs_out was tried on cpu"):
        fastest(("cpu_runs_out", "cpu_flash"), PART, CPU, torch.float32)
    monkeypatch.setattr(eigen, "SOLVERS", {"torch": runs_out, "host": torch.linalg.eigh})
    with pytest.raises(UserError, match=r"out of memory while eigensolver torch was tried on cpu"):
        fastest_solver(("torch", "host"), 3, 8, CPU, False)


def test_bf16_rounding_is_allowed() -> None:
    assert fastest(("cpu_flash",), PART, CPU, torch.bfloat16).left_out == {}


def test_nothing_is_measured_where_there_is_no_choice() -> None:
    assert choose_kernel("plain", PART, CPU, torch.float32) == KernelChoice(kernel="plain", why="given")
    assert choose_kernel("auto", PART, CPU, torch.float32) == KernelChoice(kernel="cpu_flash", why="the only one here")


def choose(rank: int, name: str) -> KernelChoice:
    """As an engine does; every rank would choose by its own time, a failing one not at all."""

    def by_rank(name: str, *_where: object) -> KernelChoice:
        if name == "plain":
            raise UserError("none")
        return KernelChoice(kernel=f"that of rank {rank}", why="measured", seconds={"a": 1.0})

    config = RunConfig(
        model=ModelConfig(path="somewhere"),
        video=VideoConfig(num_frames=29, height=32, width=48),
        method=MethodConfig(window_frames=3),
        attention=AttentionConfig(kernel=name),
    )
    spec = SimpleNamespace(latent_shape=lambda *_size: (1, 16, 8, 4, 6), patch=(1, 2, 2))
    transformer = SimpleNamespace(
        config=SimpleNamespace(num_attention_heads=12, attention_head_dim=8), dtype=torch.float32
    )
    ranks = Ranks(mesh=mesh_of((1, 1, 2)))
    with mock.patch.object(kernel_choice, "choose_kernel", by_rank):
        try:
            return choose_on_ranks(config, spec, transformer, ranks, CPU)  # type: ignore[arg-type]
        except UserError as error:
            return KernelChoice(kernel="", why=str(error))


def test_rank_0_chooses_for_all(tmp_path: Path) -> None:
    chosen, failed = run_ranks(2, choose, ["auto", "plain"], tmp_path)
    assert chosen == [KernelChoice(kernel="that of rank 0", why="measured", seconds={"a": 1.0})] * 2
    assert [choice.why for choice in failed] == ["rank 0: none"] * 2


CUDA = torch.device("cuda", 0)
EVERY = ("torch", "host", "cupy")


@pytest.fixture
def solvers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch before 2.12 on a pretended GPU, and the process's solver put back."""
    fastest_solver.cache_clear()
    monkeypatch.setattr(eigen, "candidates", lambda *_where: EVERY)
    with pretend_cuda():
        yield
    eigen.use("torch")
    fastest_solver.cache_clear()


@pytest.mark.usefixtures("solvers")
def test_fastest_correct_solver_is_chosen_and_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    took = iter([0.108, 0.0031])
    monkeypatch.setattr(kernel_choice, "seconds_of", lambda _call, _device: next(took))
    mesh = GROUP_OF_ONE.acquire()
    chosen = choose_solver(mesh, num_matrices=6, rows=8, device=CUDA)
    assert (chosen.solver, chosen.why, chosen.seconds) == ("host", "measured", {"torch": 0.108, "host": 0.0031})
    assert chosen.left_out == {"cupy": "No module named 'cupy'"}
    assert eigen.used() == "host"
    [line] = capsys.readouterr().err.splitlines()
    assert "a fusion's 6 of 8 rows take torch 108 ms, host 3.1 ms: using host." in line
    assert choose_solver(mesh, num_matrices=6, rows=8, device=CUDA) == chosen  # once a process
    GROUP_OF_ONE.release()


@pytest.mark.usefixtures("solvers")
def test_a_wrong_solver_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.linalg.eigh

    def wrong_solver(matrices: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = right(matrices)
        return values, vectors.roll(1, 0)

    monkeypatch.setattr(eigen, "SOLVERS", {"torch": wrong_solver, "host": right, "cupy": wrong_solver})
    chosen = fastest_solver(EVERY, 6, 8, CUDA, False)
    assert chosen.solver == "host"
    assert set(chosen.left_out) == {"torch", "cupy"}
    with pytest.raises(UserError, match=r"no eigensolver is correct on cuda:0: {'torch': 'eigenvectors of 6 matrices"):
        fastest_solver(("torch",), 6, 8, CUDA, False)


def solver_on_ranks(rank: int, fault: str) -> tuple[str, str]:
    """The solver of this rank, or its error: rank 0 finds `host` fastest, rank 1 `torch`, or has none that is right."""
    fastest_solver.cache_clear()
    times = {"torch": 1.0 - 0.5 * rank, "host": 0.6}
    took = iter(times.values())

    def wrong_solver(matrices: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrices)
        return values, 2 * vectors

    solvers = dict.fromkeys(EVERY, torch.linalg.eigh)
    solvers["cupy"] = wrong_solver
    if rank == 1 and fault:
        solvers |= dict.fromkeys(("torch", "host") if fault == "all" else ("host",), wrong_solver)
    with (
        pretend_cuda(),
        mock.patch.object(eigen, "candidates", lambda *_where: EVERY),
        mock.patch.object(eigen, "SOLVERS", solvers),
        mock.patch.object(kernel_choice, "seconds_of", lambda _call, _device: next(took)),
    ):
        try:
            chosen = choose_solver(mesh_of((1, 1, 2)), num_matrices=6, rows=8, device=CUDA)
        except (UserError, StopIteration) as error:
            return "", str(error)
        return chosen.solver, eigen.used()


def test_rank_0_chooses_the_solver_and_a_fault_of_one_rank_is_all_ranks(tmp_path: Path) -> None:
    agreed, broken, other = run_ranks(2, solver_on_ranks, ["", "all", "chosen"], tmp_path)
    assert agreed == [("host", "host")] * 2
    assert {error.split(" cuda")[0] for _, error in broken + other} == {"rank 1: no eigensolver is correct on"}
    assert all(solver == "" for solver, _ in broken + other)
