"""Ratios for `mag` are those of the residuals, pass by pass; the table compares each cache with none of the same prompt."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.caches import ResidualRatios
from benchmarks.tables import caches


class Grow(nn.Module):
    """Adds its factor times a step's direction, which it is told."""

    def forward(self, x: Tensor, size: float) -> Tensor:
        return x + size * torch.ones_like(x)


def test_ratios_are_of_the_same_pass_one_step_before() -> None:
    """Two blocks; the passes in turn add 1 and 10, then 2 and 30, then 1 and 15 per block: ratios 2 and 3, then 0.5 and 0.5."""
    blocks = [Grow(), Grow()]
    ratios = ResidualRatios(blocks, passes=2)
    for size in (1.0, 10.0, 2.0, 30.0, 1.0, 15.0):
        x = torch.randn(1, 5, 4)
        for block in blocks:
            x = block(x, size)
    assert ratios.by_step() == pytest.approx([1.0, 2.5, 0.5], rel=1e-4)
    assert not blocks[0]._forward_pre_hooks
    assert not blocks[1]._forward_hooks


def test_a_row_is_the_mean_over_prompts() -> None:
    def row(cache: str, prompt: str, quality: float, cpu_s: float) -> dict:
        shown = {"method": "direct", "cache": cache, "prompt": prompt, "quality": quality}
        return shown | {"distance": 0.5, "cpu_s": cpu_s, "cached": 4}

    results = [row("none", "a", 0.9, 10), row("mag", "a", 0.8, 5), row("none", "b", 0.7, 20), row("mag", "b", 0.8, 12)]
    text = caches({"results": results, "settings": {"video.num_frames": 65, "sampler.num_steps": 20}})
    assert "| direct | mag | 0.800 | +0.000 (-0.100 to +0.100) | 0.500 | 0.55 | 4.0 |" in text
    assert "2 held-out prompts, 65 frames, 20 steps" in text
