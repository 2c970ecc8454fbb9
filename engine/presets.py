"""Read presets, the YAML files of configs/, and settings by dotted name into a configuration."""

import functools
import re
import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from engine.config import RunConfig
from engine.errors import UserError
from engine.files.trees import read_yaml
from engine.paths import SHIPPED, expand, failing_as
from engine.text.prompt_files import resolve_negative_prompt

_TYPE_ERROR = re.compile(
    r'Parser key "(?P<key>[^"]+)":\s+Expected an? (?P<type>.+)\. Got value: (?P<value>.*)', re.DOTALL
)
_UNION_ERROR = re.compile(
    r'Parser key "(?P<key>[^"]+)":.*Subtypes: \[(?P<type>[^\n]*)\].*Given value: (?P<value>.*)', re.DOTALL
)
_TYPE_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
_TYPE_WORDS |= {
    "tuple[float": "a list of numbers, as in [1000, 500]",
    "tuple[str": "a list, as in [a, b]",
    "tuple": "a list, as in [a, b]",
}


# Settings under their former names, which work for one release more.
FORMER_NAMES = {"output.checkpoint_every": "output.snapshot_every"}


def read_preset(*names: str, settings: Mapping[str, Any] | None = None) -> RunConfig:
    """Merge presets, later ones over earlier ones, and `settings` by dotted name over all of them, into a configuration.

    Args:
        names: presets of configs/ (`wan2.1-t2v-1.3b`, `ablation/gb`), or YAML files.
        settings: such as `{"video.num_frames": 161}`; docs and `generate.py --help_all` name them.

    Raises UserError for unknown settings and invalid values.
    """
    tree: dict[Any, Any] = {}
    for name in names:
        tree = _laid_over(tree, _with_new_names(read_yaml(find_config(name)), say=True))
    given: dict[Any, Any] = {}
    for key, value in (settings or {}).items():
        *groups, last = key.split(".")
        one: dict[str, Any] = {last: value}
        for group in reversed(groups):
            one = {group: one}
        given = _laid_over(given, one)
    tree = _laid_over(tree, _with_new_names(given, say=True))
    try:
        made = parse_tree(tree)
    except ArgumentError as error:
        raise UserError(describe_parser_error(error)) from error
    except ValueError as error:  # from the checks of the dataclasses
        raise UserError(str(error)) from error
    return finished(made)


def parse_tree(tree: dict[Any, Any]) -> Namespace:
    """Parse settings into the groups of a RunConfig; ArgumentError or ValueError for unknown and invalid ones."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig, nested_key=None)
    namespace = parser.parse_object(_with_new_names(tree))
    refuse_null(namespace)
    return parser.instantiate(namespace)


def finished(namespace: Namespace) -> RunConfig:
    """Build the RunConfig from a parser's results; a negative prompt in a file is read."""
    config = RunConfig(**{field.name: namespace[field.name] for field in fields(RunConfig)})
    negative_prompt = resolve_negative_prompt(config.sampler.negative_prompt)
    return replace(config, sampler=replace(config.sampler, negative_prompt=negative_prompt))


def _with_new_names(tree: dict[Any, Any], *, say: bool = False) -> dict[Any, Any]:
    """Replace former names of settings; with `say`, a warning names both."""
    for old, new in FORMER_NAMES.items():
        (group, former), name = old.split("."), new.partition(".")[2]
        if not isinstance(tree.get(group), dict) or former not in tree[group]:
            continue
        if name in tree[group]:
            raise UserError(f"{old} is the former name of {new}; give {new} alone")
        if say:
            text = f"{old} is now {new}; the old name works until the next release"
            warnings.warn(text, FutureWarning, stacklevel=3)
        tree = tree | {group: {name if key == former else key: value for key, value in tree[group].items()}}
    return tree


def _laid_over(below: dict[Any, Any], above: dict[Any, Any]) -> dict[Any, Any]:
    both = {
        key: _laid_over(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return below | above | both


def refuse_null(namespace: Namespace) -> None:
    """Raise UserError for null where a setting does not allow it; the parser accepts null in files."""
    for key, value in namespace.items():
        if value is None and key in _never_null(RunConfig):
            raise UserError(f"{key} must not be null")


@functools.cache
def _never_null(kind: Any, prefix: str = "") -> frozenset[str]:
    """Dotted names of a dataclass's fields whose type does not include None."""
    keys: set[str] = set()
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and is_dataclass(hint):
            keys |= _never_null(hint, f"{prefix}{name}.")
        elif type(None) not in get_args(hint):
            keys.add(f"{prefix}{name}")
    return frozenset(keys)


def find_config(name: str) -> Path:
    """Find a preset's file in the working directory, or among those that come with the program, with or without `.yaml`."""
    folder = SHIPPED / "configs"
    with failing_as(f"cannot look for --config {name[:60]}"):
        for place in (expand(name), SHIPPED / name, folder / name):
            for path in (place, place.parent / f"{place.name}.yaml"):
                if path.is_file():
                    return path
    presets = sorted(path.stem for path in folder.glob("*.yaml"))
    raise UserError(
        f"--config {name} does not exist; give a file, or one of the presets {', '.join(presets)} of {folder}"
    )


def describe_parser_error(error: ArgumentError) -> str:
    """Shorten a message of jsonargparse to one line without Python type names."""
    message = str(error)
    found = _TYPE_ERROR.search(message) or _UNION_ERROR.search(message)
    if found is None:
        return " ".join(message.split())
    key = found["key"] if "." in found["key"] else f"--{found['key']}"  # an option of a command, which is no setting
    return f"{key} must be {_describe_type(found['type'])}, got {found['value'].strip()!r}"


def _describe_type(text: str) -> str:
    literal = re.search(r"Literal\[(.*)\]", text)
    if literal:
        return "one of " + literal[1].replace("'", "")
    names = re.findall(r"tuple\[\w+|(?<=class ')\w+", text) or [text]
    return " or ".join(_TYPE_WORDS.get(name, name) for name in names)
