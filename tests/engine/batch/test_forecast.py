"""What a batch is said to take on the disk, against what lies there."""

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch

from engine.batch.files import BatchFiles
from engine.batch.forecast import DiskForecast, disk_forecast
from engine.config import ModelConfig
from engine.engine import LongVideoEngine
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
        engine.keep_texts(files.text_cache)
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
