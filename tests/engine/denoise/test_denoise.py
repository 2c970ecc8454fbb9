"""The denoising loop starts at any step, and the scheduler's state survives a file."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from engine.config import SamplerConfig
from engine.denoise.denoise import denoise
from engine.denoise.noise import draw_noise
from engine.denoise.snapshot import Snapshot
from engine.errors import UserError
from engine.files.latents import load_latents, save_latents
from engine.schedulers import make_scheduler, scheduler_state

SCHEDULERS = {
    "unipc": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "unipc3": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0, solver_order=3
    ),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def predict(latents, timestep):
    return torch.sin(latents * 2 + timestep / 300)


def no_noise() -> torch.Generator:
    """The generator of schedulers that draw none."""
    return torch.Generator()


def ready(name: str, num_steps: int = 7):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)
    return scheduler


def test_noise_is_the_stock_draw():
    pipe_draw = torch.randn((1, 4, 3, 2, 2), generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw_noise((1, 4, 3, 2, 2), 5), pipe_draw)
    assert not torch.equal(draw_noise((1, 4, 3, 2, 2), 6), pipe_draw)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("stop", [1, 2, 4, 6])
def test_a_resumed_run_is_bit_equal(name, stop, tmp_path):
    noise = draw_noise((1, 4, 3, 2, 2), 5)
    whole = denoise(noise, ready(name), predict, generator=no_noise())

    class StoppedError(Exception):
        pass

    scheduler, file = ready(name), Snapshot(tmp_path / "run.safetensors", {"seed": 1})

    def interrupt(done, latents):
        if done == stop:
            state = scheduler_state(scheduler, no_noise())
            file.save(done, latents, state, {})
            raise StoppedError

    with pytest.raises(StoppedError):
        denoise(noise, scheduler, predict, generator=no_noise(), after_step=interrupt)
    fresh = ready(name)
    latents, step, _ = file.load(file.path.read_bytes(), fresh, no_noise(), torch.device("cpu"))
    assert step == stop
    assert torch.equal(denoise(latents, fresh, predict, generator=no_noise(), start_step=step), whole)
    if name != "euler" and 1 < stop < 6:  # negative control: a multistep solver without its history goes elsewhere
        forgetful = ready(name)
        forgetful.set_begin_index(step)
        assert not torch.equal(denoise(latents, forgetful, predict, generator=no_noise(), start_step=step), whole)


def test_the_snapshot_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    scheduler, generator = ready("unipc"), no_noise()
    file, other = (Snapshot(path, {"seed": seed}) for seed in (1, 2))
    file.save(1, torch.zeros(1), scheduler_state(scheduler, generator), {})
    into = scheduler, generator, torch.device("cpu")
    with pytest.raises(UserError, match="belongs to another run"):
        other.load(path.read_bytes(), *into)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        file.load(path.read_bytes()[:-1], *into)


def test_latents_file(tmp_path):
    path = tmp_path / "deep" / "x.safetensors"
    latents = torch.randn(1, 2, 3, 4, 5)
    save_latents(path, latents, {"prompt": "a"})
    loaded, metadata = load_latents(path)
    assert torch.equal(loaded, latents)
    assert metadata == {"prompt": "a"}
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_latents(path)
    with pytest.raises(UserError, match="does not exist"):
        load_latents(tmp_path / "none")
    assert sorted(p.name for p in path.parent.iterdir()) == ["x.safetensors"]


def test_flow_shift():
    assert make_scheduler(ready("unipc"), SamplerConfig(flow_shift=8.0)).config.flow_shift == 8.0
    assert make_scheduler(ready("unipc"), SamplerConfig()).config.flow_shift == 3.0
    assert make_scheduler(ready("euler"), SamplerConfig(flow_shift=5.0)).config.shift == 5.0
