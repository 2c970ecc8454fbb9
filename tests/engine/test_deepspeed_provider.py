"""A whole video with DeepSpeed's all-to-all is the one with torch's, bit for bit."""

import importlib.util

import pytest
import torch
from torch import Tensor

from engine.config import (
    MethodConfig,
    ModelConfig,
    OutputConfig,
    ParallelConfig,
    RunConfig,
    SamplerConfig,
    VideoConfig,
)
from engine.engine import LongVideoEngine
from engine.planner.arrange import arrange_ranks, join_ranks
from parallel.deepspeed import DeepSpeedExchange
from tests.ranks import run_ranks
from tests.tiny_pipelines import save_random_wan

CPU = torch.device("cpu")


def latents_of(_rank: int, case: tuple[str, str, int]) -> Tensor:
    """Latents of two ranks that the provider exchanges heads for, from the configuration alone, as a command has it."""
    folder, provider, seed = case
    config = RunConfig(
        model=ModelConfig(path=folder, device="cpu"),
        video=VideoConfig(num_frames=17, height=32, width=48),
        sampler=SamplerConfig(num_steps=2, max_text_tokens=20, seed=seed),
        method=MethodConfig(name="freespec", window_frames=3),
        parallel=ParallelConfig(provider=provider, cfg=1, ulysses=2, local_route="all_to_all"),
        output=OutputConfig(progress="off"),
    )
    ranks = join_ranks(config, arrange_ranks(config, 2, CPU), CPU)
    assert isinstance(ranks.exchange, DeepSpeedExchange) == (provider == "deepspeed")
    made = LongVideoEngine(config, ranks)
    latents = made.denoise("a red circle").latents
    assert made.facts.parallel["provider"] == provider
    made.close()
    return latents


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the optional package deepspeed is not installed"
)
def test_latents_are_those_of_torch_s_provider(tmp_path):
    folder = str(save_random_wan(tmp_path / "wan"))
    cases = [(folder, "torch", 0), (folder, "deepspeed", 0), (folder, "deepspeed", 1)]
    ours, theirs, other = run_ranks(2, latents_of, cases, tmp_path)
    for rank in range(2):
        assert torch.equal(theirs[rank], ours[rank])
        assert not torch.equal(other[rank], ours[rank])  # negative control: the comparison sees another video
