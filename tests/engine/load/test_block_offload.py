"""Blocks that come to the device while they run: the same video, to the bit, with any method, storage and layout, and few blocks at a time."""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor, nn

import engine.load.pipeline
from engine.adapters.published import PUBLISHED
from engine.config import MethodConfig, ModelConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.load.pipeline import offload_blocks
from engine.planner.choose import _placements, choose
from engine.planner.gpu import read_gpu
from engine.planner.model import ModelSpec, Stored, read_model
from engine.planner.plan import Case as PlannedCase
from engine.planner.plan import Options
from engine.ranks.layouts import Ranks
from parallel.mesh import build_mesh
from parallel.zero3 import held_bytes
from tests.engine import test_devices, test_pictures
from tests.engine import test_ltx_ranks as ltx
from tests.engine import test_ranks as wan
from tests.engine.applied import MODELS, applied, every_model
from tests.engine.applied import latents_of as call
from tests.engine.golden import first_picture
from tests.engine.load.test_quantised import round_to_fp8
from tests.pretend_cuda import pretend_cuda
from tests.ranks import PATIENCE, run_ranks
from tests.tiny_pipelines import random_i2v, random_ti2v, random_wan, save_random_ltx, save_random_wan

CPU = torch.device("cpu")
FAMILIES = {"wan": wan, "ltx": ltx, "pair": wan, "5b": wan}
grouping: Any = importlib.import_module("diffusers.hooks.group_offloading")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "wan": save_random_wan(tmp_path_factory.mktemp("wan")),
        "ltx": save_random_ltx(tmp_path_factory.mktemp("ltx")),
        "5b": save(random_ti2v(), tmp_path_factory.mktemp("5b")),
        "pair": save_random_wan(tmp_path_factory.mktemp("pair"), experts=2),
    }


def save(pipe: DiffusionPipeline, folder: Path) -> Path:
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


class Case(NamedTuple):
    """A model, one arrangement of the ranks, a method, and how weights are stored."""

    family: str
    folder: str
    degrees: tuple[int, int, int] = (1, 1, 1)
    method: str = "freespec"
    storage: str = "full"
    fault: str = ""


def config_of(case: Case, weights: str) -> RunConfig:
    config = FAMILIES[case.family].config_of(case.folder, case.method)
    model = ModelConfig(path=case.folder, device="cpu", storage=case.storage, weights=weights)
    return dataclasses.replace(config, model=model, sampler=dataclasses.replace(config.sampler, num_steps=2))


@contextlib.contextmanager
def on_a_cpu() -> Iterator[None]:
    """Let blocks be offloaded from the CPU to the CPU, which moves nothing and runs every hook."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.load.pipeline, "check_placement", lambda *_: None)
        yield


class Groups:
    """Which groups of modules are on the device, and the most blocks at a time."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.here: set[int] = set()
        self.most, self.brought = 0, 0
        onload, offload = ModuleGroup.onload_, ModuleGroup.offload_

        def bring(group: ModuleGroup) -> None:
            self.here |= {id(group)} if len(group.modules) == 1 and not group.parameters else set()
            self.most, self.brought = max(self.most, len(self.here)), self.brought + 1
            onload(group)

        def leave(group: ModuleGroup) -> None:
            self.here -= {id(group)}
            offload(group)

        patch.setattr(ModuleGroup, "onload_", bring)
        patch.setattr(ModuleGroup, "offload_", leave)


def compare(rank: int, case: Case) -> tuple[bool, int, int, Tensor]:
    """Whether offloaded blocks make the bits of resident ones, the most of them at a time, and how often one came."""
    cfg, ring, ulysses = case.degrees
    mesh = build_mesh(cfg=cfg, ring=ring, ulysses=ulysses, device=CPU, timeout=PATIENCE)
    with LongVideoEngine(config_of(case, "resident"), Ranks(mesh=mesh)) as made:
        expected = made.denoise("a red circle").latents
    with pytest.MonkeyPatch.context() as patch, on_a_cpu():
        groups = Groups(patch)
        with LongVideoEngine(config_of(case, "block_offload"), Ranks(mesh=mesh)) as made:
            if case.fault:
                lose_a_block(made.pipe.transformer)
            latents = made.denoise("a red circle").latents
    return torch.equal(latents, expected), groups.most, groups.brought, latents


def lose_a_block(transformer: nn.Module) -> None:
    """What a copy that is not waited for would be: a block runs with other numbers."""

    def change(layer: nn.Module, _args: Any) -> None:
        layer.weight.data.mul_(1.01)

    transformer.blocks[1].attn1.to_q.register_forward_pre_hook(change)


def test_the_video_of_resident_weights_in_every_layout(folders: dict[str, Path], tmp_path: Path) -> None:
    cases = [Case("wan", str(folders["wan"]), (1, 1, 2), method) for method in ("freespec", "freepca")]
    cases += [Case("ltx", str(folders["ltx"]), (2, 1, 1)), Case("pair", str(folders["pair"]), (1, 2, 1), storage="fp8")]
    cases += [Case("5b", str(folders["5b"]), (1, 1, 2))]
    cases += [Case("wan", str(folders["wan"]), (1, 1, 2), fault="a block without its weights")]
    for case, by_rank in zip(cases, run_ranks(2, compare, cases, tmp_path), strict=True):
        for same, most, brought, latents in by_rank:
            assert same != bool(case.fault), case
            assert most == 1, case  # two with a stream, on which the next one travels
            assert brought >= 2 * 3, case
            assert torch.equal(latents, by_rank[0][3]), case


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_on_a_gpu_blocks_and_inputs_meet(
    folders: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices only, without a stream: a pretended tensor cannot be put into `.data`, so tensors are swapped as torchao's are."""
    apply = grouping._apply_group_offloading
    monkeypatch.setattr(
        grouping,
        "_apply_group_offloading",
        lambda module, config: apply(module, dataclasses.replace(config, stream=None)),
    )
    monkeypatch.setattr(grouping, "_is_torchao_tensor", lambda _tensor: True)
    model = ModelConfig(path=str(folders[family]), device="cuda", dtype="float32", weights="block_offload")
    config = test_devices.config_of(folders[family], family)
    with pretend_cuda():
        with LongVideoEngine(config) as made:
            expected = made.generate("a red circle")
        with LongVideoEngine(dataclasses.replace(config, model=model)) as made:
            blocks = made.adapter.blocks(made.pipe.transformer)
            for _ in range(2):
                result = made.generate("a red circle")
                assert torch.equal(result.latents, expected.latents)
                assert (result.frames == expected.frames).all()
                assert {p.device.type for block in blocks for p in block.parameters()} == {"cpu"}
            assert made.facts.model["resident_bytes"]["transformer"] == 0
            assert made.facts.model["resident_bytes"]["vae"] > 0


@pytest.mark.parametrize("kind", ["i2v", "a14b"])
def test_videos_of_pictures(kind: str, tmp_path: Path) -> None:
    """With the encoder of pictures and its layers beside the blocks; in fp8, whose layers are cast inside offloaded blocks."""
    folder = save(random_i2v(kind), tmp_path / kind)
    given = first_picture(tmp_path / "first.png", 32, 48)
    config = test_pictures.config_of(folder, frames=17)

    def video(**model: Any) -> Tensor:
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
        with LongVideoEngine(changed) as made, torch.no_grad():
            if not model:
                for transformer in made.adapter.experts(made.pipe).values():
                    round_to_fp8(transformer)
            return made.denoise("a red circle", given=given).latents

    with on_a_cpu():
        offloaded = video(weights="block_offload", storage="fp8")
    assert torch.equal(offloaded, video(storage="fp8"))
    assert torch.equal(offloaded, video())
    assert not torch.equal(offloaded, video(storage="full"))


@every_model
@pytest.mark.parametrize("offloaded", ["before", "after"])
def test_a_pipeline_of_ones_own_whose_blocks_are_offloaded(model: str, offloaded: str) -> None:
    """Blocks, or single layers, before and after the method, and without it again."""
    expected = {}
    with applied(plain := MODELS[model]()):
        expected["long"] = call(plain)
    expected["stock"] = call(plain)
    pipe = MODELS[model]()
    kind = (
        {"offload_type": "block_level", "num_blocks_per_group": 1}
        if offloaded == "before"
        else {"offload_type": "leaf_level"}
    )
    if offloaded == "before":
        pipe.transformer.enable_group_offload(CPU, CPU, **kind)
    with applied(pipe):
        if offloaded == "after":
            pipe.transformer.enable_group_offload(CPU, CPU, **kind)
        assert torch.equal(call(pipe), expected["long"])
    assert torch.equal(call(pipe), expected["stock"])
    assert not torch.equal(expected["stock"], expected["long"])


def test_a_stream_is_used_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(grouping, "_apply_group_offloading", lambda _module, config: asked.append(config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    for device in (CPU, torch.device("cuda")):
        offload_blocks(random_wan(), ["transformer"], device=device, with_text=True)
    assert [config.stream is not None for config in asked] == [False, False, True, False]


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_the_planner_counts_what_diffusers_brings(folders: dict[str, Path], family: str) -> None:
    """Bytes of each group that diffusers makes: those outside the blocks, and the largest block."""
    case = Case(family, str(folders[family]))
    with on_a_cpu(), LongVideoEngine(config_of(case, "block_offload")) as made:
        parts = {"transformer": made.pipe.transformer, "text_encoder": made.pipe.text_encoder}
        spec, found = read_model(made.config.model), {}
        for name, part in parts.items():
            hooks = {
                id(hook.group): hook.group
                for module in part.modules()
                if (registry := getattr(module, "_diffusers_hook", None)) is not None
                and (hook := registry.get_hook("group_offloading")) is not None
            }
            blocks, outside = [0], {}
            for group in hooks.values():
                held = {
                    id(p): p for p in (*(p for module in group.modules for p in module.parameters()), *group.parameters)
                }
                if "Block" in type(group.onload_leader).__name__:
                    blocks.append(sum(p.nbytes for p in held.values()))
                else:
                    outside |= held
            found[name] = (sum(p.nbytes for p in outside.values()), max(blocks))
            assert held_bytes(part) >= sum(found[name])
    planned = spec.offloaded_bytes(Stored(itemsize=4))
    assert planned["transformer"] == (found["transformer"][0], 2 * found["transformer"][1])
    assert planned["text_encoder"] == found["text_encoder"]


SMALL, LARGE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "quantised": {"storage": "fp8"},
    "file": {"file_bytes": (10**10,)},
    "sharded": {"weights": "zero3"},
}
LONG = VideoConfig(num_frames=321, height=480, width=832)


def planned(name: str, memory_gib: float, **options: Any) -> PlannedCase:
    """321 frames of 480p on one card; 2 GiB of it are not for tensors."""
    return PlannedCase(
        spec=ModelSpec(name=name, source="test", configs=PUBLISHED[name]),
        video=LONG,
        sampler=SamplerConfig(),
        method=MethodConfig(name="freespec", window_frames=21),
        gpu=dataclasses.replace(read_gpu("rtx4090"), memory_gib=memory_gib, reserved_gib=2.0),
        world_size=1,
        options=Options(**options),
    )


def test_what_does_not_fit_is_planned_with_blocks_on_the_cpu() -> None:
    """14B on a card of 24 GB, 1.3B on one of 12 GB."""
    for name, memory_gib in ((LARGE, 24.0), (SMALL, 12.0)):
        resident, offloaded = planned(name, memory_gib), planned(name, memory_gib, weights="block_offload")
        (before, peak), (after, lower) = (case.memory((1, 1, 1), ["dual"]) for case in (resident, offloaded))
        assert not resident.fits(peak)
        assert offloaded.fits(lower)
        assert after["weights"] + after["gathered"] < before["weights"] / 2
        assert after["activations"] == before["activations"]
    with pytest.raises(UserError, match=r"the smallest change that fits is model\.weights block_offload"):
        choose(planned(LARGE, 24.0))


def test_only_what_can_be_is_proposed() -> None:
    """zero3 for plain weights on several GPUs; fewer bits once, and not for what zero3 shards."""
    two = {name: dataclasses.replace(planned(LARGE, 24.0, **change), world_size=2) for name, change in CHANGES.items()}
    words = {name: [words for words, _ in _placements(case)] for name, case in two.items()}
    assert words["plain"][-3:] == ["model.weights zero3", "model.weights block_offload", "model.storage fp8"]
    assert words["quantised"][-1] == words["file"][-1] == "model.weights block_offload"
    assert "model.weights zero3" not in words["quantised"] + words["file"]
    assert words["sharded"] == ["parallel.text_device cpu", "model.shards cpu"]
    case = planned(LARGE, 33.0, weights="cpu_offload", storage="fp8")
    assert case.fits(case.memory((1, 1, 1), ["dual"])[1])
    assert not case.fits(planned(LARGE, 33.0, weights="cpu_offload").memory((1, 1, 1), ["dual"])[1])


def test_a_model_on_a_cpu_and_compiled_blocks_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="block_offload moves blocks between CPU and GPU and needs CUDA") as refused:
        LongVideoEngine(config_of(Case("wan", str(folders["wan"])), "block_offload"))
    assert "\n" not in str(refused.value)
    with pytest.raises(
        UserError, match=r"model\.compile cannot compile layers that model\.weights block_offload brings"
    ):
        ModelConfig(path="somewhere", weights="block_offload", compile=True)
