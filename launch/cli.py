"""Settings from the command line: YAML presets and dotted overrides become a RunConfig, and every mistake one line."""

import difflib
import glob
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from engine.config import RunConfig
from engine.errors import UserError
from engine.paths import REPOSITORY, expand
from engine.prompt_files import resolve_negative_prompt

DEFAULT_CONFIG = "configs/tiny-wan.yaml"

_NO_VALUE = ("--help", "-h", "--print_config")
_TYPE_ERROR = re.compile(
    r'Parser key "(?P<key>[^"]+)":\s+Expected an? (?P<type>.+)\. Got value: (?P<value>.*)', re.DOTALL
)
_UNION_ERROR = re.compile(
    r'Parser key "(?P<key>[^"]+)":.*Subtypes: \[(?P<type>[^\n]*)\].*Given value: (?P<value>.*)', re.DOTALL
)
_TYPE_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}


# What other commands, older versions and other programs call a setting; letters alone would lead elsewhere.
_OTHER_NAMES = {
    "nproc": "gpus",
    "model.offload": "model.weights",
    "model.cpu_offload": "model.weights",
    "parallel.degrees": "parallel.plan",
    "parallel.tp": "parallel.ulysses",
    "seed": "sampler.seed",
    "steps": "sampler.num_steps",
}
# What many commands have and some have no use for: the likest of the others' names would be nonsense.
_OF_OTHER_COMMANDS = frozenset({"prompt", "prompt_file", "verbose", "ray"})


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The dotted names that a parser knows: single settings, groups of them, those that are true or false, and maps.

    A map is a setting whose own keys are the user's: `--method.settings.NAME VALUE`.
    """

    leaves: frozenset[str]
    groups: frozenset[str]
    switches: frozenset[str]
    maps: frozenset[str] = frozenset()

    def knows(self, key: str) -> bool:
        """Whether the key is one of these, or one of a map's."""
        return key in self.leaves or key in self.groups or key.rpartition(".")[0] in self.maps

    @classmethod
    def of(cls, parser: ArgumentParser) -> "Keys":
        """Read them off a parser, before any configuration file is given to it."""
        defaults = parser.get_defaults(skip_validation=True)
        leaves = frozenset(defaults.keys())
        return cls(
            leaves=leaves,
            groups=frozenset(defaults.keys(branches=True)) - leaves,
            switches=frozenset(key for key in leaves if isinstance(defaults[key], bool)),
            maps=frozenset(key for key in leaves if isinstance(defaults[key], dict)),
        )


def parse_run(
    argv: Sequence[str], *, name: str, description: str, add_arguments: Callable[[ArgumentParser], None]
) -> tuple[Namespace, RunConfig]:
    """The command's own arguments and the RunConfig of `argv`.

    Presets (`--config FILE`, several are merged in order, configs/tiny-wan.yaml if there is none) are read first, and
    `--a.b value` overrides them wherever it stands. Raises UserError, in one line, for whatever is wrong.
    """
    parser = make_parser(name, f"{name} [--config FILE ...] [--SETTING VALUE ...]", description)
    add_arguments(parser)
    parser.add_argument(
        "--config", action="config", help=f"YAML preset; later ones override earlier ones (default: {DEFAULT_CONFIG})"
    )
    parser.add_class_arguments(RunConfig, nested_key=None)
    keys = Keys.of(parser)
    words = arrange(argv, keys)
    given = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    files = [find_config(file) for file in given or [DEFAULT_CONFIG]]
    for file in files:
        check_config_file(file, keys)
    # As files of defaults rather than as arguments, so that --help shows the values of the preset.
    parser.default_config_files = [glob.escape(str(file)) for file in files]
    namespace = parse(parser, [word for word in words if not word.startswith("--config=")])
    config = RunConfig(**{field.name: namespace[field.name] for field in fields(RunConfig)})
    negative_prompt = resolve_negative_prompt(config.sampler.negative_prompt)
    return namespace, replace(config, sampler=replace(config.sampler, negative_prompt=negative_prompt))


def make_parser(name: str, usage: str, description: str) -> ArgumentParser:
    """A parser that raises instead of printing its usage, and takes no abbreviations."""
    return ArgumentParser(prog=name, usage=usage, description=description, exit_on_error=False, allow_abbrev=False)


def parse(parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    """Parse arranged words and make the dataclasses; UserError for what is wrong."""
    try:
        return parser.instantiate(parser.parse_args(list(words)))
    except ArgumentError as error:
        raise UserError(_plain(str(error))) from error
    except ValueError as error:  # from the checks of the dataclasses
        raise UserError(str(error)) from error


def arrange(argv: Sequence[str], keys: Keys, *, num_positionals: int = 0) -> list[str]:
    """Every option as `--name=value`, positional arguments last; UserError for unknown names and missing values.

    `--switch` alone means `--switch=true`, and a value may begin with a dash.
    """
    check_text(argv)
    options, positionals, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name in _NO_VALUE:
            options.append(word)
            continue
        if not word.startswith("--"):
            positionals.append(word)
            continue
        key = name.removeprefix("--")
        check_key(key, keys)
        if key in keys.groups:
            inner = min(leaf for leaf in keys.leaves if leaf.startswith(f"{key}."))
            raise UserError(f"{name} is a group of settings; give them one by one, such as --{inner}")
        if not equals:
            if words and not words[0].startswith("--"):
                value = words.pop(0)
            elif key in keys.switches:
                value = "true"
            else:
                raise UserError(f"{name} needs a value")
        options.append(f"{name}={value}")
    if len(positionals) > num_positionals:
        raise UserError(f"unexpected argument {positionals[num_positionals]!r}; settings are given as --name value")
    return options + positionals


def check_text(argv: Sequence[str]) -> None:
    """Raise UserError for bytes that are no text: a prompt of them cannot be encoded, nor a path written into a record."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the argument {word!r} is not UTF-8 text; write it, or rename the file, in UTF-8"
            ) from error


def check_key(key: str, keys: Keys, where: str = "") -> None:
    """Raise UserError for an unknown dotted key, naming the nearest valid one."""
    if keys.knows(key):
        return
    if key in _OF_OTHER_COMMANDS:
        raise UserError(f"unknown setting {key}{where}; this command has no use for it, leave it out")
    nearest = nearest_key(key, keys.leaves | keys.groups)
    raise UserError(f"unknown setting {key}{where}" + (f"; did you mean {nearest}?" if nearest else "; see --help"))


def nearest_key(key: str, keys: Iterable[str]) -> str | None:
    """The valid key that looks most like `key`, as a whole and in its last part; None if none looks like it."""

    if _OTHER_NAMES.get(key) in keys:
        return _OTHER_NAMES[key]

    def likeness(other: str) -> float:
        parts = zip((key, key.rpartition(".")[2]), (other, other.rpartition(".")[2]), strict=True)
        return (
            max(difflib.SequenceMatcher(None, a, b).ratio() for a, b in parts)
            + 0.1 * difflib.SequenceMatcher(None, key, other).ratio()
        )

    best = max(sorted(keys), key=likeness)
    return best if likeness(best) >= 0.6 else None


def check_config_file(path: Path, keys: Keys) -> None:
    """Raise UserError unless the file is YAML whose keys are all known."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not YAML ({getattr(error, 'problem', None) or error})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no settings; configs/ has examples")
    _check_tree(tree, keys, "", path)


def _check_tree(tree: dict[Any, Any], keys: Keys, prefix: str, path: Path) -> None:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in keys.leaves | keys.groups:
            # Name the whole key: the nearest to `vidoe.num_frames` is surer than the nearest to `vidoe`.
            inner = next((f"{key}.{inner}" for inner in value), key)
            check_key(inner, keys, f" in {path}")
        check_key(key, keys, f" in {path}")
        if key in keys.groups:
            if not isinstance(value, dict):
                raise UserError(f"{key} in {path} is a group of settings, got {value!r}")
            _check_tree(value, keys, f"{key}.", path)


def find_config(name: str) -> Path:
    """A file from the working directory, or else from the repository."""
    for path in (expand(name), REPOSITORY / name):
        if path.is_file():
            return path
    raise UserError(f"--config {name} does not exist; presets lie in {REPOSITORY / 'configs'}")


def _plain(message: str) -> str:
    """One of jsonargparse's messages in one line and without Python's names of types."""
    found = _TYPE_ERROR.search(message) or _UNION_ERROR.search(message)
    if found is None:
        return " ".join(message.split())
    return f"{found['key']} must be {_describe_type(found['type'])}, got {found['value'].strip()!r}"


def _describe_type(text: str) -> str:
    literal = re.search(r"Literal\[(.*)\]", text)
    if literal:
        return "one of " + literal[1].replace("'", "")
    names = re.findall(r"class '(\w+)'", text) or [text]
    return " or ".join(_TYPE_WORDS.get(name, name) for name in names)
