"""The settings that a request may change beside OpenAI's fields: a short list of numbers, and the negative prompt."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from engine.config import DEFAULT_STEPS, RunConfig
from launch.serving.requests import MOST_TEXT, RefusedError, read_number

STEPS, GUIDANCE, NEGATIVE = "sampler.num_steps", "sampler.guidance_scale", "sampler.negative_prompt"
MOST_GUIDANCE = 100.0


def names_of(config: RunConfig) -> tuple[str, ...]:
    """The settings that a request may change for this configuration.

    None of them affects memory, layout, files or code. Guidance and negative prompt are excluded without guidance, since the number
    of passes is fixed when the ranks are arranged.
    """
    guided = (GUIDANCE, NEGATIVE) if config.sampler.guidance_scale > 1 else ()
    return (STEPS, *guided, *(f"method.{config.method.name}.{field}" for field in _weights(config)))


def _weights(config: RunConfig) -> tuple[str, ...]:
    """The real-valued fields of the method's settings: weights and shares; strides and windows are whole numbers."""
    group = getattr(config.method, config.method.name, None)
    if not dataclasses.is_dataclass(group):
        return ()
    hints = typing.get_type_hints(type(group))
    return tuple(each.name for each in dataclasses.fields(group) if hints[each.name] is float)


def with_extra(config: RunConfig, extra: Mapping[str, Any]) -> RunConfig:
    """The configuration with a request's settings, JSON values or texts of a form; RefusedError for an unknown or wrong one."""
    names = names_of(config)
    unknown = sorted(extra.keys() - set(names))
    if unknown:
        raise RefusedError(f"unknown setting {unknown[0]!r:.60} of extra; known are {', '.join(names)}", param="extra")
    try:
        return _changed(config, extra)
    except RefusedError:
        raise
    except ValueError as error:  # the checks of the configuration itself
        raise RefusedError(f"extra: {error}", param="extra") from error


def _changed(config: RunConfig, extra: Mapping[str, Any]) -> RunConfig:
    sampler, method, weights = config.sampler, config.method, {}
    for name, value in extra.items():
        if name == NEGATIVE:
            sampler = dataclasses.replace(sampler, negative_prompt=_text(value))
        elif name == STEPS:
            sampler = dataclasses.replace(sampler, num_steps=_steps(value, most=max(DEFAULT_STEPS, sampler.steps)))
        elif name == GUIDANCE:
            sampler = dataclasses.replace(sampler, guidance_scale=_guidance(value))
        else:
            weights[name.rpartition(".")[2]] = _number(value, name)
    if weights:
        group = dataclasses.replace(getattr(method, method.name), **weights)
        method = dataclasses.replace(method, **{method.name: group})
    return dataclasses.replace(config, sampler=sampler, method=method)


def _number(value: Any, name: str) -> float:
    number = float(read_number(value, name, "0.5"))
    if not math.isfinite(number):
        raise RefusedError(f"{name} must be a finite number, got {value!r:.60}", param=name)
    return number


def _guidance(value: Any) -> float:
    scale = _number(value, GUIDANCE)
    if not 1 < scale <= MOST_GUIDANCE:
        raise RefusedError(
            f"{GUIDANCE} must be more than 1, as this service runs two passes, and at most {MOST_GUIDANCE:g}, got {scale:g}",
            param=GUIDANCE,
        )
    return scale


def _steps(value: Any, *, most: int) -> int:
    text = read_number(value, STEPS, "20")
    if not text.isdigit() or not 1 <= int(text) <= most:
        raise RefusedError(f"{STEPS} must be a whole number in [1, {most}], got {value!r:.60}", param=STEPS)
    return int(text)


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MOST_TEXT:
        raise RefusedError(f"{NEGATIVE} must be a text of at most {MOST_TEXT} characters", param=NEGATIVE)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RefusedError(f"{NEGATIVE} is not valid Unicode", param=NEGATIVE) from error
    return value
