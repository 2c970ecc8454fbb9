"""What a long job on a CPU takes, said before it starts."""

import dataclasses

import pytest
import torch

from engine import read_preset
from engine.config import RunConfig
from engine.planner import cpu
from engine.planner.cpu import LONG_SECONDS, denoising_operations, describe_expected, describe_long, product_rate


def tiny(**settings: object) -> RunConfig:
    """The embedded Wan on a CPU, `__` for dots."""
    named = {key.replace("__", "."): value for key, value in settings.items()}
    return read_preset("tiny-wan", settings={"model.device": "cpu"} | named)


def test_operations_are_those_of_the_steps() -> None:
    """Twice the steps are twice the operations, half the passes half of them, and attention grows with the square."""
    direct = {"method__name": "direct", "video__num_frames": 33}
    one = denoising_operations(tiny(**direct, sampler__num_steps=1))
    assert denoising_operations(tiny(**direct, sampler__num_steps=7)) == 7 * one
    assert denoising_operations(tiny(**direct, sampler__num_steps=1, sampler__guidance_scale=1.0)) == one // 2
    assert denoising_operations(tiny(method__name="direct", sampler__num_steps=1)) > 4 * one  # four times the frames


def test_a_long_job_says_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(sampler__num_steps=20)
    rate = denoising_operations(config) / LONG_SECONDS / cpu.FRACTION
    monkeypatch.setattr(cpu, "product_rate", lambda dtype: rate)
    said = describe_expected(config, num_prompts=1)
    assert said is not None
    assert said.startswith(
        "on this CPU a video of 129 frames of 64 x 64 takes about 10 min 0 s to denoise with freespec in 20"
    )
    assert "; predicted from its operations and " in said
    assert describe_expected(config, num_prompts=1, ranks=2) is None
    assert ", and there are 2 prompts;" in (describe_expected(config, num_prompts=2, ranks=2) or "")
    on_gpu = dataclasses.replace(config, model=dataclasses.replace(config.model, device="cuda"))
    assert describe_expected(on_gpu, num_prompts=100) is None


def test_the_rate_is_measured() -> None:
    assert product_rate(torch.float32) > 0


@pytest.mark.parametrize(("seconds", "said"), [(3600, "1 h 0 min"), (2 * 86400, "48 h 0 min"), (35 * 86400, "35 days")])
def test_days(seconds: float, said: str) -> None:
    assert describe_long(seconds) == said
