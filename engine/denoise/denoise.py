"""Steps of the scheduler over latents, from any step on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.given.known import Known
from engine.schedulers import step_noise


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """The latents of one video, and how they were made.

    Attributes:
        latents: [1, z, F, h, w] fp32 on the CPU, normalised as the transformer sees them.
        steps: one dict per step, also those of an earlier, interrupted run: step, timestep, mode (as in freespec.methods.StepPlan),
            seconds, cpu_seconds (of this process), of two transformers the one that denoised, `expert`, and with `sampler.cache`
            whether the step was `cached`.
        schedule: the timestep shift: `shift` (fixed, native or actual) and its value, and how they came about.
        seconds: time of the stages `text` and `denoise`.
        resumed_at: steps that an earlier, interrupted run had finished; 0 for a run from noise.
        settings: what decides the latents, see `engine.identity`.
        given: the files of given frames, see `engine.given.frames.GivenFrames.record`; None without any.
        timeline: the events of a prompt that is a timeline, see `engine.text.timeline.Direction.described`; None for a plain prompt.
    """

    latents: Tensor
    steps: list[dict[str, Any]]
    schedule: dict[str, Any]
    seconds: dict[str, float]
    resumed_at: int
    settings: dict[str, Any]
    timeline: list[dict[str, Any]] | None
    given: dict[str, Any] | None


def denoise(
    latents: Tensor,
    scheduler: Any,
    predict: Callable[[Tensor, Tensor], Tensor],
    *,
    generator: torch.Generator,
    start_step: int = 0,
    known: Known | None = None,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Denoise latents [B, z, F, h, w] (fp32) over `scheduler.timesteps`, from `start_step` on.

    Args:
        latents: noise, or the latents after `start_step` steps.
        scheduler: a diffusers scheduler with its timesteps set; for `start_step` > 0, in its state after that many steps.
        predict: `(latents, timestep) -> model output` of the latents' shape, guidance included.
        generator: draws the noise that a scheduler adds in its steps, on the CPU, so that all ranks draw the same.
        start_step: index of the first step to do.
        known: frames that are inserted before each step, at its noise level, and after the last.
        after_step: called with the number of finished steps and the latents.
    """
    noise = step_noise(scheduler, generator)
    for step, timestep in enumerate(scheduler.timesteps):
        if step < start_step:
            continue
        if known is not None:
            latents = known.put(latents, float(scheduler.sigmas[step]))
        prediction = predict(latents, timestep)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False, **noise)[0]
        if after_step is not None:
            after_step(step + 1, latents)
    return latents if known is None else known.put(latents, 0.0)
