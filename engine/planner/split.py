"""Warn before a run if all its steps are of one kind, as with few steps near pure noise, or if a step cache skips none of them."""

from collections.abc import Iterator, Mapping, Sequence

from engine.config import MethodConfig, RunConfig
from engine.planner.cached import SCHEDULED
from engine.planner.gpu import read_gpu
from engine.planner.model import read_model
from engine.planner.plan import Case
from freespec.methods import Method, Mode

_EVERY_TIMESTEP = tuple(float(t) for t in range(1000, 0, -1))
_DOES: dict[Mode, str] = {
    "dual": "fuses",
    "views_global": "fuses",
    "local": "is local",
    "views": "is local",
    "frames": "is local",
    "tiers": "is in tiers",
    "global": "is global",
}


def describe_splits(config: RunConfig, methods: Mapping[str, MethodConfig] | None = None) -> Iterator[str]:
    """One sentence for each method whose steps are all alike, although the method treats noisy and late steps differently.

    Args:
        config: the run.
        methods: the methods by label, if there are several.
    """
    spec, video = read_model(config.model), config.video
    latent = spec.video.latent_shape(video.num_frames, video.height, video.width)[2:]
    for label, method in (methods or {config.method.name: config.method}).items():
        if spec.grid(video.num_frames, video.height, video.width)[0] <= method.window_frames:
            continue  # at native length no step fuses
        both = _modes(method.method, _EVERY_TIMESTEP)
        if len(both) == 1:
            continue  # it has no split, or has all steps on one side by request
        timesteps = spec.timesteps(config.sampler, latent, window_frames=method.window_frames)
        modes = _modes(method.method, timesteps)
        if len(modes) == 1:
            others = " or ".join(_DOES[mode] for mode in both if mode not in modes)
            yield f"with {label} {_count(timesteps, _DOES[modes[0]])}, and none {others}{_advice(method, timesteps)}"


def describe_unused_cache(config: RunConfig, methods: Mapping[str, MethodConfig] | None = None) -> list[str]:
    """One sentence for the methods with which the schedule of the step cache skips no step; none for a cache that decides by values.

    Args:
        config: the run.
        methods: the methods by label, if there are several.
    """
    sampler = config.sampler
    if sampler.cache not in SCHEDULED:
        return []
    spec, unused = read_model(config.model), []
    for label, method in (methods or {config.method.name: config.method}).items():
        case = Case(
            spec=spec, video=config.video, sampler=sampler, method=method, gpu=read_gpu("h200"), world_size=1
        )  # no count depends on the GPU
        if case.count_steps()[method.name] == case.count_steps(computed=True)[method.name]:
            unused.append(label)
    if not unused:
        return []
    steps = "the only step" if sampler.steps == 1 else f"each of the {sampler.steps} steps"
    return [
        f"sampler.cache {sampler.cache} reuses nothing with {' and '.join(unused)}: its schedule computes {steps}, and it is emptied where "
        "the kind of step changes; use more steps, or sampler.cache none"
    ]


def _modes(method: Method, timesteps: Sequence[float]) -> list[Mode]:
    """The modes of a run, each once."""
    return list(dict.fromkeys(step.mode for step in method.plan(timesteps)))


def _count(timesteps: Sequence[float], does: str) -> str:
    if len(timesteps) == 1:
        return f"the only step (timestep {timesteps[0]:g}) {does}"
    return f"each of the {len(timesteps)} steps (timesteps {timesteps[0]:g} to {timesteps[-1]:g}) {does}"


def _advice(method: MethodConfig, timesteps: Sequence[float]) -> str:
    if getattr(method.method, "domain", None) != "timestep" or len(timesteps) == 1:
        return ""
    group = "settings" if ":" in method.name else method.name
    return f"; method.{group}.domain step splits by the number of steps"
