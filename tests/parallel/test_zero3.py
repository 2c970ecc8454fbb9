"""Weights shared out over ranks: each holds its share and no more, forwards give the same bits, the file goes away."""

import contextlib
import importlib.util
import io
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.decode.live_bytes import LiveBytes
from parallel.zero3 import (
    LIVE_LAYERS,
    check_zero3,
    device_bytes,
    device_index,
    held_bytes,
    keep_shares_in_file,
    num_parameters,
    repeated_layers,
    shard_weights,
)
from tests.ranks import run_ranks

CPU = torch.device("cpu")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the optional package deepspeed is not installed"
)


class Layer(nn.Module):
    """A layer with sizes that no number of ranks divides, a parameter of its own, and one of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 7)
        self.gain = nn.Parameter(torch.randn(7))
        self.exact = nn.Parameter(torch.randn(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) * self.gain + self.exact.sum()


class Stack(nn.Module):
    """Layers between an embedding and a head that share one tensor, with a buffer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.arange(7.0))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.shift
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Case(NamedTuple):
    """Where the shares are kept, and what is broken on purpose."""

    keep: str
    folder: str
    fault: str = ""


def make_stack(seed: int = 0) -> Stack:
    torch.manual_seed(seed)
    return Stack()


def forward_on_ranks(rank: int, case: Case) -> dict[str, object]:
    linear, size = nn.functional.linear, dist.get_world_size()
    group = dist.new_group(list(range(size)))
    # The others' values are of no account.
    whole, module = make_stack(), make_stack(seed=rank)
    before, sizes = held_bytes(module), [(p.numel(), p.element_size()) for p in module.parameters()]
    ids = torch.arange(11)
    expected = whole(ids).detach()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        shard_weights(module, group=group, device=CPU, keep="device" if case.keep == "device" else "cpu")
    if case.keep == "file":
        keep_shares_in_file(module, Path(case.folder))
    if case.fault == "a share of another rank" and rank == 1:
        module.layers[1].inner.weight.ds_tensor.add_(1e-3)
    with torch.no_grad():
        outs = [module(ids) for _ in range(4)]  # DeepSpeed learns the order in two forwards, and then gathers ahead
    return {
        "same": [torch.equal(out, expected) for out in outs],
        "before": before,
        "held": held_bytes(module),
        "here": device_bytes(module, CPU),
        "share": sum(-(-count // size) * item for count, item in sizes),
        "numbers": (num_parameters(module), num_parameters(whole)),
        "left": [path.name for path in Path(case.folder).iterdir()],
        "linear": nn.functional.linear is linear,
        "said": said.getvalue(),
    }


@needs_deepspeed
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_holds_its_share_and_makes_the_same_bits(ranks: int, tmp_path: Path) -> None:
    (tmp_path / "drive").mkdir()
    cases = [Case(keep, str(tmp_path / "drive")) for keep in ("device", "cpu", "file")]
    *results, broken = run_ranks(
        ranks, forward_on_ranks, [*cases, Case("device", str(tmp_path), "a share of another rank")], tmp_path
    )
    # Negative control: what a rank computes with comes from the others, and not from a copy that it kept.
    assert [found["same"] for found in broken] == [[False] * 4] * ranks
    for by_rank in results:
        for found in by_rank:
            assert found["same"] == [True] * 4
            # Exactly, before and after forwards: nothing stays whole.
            assert found["held"] == found["here"] == found["share"]
            assert found["held"] <= found["before"] / ranks + 8 * 14  # at most a number more for each of the 14 tensors
            assert found["numbers"][0] == found["numbers"][1]
            assert found["left"] == []
            assert found["linear"]
            assert found["said"] == ""


def test_layers_are_those_of_the_outermost_lists() -> None:
    stack = make_stack()
    assert repeated_layers(stack) == list(stack.layers)
    nested = nn.ModuleDict({"encoder": stack, "other": nn.Linear(2, 2)})
    assert repeated_layers(nested) == list(stack.layers)
    assert repeated_layers(nn.Linear(2, 2)) == []


def test_a_full_drive_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    module = nn.Linear(3, 3)
    with (
        mock.patch("os.posix_fallocate", side_effect=OSError(28, "No space left on device")),
        pytest.raises(OSError, match="No space left"),
    ):
        keep_shares_in_file(module, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_one_clear_line() -> None:
    with (
        mock.patch.dict(sys.modules, {"deepspeed": None, "deepspeed.accelerator": None}),
        pytest.raises(ImportError, match=r"model\.weights zero3 needs the optional package deepspeed .*pip install"),
    ):
        check_zero3(CPU)


class Deep(nn.Module):
    """Layers of two large tensors each, and next to no activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False)) for _ in range(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class SettledBytes(LiveBytes):
    """Live bytes, but for what gloo's thread lets go of a moment after it was freed: what stays for two seconds in all is held."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.patience = 2.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """After an operator beyond the limit, wait for the thread before the bytes count."""
        before = self.peak
        out = super().__torch_dispatch__(func, types, args, kwargs)
        while self.now > self.limit and self.patience > 0:
            time.sleep(0.001)
            self.patience -= 0.001
        self.peak = max(before, self.now)
        return out


def peak_layers(rank: int, _case: None) -> list[float]:
    """Most layers that were whole at a time, in each of four forwards."""
    module, x, peaks = Deep(), torch.ones(1, 300), []
    layer = held_bytes(module.layers[0])
    shard_weights(module, group=dist.group.WORLD, device=CPU)
    for _ in range(4):
        with torch.no_grad(), SettledBytes(1.01 * LIVE_LAYERS * layer) as live:
            module(x)
        peaks.append(live.peak / layer)
    return peaks


@needs_deepspeed
def test_two_layers_are_whole_at_a_time(tmp_path: Path) -> None:
    [by_rank] = run_ranks(2, peak_layers, [None], tmp_path)
    for peaks in by_rank:
        assert peaks == pytest.approx([LIVE_LAYERS] * 4, abs=0.01)


@needs_deepspeed
@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed uses the GPU where there is one")
def test_another_kind_of_device_is_one_clear_line() -> None:
    check_zero3(CPU)
    with pytest.raises(
        ValueError, match="DeepSpeed uses cpu on this machine, and the model is on cuda; set DS_ACCELERATOR"
    ):
        check_zero3(torch.device("cuda"))


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    """DeepSpeed takes LOCAL_RANK for the GPU of a rank; the engine's device is `cuda`, after set_device."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert device_index(torch.device("cuda")) == 3
    assert device_index(torch.device("cuda", 1)) == 1
    assert device_index(torch.device("cpu")) == 0
