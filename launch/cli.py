"""Settings from the command line: YAML presets and dotted overrides become a RunConfig, and every mistake one line."""

import functools
import glob
import re
import sys
from argparse import Action
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from engine.config import RunConfig
from engine.errors import UserError
from engine.files.trees import MOST_SETTINGS, absurd
from engine.paths import REPOSITORY, expand
from engine.prompt_files import resolve_negative_prompt
from launch.suggestions import describe_unknown

DEFAULT_CONFIG = "configs/tiny-wan.yaml"

_HELP = ("-h", "--help", "--help_all")
_NO_VALUE = (*_HELP, "--print_config")
_TYPE_ERROR = re.compile(
    r'Parser key "(?P<key>[^"]+)":\s+Expected an? (?P<type>.+)\. Got value: (?P<value>.*)', re.DOTALL
)
_UNION_ERROR = re.compile(
    r'Parser key "(?P<key>[^"]+)":.*Subtypes: \[(?P<type>[^\n]*)\].*Given value: (?P<value>.*)', re.DOTALL
)
_TYPE_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}


# A group given one word is the setting of it that everybody sets.
_SHORT = {"output": "output.path", "model": "model.path", "method": "method.name"}

# Of the settings of a run, those that `--help` shows beside the command's own options; `--help_all` shows all.
_EVERYDAY = frozenset(
    "model.path model.device model.dtype model.weights video.num_frames video.height video.width video.fps sampler.num_steps "
    "sampler.guidance_scale sampler.seed sampler.negative_prompt method.name method.window_frames output.path output.overwrite".split()
)
_SELDOM = ("print_config", "placement_strategy")


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
    argv: Sequence[str],
    *,
    name: str,
    description: str,
    add_arguments: Callable[[ArgumentParser], None],
    unread: Collection[str] = (),
) -> tuple[Namespace, RunConfig]:
    """The command's own arguments and the RunConfig of `argv`.

    Presets (`--config FILE`, several are merged in order, configs/tiny-wan.yaml if there is none) are read first, and
    `--a.b value` overrides them wherever it stands. `unread` are settings that the command refuses, which help leaves out.
    Raises UserError, in one line, for whatever is wrong.
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
    namespace = parse(parser, [word for word in words if not word.startswith("--config=")], unread=unread)
    config = RunConfig(**{field.name: namespace[field.name] for field in fields(RunConfig)})
    negative_prompt = resolve_negative_prompt(config.sampler.negative_prompt)
    return namespace, replace(config, sampler=replace(config.sampler, negative_prompt=negative_prompt))


def make_parser(name: str, usage: str, description: str) -> ArgumentParser:
    """A parser that raises instead of printing its usage, and takes no abbreviations."""
    parser = ArgumentParser(
        prog=name,
        usage=usage,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="show what is set every day, and exit")
    parser.add_argument("--help_all", action="help", help="show every setting, and exit")
    return parser


def parse(parser: ArgumentParser, words: Sequence[str], *, unread: Collection[str] = ()) -> Namespace:
    """Parse arranged words and make the dataclasses; UserError for what is wrong. Help leaves out settings that are `unread`."""
    if asks_help(words):
        show_help(parser, everything="--help_all" in words, unread=unread)
        sys.exit(0)
    try:
        namespace = parser.parse_args(list(words))
        refuse_null(namespace)
        return parser.instantiate(namespace)
    except ArgumentError as error:
        raise UserError(_plain(str(error))) from error
    except ValueError as error:  # from the checks of the dataclasses
        raise UserError(str(error)) from error


def asks_help(words: Sequence[str]) -> bool:
    """Whether the words ask for help, and nothing else."""
    return any(word in _HELP for word in words)


def refuse_null(namespace: Namespace) -> None:
    """Raise UserError for a setting of a run that is null and may not be; the parser lets null pass in files."""
    for key, value in namespace.items():
        if value is None and key in _never_null(RunConfig):
            raise UserError(f"{key} must not be null")


@functools.cache
def _never_null(kind: type, prefix: str = "") -> frozenset[str]:
    """Dotted names of a dataclass's fields whose type does not include None."""
    keys: set[str] = set()
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            keys |= _never_null(hint, f"{prefix}{name}.")
        elif type(None) not in get_args(hint):
            keys.add(f"{prefix}{name}")
    return frozenset(keys)


def show_help(parser: ArgumentParser, *, everything: bool, unread: Collection[str]) -> None:
    """Print the options of a command and the settings of a run that are set every day, or all that it reads."""
    for action in parser._actions:
        name = action.dest
        is_group = type(action).__name__ == "_ActionConfigLoad"  # `--model FILE`, which is read as `--model.path`
        if (
            is_group
            or name in unread
            or (not everything and ("." in name or name in _SELDOM) and name not in _EVERYDAY)
        ):
            action.help = SUPPRESS
    text = parser.format_help()
    print(re.sub(r"default config file locations:\n.*?\n\n", "", text, flags=re.DOTALL), end="")


class HelpFormatter(DefaultHelpFormatter):
    """What a setting means and its default, without what the list of its values or the preset says already."""

    def _expand_help(self, action: Action) -> str:
        text = super()._expand_help(action)
        text = re.sub(r"\((?:required, )?type: (?:Literal\[.*?\]|bool), ", "(", text)
        return text.replace("(required, type", "(type").replace(", default: null)", ")").replace(", default: )", ")")


def arrange(argv: Sequence[str], keys: Keys, *, num_positionals: int = 0) -> list[str]:
    """Every option as `--name=value`, positional arguments last; UserError for unknown names and missing values.

    `--switch` alone means `--switch=true`, a value may begin with a dash, and `--output`, `--model` and `--method` are the
    settings of these groups that everybody sets.
    """
    check_text(argv)
    options, positionals, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name in _NO_VALUE:
            options.append(word)
        elif re.match(r"--|-[a-zA-Z]", word):
            follows = not equals and bool(words) and not words[0].startswith("--")
            options.append(_option(name, words.pop(0) if follows else value if equals else None, keys))
        else:
            positionals.append(word)
    if len(positionals) > num_positionals:
        raise UserError(f"unexpected argument {positionals[num_positionals]!r}; settings are given as --name value")
    return options + positionals


def _option(name: str, value: str | None, keys: Keys) -> str:
    """`--name=value`; UserError for an unknown name, a group of settings, and a value that is missing."""
    key = name.removeprefix("--")
    if key in keys.groups and _SHORT.get(key) in keys.leaves:
        key = _SHORT[key]
    if key.startswith("-"):
        raise UserError(
            describe_unknown(key.removeprefix("-"), keys.leaves | keys.groups, value=value).replace(
                "setting ", "setting -"
            )
        )
    check_key(key, keys, value=value)
    if key in keys.groups:
        inner = min(leaf for leaf in keys.leaves if leaf.startswith(f"{key}."))
        raise UserError(f"{name} is a group of settings; give them one by one, such as --{inner}")
    if value is None and key not in keys.switches:
        raise UserError(f"{name} needs a value")
    return f"--{key}={'true' if value is None else value}"


def check_text(argv: Sequence[str]) -> None:
    """Raise UserError for bytes that are no text: a prompt of them cannot be encoded, nor a path written into a record."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the argument {word!r} is not UTF-8 text; write it, or rename the file, in UTF-8"
            ) from error


def check_key(key: str, keys: Keys, where: str = "", value: str | None = None) -> None:
    """Raise UserError for an unknown dotted key, naming the one that was meant if that is clear."""
    if not keys.knows(key):
        raise UserError(describe_unknown(key, keys.leaves | keys.groups, value=value, where=where))


def check_config_file(path: Path, keys: Keys) -> None:
    """Raise UserError unless the file is YAML whose keys are all known."""
    _check_tree(read_yaml(path), keys, "", path)


def read_yaml(path: Path) -> dict[Any, Any]:
    """The settings in a YAML file; UserError for one that is no YAML, holds none, or is too deep or too large to be walked."""
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
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply; configs/ has examples") from error
    except ValueError as error:  # an integer of thousands of digits, a date that there is not
        raise UserError(f"{path} holds a value that is none ({str(error).partition(';')[0]})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no settings; configs/ has examples")
    if (wrong := absurd(tree, most_values=MOST_SETTINGS)) is not None:
        raise UserError(f"{path} {wrong}; configs/ has examples")
    return tree


def _check_tree(tree: dict[Any, Any], keys: Keys, prefix: str, path: Path) -> None:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in keys.leaves | keys.groups:
            # Name the whole key: the nearest to `vidoe.num_frames` is surer than the nearest to `vidoe`.
            inner = next((f"{key}.{inner}" for inner in value), key)
            check_key(inner, keys, f" in {path}")
        check_key(key, keys, f" in {path}", None if isinstance(value, dict | list) else str(value))
        if key in keys.groups:
            if not isinstance(value, dict):
                advice = (
                    f"; write {_SHORT[key].replace('.', ': {')}: {value}}}"
                    if key in _SHORT and isinstance(value, str)
                    else ""
                )
                raise UserError(f"{key} in {path} is a group of settings, got {value!r}{advice}")
            _check_tree(value, keys, f"{key}.", path)


def find_config(name: str) -> Path:
    """Return a preset's file: from the working directory, or from those that come with the program, with or without `.yaml`."""
    folder = REPOSITORY / "configs"
    try:
        for place in (expand(name), REPOSITORY / name, folder / name):
            for path in (place, place.parent / f"{place.name}.yaml"):
                if path.is_file():
                    return path
    except OSError as error:  # no permission, a name too long
        raise UserError(f"cannot look for --config {name[:60]}: {error.strerror}") from error
    presets = sorted(path.stem for path in folder.glob("*.yaml"))
    raise UserError(
        f"--config {name} does not exist; give a file, or one of the presets {', '.join(presets)} of {folder}"
    )


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
