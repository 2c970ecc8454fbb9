"""Weights shared out over the ranks: the video of whole weights, bit for bit, in any arrangement, with 1/P of them."""

import contextlib
import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import accelerate
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline

from engine.config import ModelConfig, ParallelConfig, RunConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.load.sharded_weights import check_placement
from engine.planner.model import read_model
from engine.ranks.layouts import Ranks
from parallel.deepspeed import quiet_import
from parallel.mesh import build_mesh
from parallel.zero3 import device_bytes, held_bytes
from tests.engine import test_ltx_ranks as ltx
from tests.engine import test_ranks as wan
from tests.engine.golden import all_degrees, relative
from tests.loras import random_lora, save_lora
from tests.ranks import PATIENCE, run_ranks
from tests.tiny_pipelines import random_wan, save_random_ltx, save_random_wan

CPU = torch.device("cpu")
FAMILIES = {"wan": wan, "ltx": ltx}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the optional package deepspeed is not installed"
)


class Case(NamedTuple):
    """A model, one arrangement of the ranks, where shares are kept, and what is done beside."""

    family: str
    folder: str
    degrees: tuple[int, int, int]
    shards: str = "device"
    dtype: str = "float32"
    special: str = ""


def config_of(case: Case, weights: str = "zero3") -> RunConfig:
    config = FAMILIES[case.family].config_of(case.folder, "freespec")
    shards = case.shards if weights == "zero3" else "device"
    lora = Path(case.folder) / "lora.safetensors"  # of Wan's; fused before the weights are shared
    loras = (str(lora),) if lora.exists() else ()
    model = ModelConfig(path=case.folder, device="cpu", dtype=case.dtype, weights=weights, shards=shards, loras=loras)
    text_device = "cpu" if case.special == "text on the CPU" else "model"
    return dataclasses.replace(
        config,
        model=model,
        parallel=ParallelConfig(text_device=text_device),
        sampler=dataclasses.replace(config.sampler, num_steps=2),  # a dual step and a local one
    )


@functools.cache
def resident_on(case: Case) -> torch.Tensor:
    """The latents of whole weights in the same arrangement; once for all places of the shares."""
    return made_with(case, "resident")[1]


def made_with(case: Case, weights: str) -> tuple[LongVideoEngine, torch.Tensor]:
    cfg, ring, ulysses = case.degrees
    mesh = build_mesh(cfg=cfg, ring=ring, ulysses=ulysses, device=CPU, timeout=PATIENCE)
    made = LongVideoEngine(config_of(case, weights), Ranks(mesh=mesh))
    if case.special == "a share of another rank" and weights == "zero3" and mesh.world.rank == 1:
        made.adapter.attention_modules(made.pipe.transformer)[1].to_q.weight.ds_tensor.mul_(1.5)
    if weights == "resident":  # what is read from a file may begin anywhere, and some kernels sum in another order then
        for part in filter(None, (made.pipe.transformer, made.pipe.text_encoder)):
            for parameter in part.parameters():
                parameter.data = parameter.data.clone()
    if case.special == "offload hooks":
        accelerate.cpu_offload_with_hook(made.pipe.transformer, CPU)
    return made, made.denoise("a red circle").latents


def compare_on_ranks(rank: int, case: Case) -> dict[str, Any]:
    """What this rank finds; runs on every rank."""
    partition = quiet_import("deepspeed.runtime.zero.partition_parameters")
    resident = resident_on(case._replace(shards="device", special=""))
    sizes, gather = [], partition._dist_allgather_fn
    with pytest.MonkeyPatch.context() as patch:

        def spy(share, whole, group=None):
            sizes.append(whole.numel())
            return gather(share, whole, group)

        patch.setattr(partition, "_dist_allgather_fn", spy)
        made, latents = made_with(case, "resident" if case.special == "offload hooks" else "zero3")
    found = {"latents": latents, "same": torch.equal(latents, resident), "gathered": sizes}
    found["loaded"] = made.facts.model
    parts = {name: getattr(made.pipe, name) for name in ("transformer", "text_encoder")}
    found["held"] = {name: None if part is None else held_bytes(part) for name, part in parts.items()}
    if case.special == "texts":
        # In the cache: rank 0 has no need of the others. Then one that no rank can encode, and the engine goes on.
        again = made.denoise("a red circle").latents
        with pytest.raises(UserError, match="tokens") as refused:
            made.denoise("a red circle " * 9)
        other = made.denoise("a blue star").latents
        found["texts"] = (torch.equal(again, latents), relative(other, latents) > 1e-3, str(refused.value))
    made.close()
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    wan = save_random_wan(tmp_path_factory.mktemp("wan"))
    save_lora(wan / "lora.safetensors", random_lora(random_wan().transformer))
    return {
        "wan": str(wan),
        "ltx": str(save_random_ltx(tmp_path_factory.mktemp("ltx"))),
    }


@functools.cache
def on_one_rank(case: Case) -> torch.Tensor:
    """The latents of whole weights in this process."""
    made = LongVideoEngine(config_of(case, "resident"))
    latents = made.denoise("a red circle").latents
    made.close()
    return latents


def check_bits(case: Case, by_rank: list[dict[str, Any]]) -> None:
    """Whole weights and shared ones make the same bits, on every rank."""
    for found in by_rank:
        assert found["same"], case
        assert torch.equal(found["latents"], by_rank[0]["latents"]), case
        # All ranks gather the same in the same order, also where they run other texts (cfg) or have other tokens.
        assert found["gathered"] == by_rank[0]["gathered"] != [], case


def check_bytes(case: Case, by_rank: list[dict[str, Any]]) -> None:
    """Each rank holds 1/P of transformer and text encoder, as the planner counts them."""
    spec, ranks, itemsize = read_model(ModelConfig(path=case.folder)), len(by_rank), 4 if case.dtype == "float32" else 2
    whole, share = spec.weight_bytes(itemsize), spec.weight_bytes(itemsize, ranks=ranks)
    for rank, found in enumerate(by_rank):
        resident, held = found["loaded"]["resident_bytes"], found["held"]
        assert resident["transformer"] == held["transformer"] == share["transformer"], case
        assert (
            share["transformer"] < 1.02 * whole["transformer"] / ranks
        )  # tensors that ranks do not divide are rounded up
        assert resident["vae"] == whole["vae"]
        assert found["loaded"]["parameters"]["transformer"] == spec.parameters["transformer"]
        if case.special == "text on the CPU":
            assert held["text_encoder"] == (whole["text_encoder"] if rank == 0 else None)
        else:
            assert held["text_encoder"] == share["text_encoder"] < 1.02 * whole["text_encoder"] / ranks


@needs_deepspeed
def test_four_ranks_make_the_video_of_whole_weights_with_a_quarter_of_them(folders, tmp_path):
    cases = [Case("wan", folders["wan"], degrees) for degrees in ((1, 2, 2), (2, 1, 2), (2, 2, 1))]
    cases += [Case("ltx", folders["ltx"], (2, 1, 2))]
    for case, by_rank in zip(cases, run_ranks(4, compare_on_ranks, cases, tmp_path), strict=True):
        check_bits(case, by_rank)
        check_bytes(case, by_rank)


@needs_deepspeed
def test_two_ranks_make_the_video_of_whole_weights_with_half_of_them(folders, tmp_path):
    cases = [Case(family, folders[family], degrees) for family in FAMILIES for degrees in all_degrees(2)]
    cases += [Case("wan", folders["wan"], (1, 1, 2), shards) for shards in ("cpu", f"nvme:{tmp_path}")]
    cases += [
        Case("wan", folders["wan"], (2, 1, 1), dtype="bfloat16"),
        Case("wan", folders["wan"], (1, 1, 2), special="text on the CPU"),
        Case("wan", folders["wan"], (2, 1, 1), special="texts"),
    ]
    broken = Case("wan", folders["wan"], (1, 2, 1), special="a share of another rank")
    offload = Case("wan", folders["wan"], (1, 1, 2), special="offload hooks")
    *results, of_broken, of_offload = run_ranks(2, compare_on_ranks, [*cases, broken, offload], tmp_path)
    for case, by_rank in zip(cases, results, strict=True):
        check_bits(case, by_rank)
        check_bytes(case, by_rank)
        if case.dtype == "float32":
            assert relative(by_rank[0]["latents"], on_one_rank(case)) <= 1e-5, case
    for again, other, refused in (found["texts"] for found in results[-1]):
        assert (again, other) == (True, True)
        assert refused == results[-1][0]["texts"][2]
    # Negative control of the comparison: the weights are those that the ranks hold.
    assert not of_broken[0]["same"]
    assert relative(of_broken[0]["latents"], on_one_rank(broken)) > 1e-3
    assert all(found["same"] and found["gathered"] == [] for found in of_offload)


@needs_deepspeed
@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_can_keep_its_weights_in_a_file(folders, family, tmp_path):
    case = Case(family, folders[family], (1, 1, 1), f"nvme:{tmp_path}")
    made = LongVideoEngine(config_of(case))
    latents = made.denoise("a red circle").latents
    made.close()
    assert relative(latents, on_one_rank(case)) <= 1e-6


@pytest.mark.parametrize(
    ("settings", "device", "text_device", "message"),
    [
        (
            {"weights": "cpu_offload"},
            "cpu",
            "model",
            r"model\.weights cpu_offload moves parts .* needs CUDA.*use .* resident",
        ),
        (
            {"weights": "cpu_offload"},
            "cuda",
            "cpu",
            r"parallel\.text_device cpu and model\.weights cpu_offload cannot",
        ),
        ({"weights": "zero3", "shards": "nvme:~nosuchuser/x"}, "cpu", "model", "cannot resolve '~nosuchuser/x'"),
        ({"weights": "zero3", "shards": "nvme:/no/such"}, "cpu", "model", "there is no folder /no/such; make it"),
    ],
)
def test_what_cannot_work_is_one_line(settings, device, text_device, message):
    if "shards" in settings:
        pytest.importorskip("deepspeed")
    with pytest.raises(UserError, match=message) as caught:
        check_placement(ModelConfig(path="x", **settings), torch.device(device), text_device)
    assert "\n" not in str(caught.value)


def cpu_in_the_gpu_s_place(patch: pytest.MonkeyPatch) -> list[int]:
    """Let parts be offloaded from a CPU to a CPU; the list is filled with the GPUs that are asked for."""
    offload, asked = DiffusionPipeline.enable_model_cpu_offload, []

    def onto_the_cpu(pipe, device):
        asked.append(device.index)
        offload(pipe, device="cpu")

    patch.setattr(DiffusionPipeline, "enable_model_cpu_offload", onto_the_cpu)
    patch.setattr("engine.load.pipeline.check_placement", lambda *_: None)  # which refuses a CPU
    patch.setattr(torch.cuda, "current_device", lambda: 3)
    return asked


def offloaded_on_ranks(rank: int, case: Case) -> dict[str, Any]:
    """What this rank finds of parts that are offloaded on every rank; runs on every rank."""
    resident = resident_on(case._replace(special=""))
    with pytest.MonkeyPatch.context() as patch:
        asked = cpu_in_the_gpu_s_place(patch)
        made, latents = made_with(case, "cpu_offload")
    parts = {name: getattr(made.pipe, name) for name in ("text_encoder", "transformer", "vae")}
    hooked = {name for name, part in parts.items() if isinstance(getattr(part, "_hf_hook", None), CpuOffload)}
    made.close()
    return {"asked": asked, "hooked": hooked, "difference": relative(latents, resident)}


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_parts_are_offloaded_on_every_rank_and_make_the_same_video(family, folders, tmp_path):
    cases = [Case(family, folders[family], degrees) for degrees in ((1, 1, 2), (1, 2, 1), (2, 1, 1))]
    for by_rank in run_ranks(2, offloaded_on_ranks, cases, tmp_path):
        for rank, found in enumerate(by_rank):
            assert found["asked"] == [3]
            assert found["hooked"] == {"transformer", "vae"} | ({"text_encoder"} if rank == 0 else set())
            assert found["difference"] <= 1e-6


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_offloaded_parts_wait_on_the_cpu_and_make_the_same_video(family, folders, monkeypatch):
    """The wiring, with a CPU in the GPU's place: which parts move and in what order, and what counts as the GPU's."""
    case = Case(family, folders[family], (1, 1, 1))
    with contextlib.closing(LongVideoEngine(config_of(case, "resident"))) as resident:
        expected = resident.denoise("a red circle").latents
    asked = cpu_in_the_gpu_s_place(monkeypatch)
    with contextlib.closing(LongVideoEngine(config_of(case, "cpu_offload"))) as engine:
        assert asked == [3]  # the rank's own, not the first of the machine
        parts = [getattr(engine.pipe, name) for name in ("text_encoder", "transformer", "vae")]
        hooks = [part._hf_hook for part in parts]
        assert all(isinstance(hook, CpuOffload) for hook in hooks)
        assert [hook.prev_module_hook and hook.prev_module_hook.model for hook in hooks] == [None, *parts[:2]]
        assert relative(engine.denoise("a red circle").latents, expected) <= 1e-6
        assert set(engine.facts.model["resident_bytes"]) == {"transformer", "vae", "text_encoder"}
        assert all(device_bytes(part, torch.device("cuda")) == 0 for part in parts)
        assert all(device_bytes(part, CPU) == held_bytes(part) > 0 for part in parts)


def test_without_deepspeed_the_engine_says_so(folders):
    case = Case("wan", folders["wan"], (1, 1, 1))
    with (
        mock.patch.dict(sys.modules, {"deepspeed": None, "deepspeed.accelerator": None}),
        pytest.raises(UserError, match=r"model\.weights zero3 needs the optional package deepspeed .*pip install"),
    ):
        LongVideoEngine(config_of(case))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "zero3", "shards": "disk"}, r"model\.shards must be device, cpu or nvme:FOLDER, got 'disk'"),
        ({"weights": "zero3", "shards": "nvme:"}, r"model\.shards must be device, cpu or nvme:FOLDER, got 'nvme:'"),
        ({"shards": "cpu"}, r"model\.shards cpu requires model\.weights zero3, and model\.weights is resident"),
    ],
)
def test_a_wrong_setting_is_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(path="x", **settings)
    assert ModelConfig(path="x", weights="zero3", shards="nvme:/a:b").shards_folder == "/a:b"
