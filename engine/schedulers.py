"""Diffusers schedulers: checks that they integrate a flow, the noise that some draw, and their state in a saved run."""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from engine.config import SamplerConfig
from engine.errors import UserError

# Tensors by name (`name` or `name.index`), and plain values for JSON.
SchedulerState = tuple[dict[str, Tensor], dict[str, Any]]

# Attributes of a diffusers scheduler that are configuration, not state.
_NOT_STATE = ("_internal_dict",)
_GENERATOR = "step generator"  # no attribute has a space in its name
ADVICE = "use the checkpoint's own, UniPCMultistepScheduler, or FlowMatchEulerDiscreteScheduler"

# Steps of a trial: enough for a solver of third order to reach it.
TRIAL_STEPS = 5
TRAINED_TIMESTEPS = 1000  # at sigma 1, of Wan2.1 and LTX-Video
TIMESTEP_ERROR = 2.0  # some schedulers round timesteps to whole numbers
SAMPLE_ERROR = 1e-3


_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# Classes that `sampler.scheduler` names, the name of their shift, and what makes them integrate a flow.
_NAMED: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "euler": (FlowMatchEulerDiscreteScheduler, "shift", {}),
    "unipc": (UniPCMultistepScheduler, "flow_shift", _FLOW),
    "lcm": (FlowMatchLCMScheduler, "shift", {}),
}
# What changes noise levels that are given one by one.
_UNCHANGED = {
    "shift": 1.0,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_LEVEL_ERROR = 1e-5  # UniPC begins 1e-6 below pure noise


def make_scheduler(scheduler: Any, sampler: SamplerConfig) -> Any:
    """Make a new scheduler, of the checkpoint's configuration and class or of the class and shift that the sampler asks for."""
    config, flow_shift = scheduler.config, sampler.flow_shift
    kind = type(scheduler)
    settings: dict[str, Any] = {}
    if sampler.scheduler != "checkpoint":
        kind, key, settings = _NAMED[sampler.scheduler]
        shift = fixed_shift(scheduler)
        settings = settings | ({} if shift is None else {key: shift})
    if flow_shift is not None:
        if config.get("use_dynamic_shifting"):
            raise UserError(
                f"sampler.flow_shift {flow_shift} would be ignored: this checkpoint's shift follows from the number of "
                "tokens; leave it unset, and select that number with sampler.shift"
            )
        found = next((key for key in ("flow_shift", "shift") if key in _arguments(kind)), None)
        if found is None:
            raise UserError(f"sampler.flow_shift: {kind.__name__} has no shift; leave it unset")
        settings = settings | {found: flow_shift}
    if sampler.levels is not None:
        settings = settings | {key: value for key, value in _UNCHANGED.items() if key in _arguments(kind)}
    return kind.from_config(config, **settings)


def _arguments(kind: Any) -> Collection[str]:
    return inspect.signature(kind.__init__).parameters.keys()


def check_levels(sampler: SamplerConfig, config: Mapping[str, Any]) -> None:
    """Raise UserError for a scheduler that does not take noise levels one by one, if the sampler gives them.

    `config` is the configuration of the checkpoint's scheduler.
    """
    if sampler.levels is None:
        return
    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None) if sampler.scheduler == "checkpoint" else _NAMED[sampler.scheduler][0]
    if kind is not None and "sigmas" not in inspect.signature(kind.set_timesteps).parameters:
        raise _no_levels(sampler, name)


def _no_levels(sampler: SamplerConfig, name: str) -> UserError:
    setting = "sigmas" if sampler.timesteps is None else "timesteps"
    return UserError(
        f"sampler.{setting}: the checkpoint's scheduler, {name}, does not take the {sampler.steps} steps one by one; choose "
        f"sampler.scheduler {', '.join(_NAMED)}"
    )


def _set_levels(scheduler: Any, sampler: SamplerConfig, device: torch.device) -> dict[str, Any]:
    """Set noise levels that are given one by one, and the timesteps of them as they are: UniPC would round them down."""
    name = type(scheduler).__name__
    levels = torch.tensor(sampler.levels, dtype=torch.float64)
    if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise _no_levels(sampler, name)
    scheduler.set_timesteps(sigmas=np.array(sampler.levels), device=device)
    found = scheduler.sigmas.double().cpu()
    if found.shape != (len(levels) + 1,) or float((found[:-1] - levels).abs().max()) > _LEVEL_ERROR:
        raise _no_levels(sampler, name)
    timesteps = sampler.timesteps or tuple(TRAINED_TIMESTEPS * level for level in sampler.levels or ())
    scheduler.timesteps = torch.tensor(timesteps, dtype=torch.float32, device=device)
    return {"shift": "given", "value": None}


def fixed_shift(scheduler: Any) -> float | None:
    """The timestep shift of a scheduler whose shift does not follow from the number of tokens."""
    return scheduler.config.get("flow_shift", scheduler.config.get("shift"))


def shifting_tokens(shift: Literal["native", "actual"], frames: int, frame_tokens: int, *, window_frames: int) -> int:
    """The token count from which the timestep shift of a video of `frames` x `frame_tokens` is computed, by `sampler.shift`.

    `native` takes at most the native length, `window_frames`, for which the shift was trained; far beyond it nearly all steps
    would be at almost pure noise.
    """
    return (min(frames, window_frames) if shift == "native" else frames) * frame_tokens


def set_timesteps(
    adapter: Any,
    scheduler: Any,
    sampler: SamplerConfig,
    latent: tuple[int, int, int],
    *,
    window_frames: int,
    device: torch.device,
) -> dict[str, Any]:
    """Set the timesteps for latents of (frames, rows, columns), by the adapter; returns the record's entry about their shift."""
    frames, rows, columns = latent
    tokens = shifting_tokens(sampler.shift, frames, rows * columns, window_frames=window_frames)
    if sampler.levels is not None:
        schedule = _set_levels(scheduler, sampler, device)
    else:
        schedule = adapter.set_timesteps(
            scheduler, sampler.steps, num_tokens=tokens, shift=sampler.shift, device=device
        )
    scheduler.set_begin_index(0)
    return schedule


def step_noise(scheduler: Any, generator: torch.Generator) -> dict[str, torch.Generator]:
    """Arguments of `scheduler.step` that let `generator` draw its noise; none for a scheduler that draws none."""
    takes_one = "generator" in inspect.signature(type(scheduler).step).parameters
    return {"generator": generator} if takes_one else {}


def check_flow(scheduler: Any, set_timesteps: Callable[[Any, int], Any], *, model: str) -> bool:
    """Return whether the scheduler draws noise in its steps; UserError unless it integrates a flow as `model` predicts it.

    Runs a copy on x_sigma = (1 - sigma) x_0 + sigma n, whose velocity (x - x_0) / sigma every such scheduler integrates to
    the x_0 of its last sigma, whatever noise it draws, at timesteps 1000 sigma.

    Args:
        scheduler: a diffusers scheduler; neither its state nor torch's generators are changed.
        set_timesteps: `(copy, num_steps)` as the model's pipeline sets them.
        model: what messages call the model.

    Raises:
        UserError: for a scheduler that the pipeline cannot use, or that expects another kind of prediction.
        Exception: any error of the scheduler about its configuration.
    """
    kind, config = type(scheduler).__name__, scheduler.config
    if "use_flow_sigmas" in inspect.signature(type(scheduler).__init__).parameters:
        for name, wanted in (("prediction_type", "flow_prediction"), ("use_flow_sigmas", True)):
            if config.get(name) != wanted:
                raise UserError(
                    f"{model} predicts a flow, and the {kind} has {name} {config.get(name)}, not {wanted}; {ADVICE}"
                )
    unknown = UserError(f"{model} predicts a flow, which the scheduler {kind} does not integrate; {ADVICE}")
    if not hasattr(scheduler, "set_begin_index"):
        raise unknown
    generator = functools.partial(torch.Generator("cpu").manual_seed, 0)
    with warnings.catch_warnings(), torch.no_grad(), _disable_current_modes():  # real numbers, also among fake tensors
        warnings.simplefilter("ignore")  # warnings are shown in the run itself
        one, other = (_trial(scheduler, set_timesteps, seed=seed) for seed in (1, 2))
        if one is None or other is None:
            raise unknown
        if torch.equal(one, other):
            return False
        first_trial, second_trial = (
            _trial(scheduler, set_timesteps, seed=seed, generator=generator()) for seed in (1, 2)
        )
    if first_trial is None or second_trial is None or not torch.equal(first_trial, second_trial):
        raise UserError(f"the {kind} draws noise without a generator, so that no seed would repeat a video; {ADVICE}")
    return True


def _trial(
    scheduler: Any,
    set_timesteps: Callable[[Any, int], Any],
    *,
    seed: int,
    generator: torch.Generator | None = None,
) -> Tensor | None:
    """Samples [steps, 1, 1, 4, 8, 8] after each step of a copy, with torch's generator at `seed`; None if they leave the flow."""
    tried = _copy_on_cpu(scheduler)
    set_timesteps(tried, TRIAL_STEPS)
    tried.set_begin_index(0)
    draw = torch.Generator("cpu").manual_seed(0)
    x0, sample = torch.randn(2, 1, 1, 4, 8, 8, generator=draw, device="cpu")
    noise = {} if generator is None else step_noise(tried, generator)
    sigmas = getattr(tried, "sigmas", None)
    if sigmas is None or len(sigmas) <= len(tried.timesteps):
        return None
    samples = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's generator only; torch.manual_seed would seed GPUs as well
        for sigma, timestep in zip(sigmas.tolist(), tried.timesteps, strict=False):
            if abs(float(timestep) - TRAINED_TIMESTEPS * sigma) > TIMESTEP_ERROR:
                return None
            velocity = (sample - x0) / sigma
            sample = tried.step(velocity, timestep, sample, return_dict=False, **noise)[0]
            samples.append(sample)
    last = float(sigmas[-1])
    left = (sample - (1 - last) * x0).square().mean().sqrt()
    # Compared with sigma_last n, with a margin for so few numbers; NaN fails.
    return torch.stack(samples) if float(left) <= 1.5 * last + SAMPLE_ERROR else None


def _copy_on_cpu(scheduler: Any) -> Any:
    """A copy with all tensors on the CPU; from_config would lose changes made since."""
    held = [x for value in vars(scheduler).values() for x in (value if isinstance(value, list | tuple) else [value])]
    return copy.deepcopy(scheduler, {id(x): x.to("cpu", copy=True) for x in held if isinstance(x, Tensor)})


def scheduler_state(scheduler: Any, generator: torch.Generator) -> SchedulerState:
    """The state of a scheduler and of the generator of its noise.

    Tensors are not copied, since schedulers replace theirs instead of writing into them.
    """
    tensors: dict[str, Tensor] = {_GENERATOR: generator.get_state()}
    values: dict[str, Any] = {}
    for name, value in vars(scheduler).items():
        if name in _NOT_STATE or callable(value):  # functions follow from the configuration
            continue
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, list | tuple):
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


def restore_scheduler(scheduler: Any, state: SchedulerState, device: torch.device, generator: torch.Generator) -> None:
    """Put a state from `scheduler_state` back; the scheduler must have the same configuration and number of steps.

    Model outputs go to `device`; tensors that the scheduler already holds stay on their device.
    """
    tensors, values = state
    if _GENERATOR in tensors:  # absent from states that older versions saved
        generator.set_state(tensors[_GENERATOR].cpu())
    for name, value in values.items():
        setattr(scheduler, name, list(value) if isinstance(value, list) else value)
    for name, tensor in tensors.items():
        if name == _GENERATOR:
            continue
        owner, _, index = name.partition(".")
        if index:
            getattr(scheduler, owner)[int(index)] = tensor.to(device)
        else:
            now = getattr(scheduler, owner, None)  # some schedulers create an attribute in their first step
            setattr(scheduler, owner, tensor.to(now.device if isinstance(now, Tensor) else device))
