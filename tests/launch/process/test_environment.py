"""Ranks on nodes: neighbours are numbered together, so that mesh and planner find ulysses groups inside nodes."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import engine.planner.arrange
from engine.config import ParallelConfig
from engine.planner.arrange import arrange_ranks, node_span
from engine.planner.gpu import read_gpu
from engine.planner.timing import link_rate
from launch.process.environment import STRATEGIES, carried, number_ranks, rank_environment
from launch.ranks.ray_pool import NoRayError, RayPool, check_placement
from parallel.mesh import build_mesh
from tests.engine.test_planner_arrange import CONFIG
from tests.launch.conftest import Run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Where Ray placed the bundles of a PACK group of 24 on nodes of 8.
PLACED = [*"A", *"B" * 8, *"A" * 3, *"C", *"A" * 4, *"C" * 7]


def nodes_of(placed: list[str]) -> list[str]:
    return [slot.node for slot in number_ranks(placed)]


def test_ranks_of_a_node_are_neighbours() -> None:
    slots = number_ranks(PLACED)
    assert "".join(slot.node for slot in slots) == "A" * 8 + "B" * 8 + "C" * 8
    assert [slot.bundle for slot in slots[:8]] == [0, 9, 10, 11, 13, 14, 15, 16]
    assert [slot.local_rank for slot in slots] == [*range(8)] * 3
    assert {slot.local_size for slot in slots} == {8}


def test_uneven_nodes_come_largest_first_and_every_bundle_is_one_rank() -> None:
    rng = random.Random(0)
    for _ in range(200):
        placed = rng.choices("ABCDE", k=rng.randint(1, 40))
        slots, sizes = number_ranks(placed), Counter(placed)
        assert sorted(slot.bundle for slot in slots) == [*range(len(placed))]
        assert all(slot.node == placed[slot.bundle] for slot in slots)
        runs = [(slot.node, slot.local_size) for slot in slots if slot.local_rank == 0]
        assert dict(runs) == sizes
        assert len(runs) == len(sizes)  # one run for each node
        assert [size for _, size in runs] == sorted(sizes.values(), reverse=True)
        for node, size in runs:
            mine = [slot for slot in slots if slot.node == node]
            assert [slot.local_rank for slot in mine] == [*range(size)]
            assert [slot.bundle for slot in mine] == sorted(slot.bundle for slot in mine)


def test_a_rank_finds_its_number_on_its_node() -> None:
    slot = number_ranks(PLACED)[9]
    numbers = {"local_rank": slot.local_rank, "local_size": slot.local_size}
    found = rank_environment(9, 24, **numbers, address="192.0.2.1", port=5)
    assert found.items() >= {"RANK": "9", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "24"}.items()


@pytest.mark.parametrize("placed", [PLACED, [*"BBBAAAABBBBBCCCC"], [*"ABABAB"], [*"AABAABAAB"]])
def test_the_mesh_s_ulysses_groups_stay_within_nodes(placed: list[str]) -> None:
    """Of every rank's mesh, for the widest ulysses axis that the nodes allow; by bundle they would not."""
    nodes = nodes_of(placed)
    world, ulysses = len(nodes), node_span(nodes)
    assert ulysses > 1
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            degrees = {"cfg": 1, "ring": world // ulysses, "ulysses": ulysses}
            mesh = build_mesh(**degrees, device=CPU, timeout=timedelta(minutes=1))
        finally:
            dist.destroy_process_group()
        assert len({nodes[other] for other in mesh.ulysses.ranks}) == 1
    by_bundle = [placed[start : start + ulysses] for start in range(0, world, ulysses)]
    assert max(len(set(group)) for group in by_bundle) > 1


def test_the_span_of_nodes_is_what_no_group_crosses() -> None:
    """Against the definition: every group of every size, on random nodes."""
    rng = random.Random(1)
    for _ in range(100):
        nodes = [name for name in "ABCD"[: rng.randint(1, 4)] for _ in range(rng.choice([2, 3, 4, 6, 8]))]
        world = len(nodes)
        for size in (size for size in range(1, world + 1) if world % size == 0):
            groups = [set(nodes[start : start + size]) for start in range(0, world, size)]
            assert (node_span(nodes) % size == 0) == all(len(group) == 1 for group in groups)
    assert node_span(["host"] * 7) == 7
    assert node_span([*"ABAB"]) == 1  # dealt out by turns, as srun may


def test_a_group_that_its_node_cannot_hold_whole_is_on_the_slower_link() -> None:
    gpu = replace(read_gpu("h100"), gpus_per_node=12, intra_node_gb_s=450.0, inter_node_gb_s=50.0)
    fast = [span for span in (2, 3, 4, 6, 8, 12, 24) if link_rate(span, gpu, world=24) > 100e9 * gpu.link_fraction]
    assert fast == [2, 3, 4, 6, 12]  # the middle one of three groups of 8 lies on both nodes
    assert link_rate(8, gpu, world=8) == link_rate(4, gpu, world=24)


def test_without_a_description_of_the_device_ulysses_stays_within_nodes() -> None:
    """Twelve heads, three nodes of 8: 24 ranks are cfg 2 and 12 for each pass, of which 6 would cross nodes."""
    nodes = nodes_of(PLACED)
    found = arrange_ranks(CONFIG, 24, CPU, nodes=nodes)
    assert found.degrees == (2, 3, 4)
    assert "cross" not in found.why
    assert arrange_ranks(CONFIG, 24, CPU, nodes=["host"] * 24).degrees == (2, 1, 12)
    forced = arrange_ranks(replace(CONFIG, parallel=ParallelConfig(cfg=2, ring=1, ulysses=12)), 24, CPU, nodes=nodes)
    assert forced.why.endswith("; ulysses groups of 12 cross nodes")


def test_the_planner_counts_with_the_nodes_that_the_ranks_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """On slow networks it keeps the all-to-all inside nodes of 4, though the GPU's description says 8."""
    gpu = replace(read_gpu("h100"), memory_gib=1e4, inter_node_gb_s=0.1)
    monkeypatch.setattr(engine.planner.arrange, "_find_gpu", lambda device: gpu)
    assert arrange_ranks(CONFIG, 8, CUDA).degrees[2] == 4
    nodes = [*"AABBCCDD"]
    assert math.gcd(arrange_ranks(CONFIG, 8, CUDA, nodes=nodes).degrees[2], 2) == 2
    found = arrange_ranks(CONFIG, 8, CUDA, nodes=nodes)
    assert found.degrees[2] <= 2, found


def test_a_placement_that_cannot_be_is_one_line() -> None:
    for strategy in STRATEGIES:
        check_placement(strategy, address="auto", num_ranks=8)
    for strategy, address, words in (
        ("pack", "auto", "must be one of PACK, STRICT_PACK, SPREAD, STRICT_SPREAD, got 'pack'"),
        ("STRICT_PACK", None, "is for ranks that --ray starts"),
        ("STRICT_SPREAD", "local", "wants 2 nodes for 2 ranks, and --ray local has one"),
    ):
        with pytest.raises(NoRayError, match=words):
            check_placement(strategy, address=address, num_ranks=2)
    check_placement("STRICT_SPREAD", address="local", num_ranks=1)


def test_what_decides_how_ranks_talk_and_compute_reaches_them_and_secrets_do_not() -> None:
    given = {
        "NCCL_SOCKET_IFNAME": "eth1",
        "GLOO_SOCKET_IFNAME": "eth1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "HF_HOME": "/shared/hf",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "OMP_NUM_THREADS": "2",
        "DIFFUSERS_ATTN_BACKEND": "native",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    kept = {"HF_TOKEN": "hf_x", "HUGGING_FACE_HUB_TOKEN": "hf_x", "HUGGINGFACE_API_KEY": "x", "NCCL_SECRET": "x"}
    own = {"CUDA_VISIBLE_DEVICES": "3", "PATH": "/bin", "HOME": "/root", "RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
    assert carried(given | kept | own) == given


def test_gpus_that_a_ray_of_this_machine_can_never_have() -> None:
    """A cluster may grow; a Ray of the run's own has what this machine has."""
    pool = RayPool("local", cpus=2, log=None)
    pool.refuse_never(0)
    with pytest.raises(
        NoRayError, match="2 ranks need 2 GPUs, and --ray local is a Ray of this machine alone, which has 0"
    ):
        pool.refuse_never(2)
    RayPool("auto", cpus=2, log=None).refuse_never(2)


@pytest.mark.parametrize("more", [(), ("--dry_run",)])
def test_a_batch_on_gpus_that_this_machine_has_not(
    run: Callable[..., Run], tmp_path: Path, more: Sequence[str]
) -> None:
    """Refused before anything is started or written."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    words = [
        "--prompts",
        tmp_path / "prompts.txt",
        "--out",
        tmp_path / "out",
        "--ray",
        "local",
        "--gpus_per_replica",
        64,
    ]
    said = run("batch", *words, *more).error
    assert said.startswith("1 replicas of 64 ranks need 64 GPUs, and this machine has ")
    assert said.endswith(", or give the address of a cluster as --ray")
    assert not (tmp_path / "out").exists()
