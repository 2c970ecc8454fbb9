"""Parse `--methods` into variants of one run: methods, each with an optional preset."""

import dataclasses
import re
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentParser

from engine.batch.variants import MAY_DIFFER, Variant, check_variants
from engine.config import RunConfig
from engine.errors import UserError
from engine.files.trees import read_yaml
from engine.identity import flat
from engine.presets import find_config
from launch.arguments.many_videos import refuse_method_name
from launch.cli.parser import DEFAULT_CONFIG, parse_run

_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


def read_variants(
    text: str, argv: Sequence[str], *, name: str, add_arguments: Callable[[ArgumentParser], None]
) -> list[Variant]:
    """The variants of `--methods`: a comma-separated list of METHOD, METHOD:PRESET.yaml or LABEL=METHOD:PRESET.yaml.

    `argv` is the whole command line: its settings apply to every variant and override presets. Raises UserError
    for an unknown method, a preset that changes more than MAY_DIFFER, and variants that `check_variants` refuses.
    """
    refuse_method_name(argv)
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise UserError("--methods is empty; name methods, such as --methods direct,sliding_window,freespec")

    def parse(words: Sequence[str]) -> RunConfig:
        return parse_run(words, name=name, description="", add_arguments=add_arguments)[1]

    base = parse(argv)
    variants = [_read(item, argv, base, parse) for item in items]
    check_variants(variants)
    return variants


def _read(item: str, argv: Sequence[str], base: RunConfig, parse: Callable[[Sequence[str]], RunConfig]) -> Variant:
    label, equals, rest = item.rpartition("=")
    method, preset = _split(rest)
    if not equals and preset:
        # The class name of an import path, and the preset's name, which distinguishes variants of one method.
        label = f"{method.rpartition(':')[2].rpartition('.')[2]}-{preset.rpartition('/')[2].rpartition('.')[0]}"
    if (equals or preset) and not _LABEL.fullmatch(label):
        raise UserError(
            f"{label!r} cannot name a folder; use letters, digits and _ . + -, such as --methods NAME={rest}"
        )
    words = list(argv)
    if preset:
        _check_name(preset, method)
        # The variant's preset comes after those of the run, which include the default one.
        given = any(word.split("=")[0] == "--config" for word in words)
        words = [*([] if given else [f"--config={DEFAULT_CONFIG}"]), *words, f"--config={preset}"]
    config = parse([*words, f"--method.name={method}"])
    _check_difference(label, preset, base, config)
    return Variant(label=label or method, config=config)


def _split(text: str) -> tuple[str, str]:
    """(method, preset or "") of METHOD or METHOD:PRESET.yaml; a method may be package.module:Class."""
    method, colon, preset = text.rpartition(":")
    if colon and preset.endswith((".yaml", ".yml")):
        return method, preset
    if text.endswith((".yaml", ".yml")):
        raise UserError(f"{text!r} names a preset without a method; write METHOD:{text}")
    return text, ""


def _check_name(preset: str, method: str) -> None:
    """Raise UserError if a preset names another method than the one it is used for."""
    group = read_yaml(find_config(preset)).get("method")
    name = group.get("name") if isinstance(group, dict) else None
    if name not in (None, method):
        raise UserError(f"{preset} is a preset of {name}, not of {method}; write {name}:{preset}")


def _check_difference(label: str, preset: str, base: RunConfig, config: RunConfig) -> None:
    before, after = flat(dataclasses.asdict(base)), flat(dataclasses.asdict(config))
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    foreign = sorted(key for key in changed if not key.startswith(MAY_DIFFER))
    if foreign:
        raise UserError(
            f"{preset} of {label} changes {', '.join(foreign)}, which all variants must share; a preset of a variant "
            "may set method.*, sampler.noise, sampler.noise_stride, attention.riflex.* and attention.far"
        )
