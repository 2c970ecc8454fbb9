"""Peak memory of a dual step against a global step of Wan at 321 frames, counted on tensors without numbers."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.memory import GIB, LAYOUTS, MODELS, measure, peaks
from engine.adapters.wan_published import PUBLISHED
from engine.planner.model import ModelSpec
from freespec import attention

LIMIT = 1.15
LARGE = "Wan-AI/Wan2.1-T2V-14B-Diffusers"


@pytest.fixture
def fake_world() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    yield
    dist.destroy_process_group()


def counted(ring: int, ulysses: int) -> tuple[dict[str, float], float]:
    """GiB of a global and of a dual step beside the weights, and of the weights, of the model with the least room."""
    spec = ModelSpec(name=LARGE, source="test", configs=PUBLISHED[LARGE])
    return peaks(spec, ring, ulysses, ("global", "dual")), spec.weight_bytes(2)["transformer"] / GIB


@pytest.mark.usefixtures("fake_world")
@pytest.mark.parametrize("ulysses", [1, 4])
def test_a_dual_step_needs_hardly_more_than_a_global_one(ulysses: int) -> None:
    found, _ = counted(1, ulysses)
    assert found["dual"] <= LIMIT * found["global"]


@pytest.mark.usefixtures("fake_world")
def test_on_a_ring_the_halo_is_little_beside_the_weights() -> None:
    """The keys of the windows come from the neighbours, which a global step does not ask for."""
    found, weights = counted(8, 1)
    assert found["dual"] + weights <= LIMIT * (found["global"] + weights)


@pytest.mark.usefixtures("fake_world")
def test_negative_control_a_merge_of_whole_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "merge_step", lambda num_tokens: num_tokens)
    found, _ = counted(1, 1)
    assert found["dual"] > LIMIT * found["global"]


@pytest.mark.slow
def test_the_benchmark_counts_each_model_in_each_layout() -> None:
    rows = [(row["model"], (row["ring"], row["ulysses"])) for row in measure()]
    assert rows == [(model, layout) for model in MODELS for layout in LAYOUTS]
