"""The worked example of docs/adding-a-method.md: its files are taken from the page, its test is run, and it makes latents."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from tests.tiny_pipelines import save_random_wan

PAGE = Path(__file__).parent.parent / "docs" / "adding-a-method.md"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both files of the page, and the working directory."""
    files = re.findall(
        r"^## [^\n]*`(\w+\.py)`.*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert [name for name, _ in files] == ["blend.py", "test_blend.py"]
    for name, text in files:
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in ("blend", "test_blend"):
        sys.modules.pop(name, None)


def test_the_example_passes_its_own_test(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(example)
    torch.manual_seed(0)
    importlib.import_module("test_blend").test_blend_is_the_mix_of_masked_attentions()


def test_the_example_runs_by_its_import_path(example: Path, tmp_path: Path) -> None:
    folder = save_random_wan(tmp_path / "wan")
    latents = {}
    for alpha in (0.0, 3.0, 1e9):
        config = RunConfig(
            model=ModelConfig(path=str(folder), device="cpu"),
            video=VideoConfig(num_frames=29, height=32, width=32),
            sampler=SamplerConfig(num_steps=4, guidance_scale=1.0, max_text_tokens=20),
            method=MethodConfig(name="blend:Blend", window_frames=3, settings={"alpha": alpha, "fused_share": 1.0}),
            output=OutputConfig(progress="off"),
        )
        made = LongVideoEngine(config)
        result = made.denoise("a red circle")
        assert [step["mode"] for step in result.steps] == ["dual"] * 4
        latents[alpha] = result.latents
        made.close()
    direct = LongVideoEngine(RunConfig(**vars(config) | {"method": MethodConfig(name="direct", window_frames=3)}))
    torch.testing.assert_close(latents[0.0], direct.denoise("a red circle").latents, rtol=0, atol=1e-4)
    direct.close()
    assert not torch.allclose(latents[0.0], latents[3.0], rtol=0, atol=1e-2)
    assert not torch.allclose(latents[1e9], latents[3.0], rtol=0, atol=1e-2)
