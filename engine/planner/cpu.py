"""Predict how long a video takes on this CPU before anything is loaded: operations over a measured rate of matrix products."""

import time

import torch

from engine.config import RunConfig
from engine.devices import pick_device, pick_dtype
from engine.given.frames import GivenFrames
from engine.planner.flops import call_operations
from engine.planner.gpu import read_gpu
from engine.planner.model import read_model
from engine.planner.plan import Case
from engine.shown import describe_seconds

LONG_SECONDS = 600.0
# Share of the rate of a large matrix product that a run reaches. On one core of an AMD EPYC with 100 GFLOP/s, `direct` denoises 129 frames
# of the embedded Wan at 47 GFLOP/s; attention kernels and small products are slower.
FRACTION = 0.5
_SIDE = 512
_TRIES, _SECONDS = 3, 0.05


def describe_expected(
    config: RunConfig, *, num_prompts: int, ranks: int = 1, given: GivenFrames | None = None
) -> str | None:
    """Describe the time that a long job takes on this CPU; None on a GPU, and below `LONG_SECONDS`.

    `ranks` share the CPU, each with as many threads as this process has.
    """
    name = config.model.device
    device = pick_device(name) if name == "auto" else torch.device(name)
    if device.type != "cpu":
        return None
    rate = ranks * FRACTION * product_rate(pick_dtype(config.model.dtype, device))
    seconds = denoising_operations(config, given) / rate
    if seconds * num_prompts < LONG_SECONDS:
        return None
    video = config.video
    prompts = "" if num_prompts == 1 else f", and there are {num_prompts} prompts"
    return (
        f"on this CPU a video of {video.num_frames} frames of {video.height} x {video.width} takes about "
        f"{describe_long(seconds)} to denoise with {config.method.name} in {config.sampler.num_steps} steps{prompts}; predicted from its "
        f"operations and {rate / 1e9:.3g} GFLOP/s, half of what matrix products reach here"
    )


def denoising_operations(config: RunConfig, given: GivenFrames | None = None) -> int:
    """Floating-point operations of all steps of a video, on one rank, but for those that the schedule of a step cache skips."""
    spec = read_model(config.model)
    case = Case.of(config, spec, gpu=read_gpu("h200"), world_size=1, given=given)  # no count depends on the GPU
    layout = case.layout((1, 1, 1))
    operations = 0
    for mode, count in case.count_steps(computed=True)[config.method.name].items():
        kinds = call_operations(layout, mode)
        operations += count * layout.calls * sum(kinds.values())
    return operations


def product_rate(dtype: torch.dtype) -> float:
    """Operations per second of a matrix product on the threads of this process: the best of a few, within milliseconds."""
    a = torch.ones(_SIDE, _SIDE, dtype=dtype)
    times: list[float] = []
    while len(times) < _TRIES or sum(times) < _SECONDS:
        started = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - started)
    return 2 * _SIDE**3 / min(times)


def describe_long(seconds: float) -> str:
    """`35 days` from two days on, else as `describe_seconds`."""
    return f"{seconds / 86400:.0f} days" if seconds > 2 * 86400 else describe_seconds(seconds)
