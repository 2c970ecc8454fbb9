"""Quantised keys outside the windows: the video changes slightly, and the record says so."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from unittest import mock

import pytest
import torch

from engine.config import (
    AttentionConfig,
    MethodConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    SamplerConfig,
    VideoConfig,
)
from engine.engine import LongVideoEngine
from engine.errors import UserError
from freespec.attention import WindowedAttention, masked_ref
from freespec.kernels import plain
from freespec.methods import FreeSpec
from freespec.sage import sage_kernel
from parallel.attention import TORCH_EXCHANGE, SequenceLayout
from parallel.collectives import CollectiveTrace, ignore_bytes
from parallel.mesh import build_mesh
from parallel.shards import SequencePlan
from tests.freespec import sage_stand_in
from tests.ranks import PATIENCE, run_ranks
from tests.tiny_pipelines import save_random_wan

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def on_any_device() -> Iterator[None]:
    """The stand-in where `sage` is asked for, which the package itself would refuse on a CPU."""

    def select(name: str, *_where: object, dual: str) -> object:
        assert dual == "auto"
        return None if name == "same" else sage_kernel(sage_stand_in.sageattn)

    with (
        mock.patch("engine.kernel_choice.select_complement", select),
    ):
        yield


def config_of(folder: Path, complement: str, method: str = "freespec") -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(folder), device="cpu"),
        video=VideoConfig(num_frames=29, height=48, width=32),
        sampler=SamplerConfig(num_steps=4, guidance_scale=3.0, seed=3, max_text_tokens=20),
        method=MethodConfig(name=method, window_frames=3, freespec=FreeSpec(domain="step", fused_share=0.5)),
        attention=AttentionConfig(complement=complement),
        output=OutputConfig(progress="off"),
    )


def made(config: RunConfig) -> tuple[torch.Tensor, dict]:
    engine = LongVideoEngine(config)
    result = engine.generate(PROMPT)
    engine.close()
    return result.latents, json.loads(json.dumps(result.record))


@pytest.mark.usefixtures("on_any_device")
def test_the_video_is_another_by_little_and_the_record_says_so(folder: Path) -> None:
    (plain, before), (rounded, record) = (made(config_of(folder, name)) for name in ("same", "sage"))
    assert (before["complement"], record["complement"]) == ("same", "sage")
    assert "sageattention" in record["versions"]
    assert record["config"]["attention"]["complement"] == "sage"
    error = (rounded - plain).norm() / plain.norm()
    assert 0 < error < 1e-3


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize("method", ["direct", "sliding_window"])
def test_methods_without_dual_steps_keep_every_bit(folder: Path, method: str) -> None:
    assert torch.equal(made(config_of(folder, "same", method))[0], made(config_of(folder, "sage", method))[0])


@pytest.mark.usefixtures("on_any_device")
def test_a_stopped_run_does_not_go_on_with_another_complement(folder: Path, tmp_path: Path) -> None:
    first = LongVideoEngine(config_of(folder, "same"))
    first.denoise(PROMPT, snapshot=tmp_path / "run", snapshot_every=1)
    first.close()
    second = LongVideoEngine(config_of(folder, "sage"))
    with pytest.raises(UserError, match="belongs to another run"):
        second.denoise(PROMPT, snapshot=tmp_path / "run")
    second.close()


class Counting(WindowedAttention):
    """Counts the calls for keys that come round the ring, in this process."""

    calls: ClassVar[list[int]] = []

    def far(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append(k.shape[1])
        return super().far(q, k, v)


def error_over_a_ring(_rank: int, case: tuple[str, str]) -> tuple[float, int]:
    """Largest error of this rank's part of the global branch against fp64, and its calls for keys from other ranks."""
    mode, function = case
    mesh = build_mesh(cfg=1, ring=3, ulysses=1, device=torch.device("cpu"), timeout=PATIENCE)
    plan = SequencePlan(tokens=77, heads=2, ring=3, ulysses=1)
    trace = CollectiveTrace(label="test", on_bytes=ignore_bytes)
    layout = SequenceLayout(mesh=mesh, plan=plan, exchange=TORCH_EXCHANGE, trace=trace)
    q, k, v = torch.randn(3, 1, 77, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    k = k + torch.linspace(-1, 2, 8, dtype=torch.float64)
    expected = masked_ref(q, k, v, frame_tokens=7, window_frames=None)
    rest = sage_kernel(getattr(sage_stand_in, function))
    kernels = Counting(num_frames=11, frame_tokens=7, window_frames=3, kernel=plain, rest_kernel=rest)
    Counting.calls.clear()
    mine = [layout.shard_tokens(x, dim=1).contiguous() for x in (q, k, v)]
    o_global = layout.branches(*mine, mode, kernels)[1]
    return float((o_global - layout.shard_tokens(expected, dim=1)).abs().max()), len(Counting.calls)


def test_keys_from_other_ranks_are_quantised_in_dual_steps_only(tmp_path: Path) -> None:
    cases = [("dual", "exact"), ("dual", "uncorrected"), ("global", "uncorrected")]
    dual, broken, whole = run_ranks(3, error_over_a_ring, cases, tmp_path)
    assert max(error for error, _ in dual) < 1e-12
    assert max(error for error, _ in broken) > 1e-3  # negative control
    assert max(error for error, _ in whole) < 1e-12
    assert all(calls > 0 for _, calls in dual)
    assert all(calls == 0 for _, calls in whole)


def test_on_a_cpu_it_is_refused_before_anything_is_loaded(folder: Path) -> None:
    config = config_of(folder, "sage")
    nowhere = dataclasses.replace(config, model=dataclasses.replace(config.model, path=f"{folder}/none"))
    with pytest.raises(UserError, match=r"attention\.complement sage does not run on cpu; use same") as caught:
        LongVideoEngine(nowhere)
    assert "\n" not in str(caught.value)
