"""Every collective of a run reaches the monitor of the ranks, with its step and layer, or what it is for."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

from engine.config import DecodeConfig, MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.ranks.layouts import Ranks
from parallel.monitor import Monitor
from tests.engine.golden import PROMPT, mesh_of
from tests.ranks import run_ranks
from tests.tiny_pipelines import save_random_wan


def never() -> Callable[[], bool]:
    """A call that does not end."""
    return lambda: False


def followed(_rank: int, folder: str) -> set[tuple[str, str]]:
    """(operation, label) of each collective of a start, two steps and a decode in tiles."""
    config = RunConfig(
        model=ModelConfig(path=folder, device="cpu"),
        video=VideoConfig(num_frames=17, height=32, width=48),
        decode=DecodeConfig(mode="tiled", tile_height=32, tile_width=32, stride_height=16, stride_width=16),
        sampler=SamplerConfig(num_steps=2, guidance_scale=1.0, max_text_tokens=20),
        method=MethodConfig(name="direct", window_frames=3),
        output=OutputConfig(progress="off"),
    )
    monitor = Monitor(rank=0, timeout=timedelta(seconds=60), mark=never, report=print)
    mesh = mesh_of((1, 1, 2))
    mesh = replace(mesh, **{axis: replace(getattr(mesh, axis), monitor=monitor) for axis in ("ulysses", "world")})
    made = LongVideoEngine(config, Ranks(mesh=mesh))
    assert all(len(part) for part in made.decode(made.denoise(PROMPT).latents))
    made.close()
    return {(call.operation, call.label) for call in monitor._calls}


def test_every_step_and_layer_is_named(tmp_path):
    [by_rank] = run_ranks(2, followed, [str(save_random_wan(tmp_path / "wan"))], tmp_path)
    for calls in by_rank:
        assert calls >= {("all-to-all", f"step {step} layer {layer}") for step in (0, 1) for layer in (0, 1)}
        assert ("all-gather (gather)", "step 1 layer 1") in calls
        assert calls >= {
            ("all-gather (agreement)", "agreement at start"),
            ("broadcast", "snapshot"),
            *(("collecting", f"decode, latent frame {frame}") for frame in (0, 1)),
        }
