"""Noise and the denoising loop: plain functions that draw the same noise for any device and can start at any step."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from engine.errors import UserError
from freespec.methods import Noise
from freespec.noise import relate_frames

# Tensors by name (`name` or `name.index`), and plain values for JSON.
SchedulerState = tuple[dict[str, Tensor], dict[str, Any]]

# What a diffusers scheduler holds beside its state: its configuration, and a nested solver that only SDE variants have.
_NOT_STATE = ("_internal_dict",)


def draw_noise(
    shape: tuple[int, ...], seed: int, kind: Noise = "iid", *, window_frames: int = 1, stride: int = 1
) -> Tensor:
    """Standard normal noise [1, z, F, h, w], fp32 on the CPU, from a CPU generator: the draw of the stock pipelines.

    Another kind than `iid` relates the frames after the first `window_frames` to those (freespec.noise); what it draws to
    do so comes from the same generator, after the noise.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    return relate_frames(noise, kind, window_frames=window_frames, stride=stride, generator=generator)


def denoise(
    latents: Tensor,
    scheduler: Any,
    predict: Callable[[Tensor, Tensor, int], Tensor],
    *,
    start_step: int = 0,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Denoise latents [B, z, F, h, w] (fp32) over `scheduler.timesteps`, from `start_step` on.

    Args:
        latents: noise, or the latents after `start_step` steps.
        scheduler: a diffusers scheduler with its timesteps set; for `start_step` > 0, in its state after that many steps.
        predict: `(latents, timestep, step) -> model output` of the latents' shape, guidance included.
        start_step: index of the first step that is still to do.
        after_step: called with the number of finished steps and the latents.
    """
    for step, timestep in enumerate(scheduler.timesteps):
        if step < start_step:
            continue
        latents = scheduler.step(predict(latents, timestep, step), timestep, latents, return_dict=False)[0]
        if after_step is not None:
            after_step(step + 1, latents)
    return latents


class NotFiniteError(UserError):
    """Latents that hold numbers which are none."""


def check_finite(latents: Tensor, *, where: str, remedy: str) -> None:
    """Raise NotFiniteError unless all latents are finite; all ranks have the same ones, and so raise together."""
    finite = torch.isfinite(latents)
    if not finite.all():
        bad = finite.numel() - int(finite.sum())
        raise NotFiniteError(f"{bad} of {finite.numel()} numbers of the latents are not finite {where}; {remedy}")


def make_scheduler(scheduler: Any, flow_shift: float | None) -> Any:
    """A fresh scheduler of the same class and configuration, with another timestep shift unless that is None."""
    overrides: dict[str, float] = {}
    if flow_shift is not None:
        if scheduler.config.get("use_dynamic_shifting"):
            raise UserError(
                f"sampler.flow_shift {flow_shift} would be ignored: this checkpoint's shift follows from the number of "
                "tokens; leave it unset, and choose with sampler.shift which number that is"
            )
        key = next((key for key in ("flow_shift", "shift") if key in scheduler.config), None)
        if key is None:
            raise UserError(f"sampler.flow_shift: {type(scheduler).__name__} has no shift; leave it unset")
        overrides[key] = flow_shift
    return type(scheduler).from_config(scheduler.config, **overrides)


def shifting_tokens(shift: Literal["native", "actual"], frames: int, frame_tokens: int, *, window_frames: int) -> int:
    """Tokens whose timestep shift a video of `frames` x `frame_tokens` takes, by the setting `sampler.shift`.

    `native` never takes more than those of the native length, `window_frames`: there the shift that grows with the number of
    tokens was trained, and far beyond it nearly all steps would be at almost pure noise.
    """
    return (min(frames, window_frames) if shift == "native" else frames) * frame_tokens


def scheduler_state(scheduler: Any) -> SchedulerState:
    """What a scheduler has learnt so far. Tensors are not copied: schedulers replace theirs, they do not write into them."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in vars(scheduler).items():
        if name in _NOT_STATE:
            continue
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, list):
            values[name] = [None if isinstance(item, Tensor) else item for item in value]
            tensors |= {f"{name}.{i}": item for i, item in enumerate(value) if isinstance(item, Tensor)}
        elif value is None or isinstance(value, bool | int | float | str):
            values[name] = value
        else:
            raise UserError(
                f"{type(scheduler).__name__} keeps {name} as {type(value).__name__}, which cannot be saved; "
                "use UniPCMultistepScheduler or FlowMatchEulerDiscreteScheduler"
            )
    return tensors, values


def restore_scheduler(scheduler: Any, state: SchedulerState, device: torch.device) -> None:
    """Put a state from `scheduler_state` back; the scheduler must have the same configuration and number of steps.

    Tensors that the model makes go to `device`; those that the scheduler holds now stay on the device where it has them.
    """
    tensors, values = state
    for name, value in values.items():
        setattr(scheduler, name, list(value) if isinstance(value, list) else value)
    for name, tensor in tensors.items():
        owner, _, index = name.partition(".")
        if index:
            getattr(scheduler, owner)[int(index)] = tensor.to(device)
        else:
            now = getattr(scheduler, owner)
            setattr(scheduler, owner, tensor.to(now.device if isinstance(now, Tensor) else device))
