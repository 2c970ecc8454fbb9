"""The settings that determine the latents of a run: equal settings give equal latents, up to rounding, on any number of ranks.

Layouts that are equal up to rounding only (docs/parallel.md, "Why the result is the same") may decide differently near the threshold of a cache (`sampler.cache`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.config import AttentionConfig, MethodConfig, RunConfig, SamplerConfig
from engine.errors import UserError
from engine.files.trees import DamagedError, parse_json
from engine.text.timeline import parse_timeline

# Configuration key of each setting that a call may override; `latents_settings` holds the value of the call.
_GIVEN = {
    "seed": "sampler.seed",
    "negative_prompt": "sampler.negative_prompt",
    "num_frames": "video.num_frames",
    "height": "video.height",
    "width": "video.width",
    "fps": "video.fps",
    "dtype": "model.dtype",
    "storage": "model.storage",
    "device": "model.device",
    "noise": "sampler.noise",
}
_SHOWN = 6
# Settings that older versions lacked.
_CACHE = ("cache", "cache_threshold", "cache_interval", "cache_ratios")
_LATER = ("scheduler", "timesteps", "sigmas", "far", "guidance_scale_2", *_CACHE)


def latents_settings(
    config: RunConfig, *, checkpoint: str, dtype: str, device: str, with_rate: bool, **given: Any
) -> dict[str, Any]:
    """Return all settings that determine the latents, in JSON types.

    Left out are `model.storage` full, as before there was another, ranks and the placement of weights, since a run may continue on another number of ranks or with offload, and
    the settings of unused methods.

    Args:
        config: the run.
        checkpoint: digest of the checkpoint, in hex.
        dtype: of the transformer.
        device: kind of the device.
        with_rate: whether the frame rate decides the latents (`ModelAdapter.frame_rate_matters`).
        given: values of the call that override the configuration: prompt, negative_prompt, seed, num_frames.
    """
    tree = dataclasses.asdict(config)
    decides: dict[str, Any] = {"sampler": group_tree(config.sampler), "attention": group_tree(config.attention)}
    decides |= {"method": method_tree(config.method)}
    decides |= {key: tree["video"][key] for key in ("height", "width")}
    decides |= {"checkpoint": checkpoint, "dtype": dtype, "device": device, "noise": config.noise}
    decides |= {} if config.model.storage == "full" else {"storage": config.model.storage}
    timed = parse_timeline(given.get("prompt", ""))
    decides |= {"fps": config.video.fps} if with_rate or (timed is not None and timed.unit == "s") else {}
    return json.loads(json.dumps(decides | given))


def group_tree(group: SamplerConfig | AttentionConfig) -> dict[str, Any]:
    """A group's settings; those that older versions lacked are left out at their defaults, so that ids do not change."""
    tree, default = dataclasses.asdict(group), type(group)()
    tree |= group.cache_settings if isinstance(group, SamplerConfig) else {}
    return {key: value for key, value in tree.items() if key not in _LATER or value != getattr(default, key)}


def method_tree(method: MethodConfig) -> dict[str, Any]:
    """The method's name, its settings with defaults resolved, and what all methods share."""
    made = method.method
    shared = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    settings = dataclasses.asdict(made) if dataclasses.is_dataclass(made) and not isinstance(made, type) else {}
    # A user's own class may have settings of types that JSON lacks.
    settings = json.loads(json.dumps(settings, default=repr))
    return {name: value for name, value in shared.items() if not dataclasses.is_dataclass(value)} | {
        "settings": settings
    }


def settings_id(settings: Mapping[str, Any]) -> str:
    """SHA-256 of `latents_settings`, in hex."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Describe how two sets of settings differ, by dotted name; None if they are equal."""
    old, new = (_by_name(settings) for settings in (before, now))
    found = [f"{name} was {_short(old, name)}, now {_short(new, name)}" for name in differing(old, new)]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more if found else None


def check_run(metadata: Mapping[str, str], settings: Mapping[str, Any], *, path: Path) -> None:
    """Raise UserError, naming the differences, unless the metadata of a run's state match these settings."""
    if metadata.get("run_id") == settings_id(settings):
        return
    try:
        before = parse_json(metadata.get("settings", "{}"), str(path))
    except DamagedError:
        before = {}
    differences = describe_differences(before, settings) if before and isinstance(before, dict) else None
    raise UserError(
        f"{path} belongs to another run ({differences or 'other prompt, seed or setting'}); delete it or move it away"
    )


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of settings by dotted name, with lists for tuples, as JSON gives them back."""
    return dict(_leaves(tree, ""))


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names whose values differ, or that one of the two lacks, sorted."""
    return [name for name in sorted(before.keys() | now.keys()) if before.get(name, _UNSET) != now.get(name, _UNSET)]


_UNSET = object()


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _by_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = flat(settings)
    method = str(found.get("method.name"))
    if ":" not in method:  # a user's own class has its settings in method.settings
        found = {name.replace("method.settings.", f"method.{method}.", 1): value for name, value in found.items()}
    given = {name: found.pop(key) for key, name in _GIVEN.items() if key in found}
    return found | given


def _short(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "unset"
    text = repr(settings[name])
    if name == "checkpoint":
        return "another one" if len(text) < 12 else text[1:13]
    return text if len(text) <= 60 else f"{text[:57]}..."
