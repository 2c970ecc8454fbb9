"""What `attention.kernel auto` becomes: the fastest kernel that is right, rank 0's choice on every rank."""

import math
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

from engine import kernel_choice
from engine.config import AttentionConfig, MethodConfig, ModelConfig, RunConfig, VideoConfig
from engine.errors import UserError
from engine.kernel_choice import KernelChoice, LayerPart, choose_kernel, choose_on_ranks, fastest
from freespec import kernels
from freespec.kernels import cpu_flash
from tests.engine.golden import mesh_of
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
    with pytest.raises(UserError, match=r"no attention kernel runs here: .*choose one as attention.kernel, like plain"):
        fastest(("cpu_nothing",), PART, CPU, torch.float32)


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
    mesh = mesh_of((1, 1, 2))
    with mock.patch.object(kernel_choice, "choose_kernel", by_rank):
        try:
            where = CPU, torch.float32
            return choose_on_ranks(config, spec, num_heads=12, head_dim=8, mesh=mesh, where=where)  # type: ignore[arg-type]
        except UserError as error:
            return KernelChoice(kernel="", why=str(error))


def test_rank_0_chooses_for_all(tmp_path: Path) -> None:
    chosen, failed = run_ranks(2, choose, ["auto", "plain"], tmp_path)
    assert chosen == [KernelChoice(kernel="that of rank 0", why="measured", seconds={"a": 1.0})] * 2
    assert [choice.why for choice in failed] == ["rank 0: none"] * 2
