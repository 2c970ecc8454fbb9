"""Predicted disk usage of a batch against its files."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from engine.batch.files import BatchFiles
from engine.batch.forecast import DiskForecast, disk_forecast, gpu_hours
from engine.batch.variants import Variant
from engine.config import AttentionConfig, ModelConfig, ParallelConfig, RunConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.planner.gpu import FOLDER
from tests.engine.batch import cases
from tests.tiny_pipelines import save_random_wan

HEADER_BYTES = 100
"""What a safetensors file holds beside its numbers, at most."""


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_texts_are_counted_as_they_will_lie_in_the_cache(tmp_path: Path, guidance: float) -> None:
    every = cases.batch(guidance_scale=guidance, max_text_tokens=20)
    model = ModelConfig(path=str(save_random_wan(tmp_path / "wan")), device="cpu")
    config = dataclasses.replace(cases.config(guidance_scale=guidance, max_text_tokens=20), model=model)
    files = BatchFiles(root=tmp_path / "out")

    def texts() -> int:
        return disk_forecast(files, config, every.items, replicas=1, keep_latents=False).texts

    foretold = texts()
    with contextlib.closing(LongVideoEngine(config)) as engine:
        engine.text.keep(files.text_cache)
        engine.denoise("a red circle", num_frames=9)
        first = texts()
        engine.denoise("a blue star", num_frames=9)
    lying = list(files.text_cache.glob("*.safetensors"))
    assert len(lying) == (3 if guidance > 1 else 2)
    assert 0 <= sum(path.stat().st_size for path in lying) - foretold < HEADER_BYTES * len(lying)
    assert first == foretold / len(lying)
    assert texts() == 0
    assert disk_forecast(files, config, [], replicas=1, keep_latents=False).needed == 0


def test_texts_of_other_prompts_and_strange_files_change_nothing(tmp_path: Path) -> None:
    every = cases.batch()
    model = ModelConfig(path=str(save_random_wan(tmp_path / "wan")), device="cpu")
    config = dataclasses.replace(cases.config(), model=model)
    files = BatchFiles(root=tmp_path / "out")

    def forecast() -> DiskForecast:
        return disk_forecast(files, config, every.items, replicas=1, keep_latents=False)

    before = forecast()
    files.text_cache.mkdir(parents=True)
    for number in range(10):
        (files.text_cache / f"{number:064d}.safetensors").touch()
    strange = files.of(every.items[0]).sidecar.with_name("notes.json")
    strange.parent.mkdir(parents=True)
    strange.write_text("{}")
    assert dataclasses.replace(forecast(), free=before.free) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_driver_needs_no_gpu_to_foretell_what_replicas_with_one_take(tmp_path: Path) -> None:
    model = ModelConfig(path=str(save_random_wan(tmp_path / "wan")), device="cuda", dtype="auto")
    config = dataclasses.replace(cases.config(), model=model)
    on_gpu, on_cpu = (
        disk_forecast(
            BatchFiles(root=tmp_path / "out"),
            dataclasses.replace(config, model=dataclasses.replace(model, device=device)),
            cases.batch().items,
            replicas=1,
            keep_latents=False,
        ).texts
        for device in ("cuda", "cpu")
    )
    assert on_gpu * 2 == on_cpu  # bfloat16 and float32


def hours_of(kernel: str, *, gpu: str = "h200", ranks: int = 1, **parallel: object) -> tuple[float | None, str]:
    config = planned(kernel, **parallel)
    variants = [Variant.of(config, name) for name in ("freespec", "direct")]
    return gpu_hours(config, variants, cases.batch().items, gpu=gpu, ranks=ranks)


def planned(kernel: str, **parallel: object) -> RunConfig:
    return dataclasses.replace(
        cases.config(),
        model=ModelConfig(path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        attention=AttentionConfig(kernel=kernel),
        parallel=ParallelConfig(**parallel),
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_hours_of_a_kernel_of_unknown_speed_are_not_known_and_no_mistake(ranks: int) -> None:
    hours, how = hours_of("cuda_flash", ranks=ranks)
    assert hours > 0
    assert how.startswith("predicted for H200")
    hours, how = hours_of("plain", ranks=ranks)
    assert hours is None
    assert re.fullmatch(r"not known: attention_fraction of H200 has no plain, it has [\w, ]+", how)


@pytest.mark.parametrize("kernel", ["cuda_flash", "plain"])
@pytest.mark.parametrize("parallel", [{}, {"plan": "manual", "cfg": 1, "ring": 1, "ulysses": 1}])
def test_a_plan_that_does_not_fit_is_refused_whether_or_not_the_speed_is_known(
    kernel: str, parallel: dict[str, object], tmp_path: Path
) -> None:
    gpu = json.loads((FOLDER / "h200.json").read_text()) | {"memory_gib": 6.0, "reserved_gib": 2.0}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(gpu))
    with pytest.raises(UserError, match=r"^does not fit: cfg 1 x ring 1 x ulysses 1 needs .* on one H200, "):
        hours_of(kernel, gpu=str(path), **parallel)


def test_degrees_that_cannot_be_had_are_refused_at_an_unknown_speed_too() -> None:
    with pytest.raises(UserError, match=r"^2 ranks cannot be arranged with cfg 1, ring 1, ulysses 1; possible are "):
        hours_of("plain", ranks=2, cfg=1, ring=1, ulysses=1)
