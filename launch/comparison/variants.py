"""What is compared: methods, and methods with a preset of their own, as full configurations of one run."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser

from engine.config import RunConfig
from engine.errors import UserError
from engine.files.trees import read_yaml
from engine.presets import find_config
from launch.arguments.many_videos import refuse_method_name
from launch.cli import DEFAULT_CONFIG, parse_run

MAY_DIFFER = ("method.", "sampler.noise", "attention.riflex")
"""Settings that a preset of a variant may change: the model stays loaded, and all else must be equal to be compared."""

_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One column of a comparison: its label, which names its folder, and its configuration."""

    label: str
    config: RunConfig

    @property
    def settings(self) -> dict[str, Any]:
        """What tells it from other variants, by dotted name."""
        tree = flatten(dataclasses.asdict(self.config)) | {"sampler.noise_stride": self.config.noise_stride}
        return {key: value for key, value in tree.items() if key.startswith(MAY_DIFFER)}

    @property
    def acts_by(self) -> tuple[Any, ...]:
        """What decides its videos beside what all share: two variants with equal ones make the same videos."""
        config = self.config
        kind, stride = config.noise
        noise = (kind, stride if kind == "freenoise" else None)
        return config.method.method, config.method.window_frames, noise, config.attention.riflex


def read_variants(
    text: str, argv: Sequence[str], *, name: str, add_arguments: Callable[[ArgumentParser], None]
) -> list[Variant]:
    """The variants of `--methods`: a comma-separated list of METHOD, METHOD:PRESET.yaml or LABEL=METHOD:PRESET.yaml.

    `argv` is the whole command, so that its own settings hold for every variant and override a preset. Raises UserError
    for an unknown method, a preset that changes more than MAY_DIFFER, and two variants with one label or the same
    settings of what their methods read.
    """
    refuse_method_name(argv)
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise UserError("--methods is empty; name methods, such as --methods direct,sliding_window,freespec")

    def parse(words: Sequence[str]) -> RunConfig:
        return parse_run(words, name=name, description="", add_arguments=add_arguments)[1]

    base = parse(argv)
    variants = [_read(item, argv, base, parse) for item in items]
    for index, variant in enumerate(variants):
        for other in variants[:index]:
            if other.label.lower() == variant.label.lower():
                raise UserError(
                    f"two variants are called {variant.label}; give one a name with --methods NAME={items[index]}"
                )
            if other.acts_by == variant.acts_by:
                raise UserError(
                    f"{other.label} and {variant.label} have the same settings, as far as their method reads them; leave one out"
                )
    return variants


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as dotted names."""
    return dict(_leaves(tree, prefix))


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(item: str, argv: Sequence[str], base: RunConfig, parse: Callable[[Sequence[str]], RunConfig]) -> Variant:
    label, equals, rest = item.rpartition("=")
    method, preset = _split(rest)
    if not equals:
        stem = preset.rpartition("/")[2].rpartition(".")[0] if preset else ""
        # Of a class by import path its last name; a preset's name says which of several variants of a method this is.
        label = "-".join(part for part in (method.rpartition(":")[2].rpartition(".")[2] or method, stem) if part)
    if not _LABEL.fullmatch(label):
        raise UserError(
            f"{label!r} cannot name a folder; use letters, digits and _ . + -, such as --methods NAME={rest}"
        )
    words = list(argv)
    if preset:
        _check_name(preset, method)
        # A preset of a variant comes after those of the run, and the run has one even if it names none.
        given = any(word.split("=")[0] == "--config" for word in words)
        words = [*([] if given else [f"--config={DEFAULT_CONFIG}"]), *words, f"--config={preset}"]
    config = parse([*words, f"--method.name={method}"])
    _check_difference(label, preset, base, config)
    return Variant(label=label, config=config)


def _split(text: str) -> tuple[str, str]:
    """(method, preset or "") of METHOD or METHOD:PRESET.yaml; a method may be package.module:Class."""
    method, colon, preset = text.rpartition(":")
    if colon and preset.endswith((".yaml", ".yml")):
        return method, preset
    if text.endswith((".yaml", ".yml")):
        raise UserError(f"{text!r} names a preset without a method; write METHOD:{text}")
    return text, ""


def _check_name(preset: str, method: str) -> None:
    """A preset may name its method, but then it must be the one it is used for."""
    group = read_yaml(find_config(preset)).get("method")
    told = group.get("name") if isinstance(group, dict) else None
    if told not in (None, method):
        raise UserError(f"{preset} is a preset of {told}, not of {method}; write {told}:{preset}")


def _check_difference(label: str, preset: str, base: RunConfig, config: RunConfig) -> None:
    before, after = flatten(dataclasses.asdict(base)), flatten(dataclasses.asdict(config))
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    foreign = sorted(key for key in changed if not key.startswith(MAY_DIFFER))
    if foreign:
        raise UserError(
            f"{preset} of {label} changes {', '.join(foreign)}, which all variants must share; a preset of a variant "
            "may set method.*, sampler.noise, sampler.noise_stride and attention.riflex.*"
        )
