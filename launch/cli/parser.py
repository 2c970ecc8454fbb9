"""Parse YAML presets and dotted overrides into a RunConfig; every mistake is one line."""

import functools
import glob
import importlib
import os
import re
import sys
from argparse import Action
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from engine.config import RunConfig
from engine.errors import UserError
from engine.files.trees import read_yaml
from engine.presets import FORMER_NAMES, describe_parser_error, find_config, finished, refuse_null
from launch.cli.suggestions import describe_unknown
from launch.process.environment import LAUNCHER, is_first_rank
from launch.process.stopping import show

DEFAULT_CONFIG = "configs/tiny-wan.yaml"

_HELP = ("-h", "--help", "--help_all")
_NO_VALUE = (*_HELP, "--print_config")


# Short names of settings: a group with one value, and `--out` in commands without a folder.
_SHORT = {"output": "output.path", "model": "model.path", "method": "method.name"}
_OUT = ("folder", "output.path", "output")

# The common settings of a run, which `--help` shows beside the command's own options; `--help_all` shows all.
_COMMON = frozenset(
    "model.path model.device model.dtype model.weights video.num_frames video.height video.width video.fps sampler.num_steps "
    "sampler.guidance_scale sampler.seed sampler.negative_prompt method.name method.window_frames output.path output.overwrite".split()
)
_SELDOM = ("print_config", "placement_strategy", "extend_shows")


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The dotted names of a parser: settings (`leaves`), groups, boolean switches, lists, and maps.

    The user chooses the keys of a map: `--method.settings.NAME VALUE`. `unread` are settings that the command refuses,
    `former` are old names that it still accepts.
    """

    leaves: frozenset[str]
    groups: frozenset[str]
    switches: frozenset[str]
    lists: frozenset[str] = frozenset()
    maps: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    former: frozenset[str] = frozenset()

    @property
    def offered(self) -> frozenset[str]:
        """The names to suggest, without settings that the command refuses."""
        read = self.leaves - self.unread - self.former
        return read | {group for group in self.groups if any(leaf.startswith(f"{group}.") for leaf in read)}

    def knows(self, key: str) -> bool:
        """Whether the key is a known setting or group, or lies in a map."""
        return key in self.leaves or key in self.groups or key.rpartition(".")[0] in self.maps

    @classmethod
    def of(cls, parser: ArgumentParser, unread: Collection[str] = ()) -> "Keys":
        """Collect the names of a parser that has no configuration file yet."""
        defaults = parser.get_defaults(skip_validation=True)
        leaves = frozenset(defaults.keys())
        return cls(
            leaves=leaves,
            groups=frozenset(defaults.keys(branches=True)) - leaves,
            switches=frozenset(key for key in leaves if isinstance(defaults[key], bool)),
            lists=frozenset(
                action.dest for action in parser._actions if "tuple[" in str(getattr(action, "_typehint", ""))
            ),
            maps=frozenset(key for key in leaves if isinstance(defaults[key], dict)),
            unread=frozenset(unread),
            former=frozenset(_former_names(parser)),
        )


def parse_run(
    argv: Sequence[str],
    *,
    name: str,
    description: str,
    add_arguments: Callable[[ArgumentParser], None],
    unread: Collection[str] = (),
) -> tuple[Namespace, RunConfig]:
    """Parse `argv` into the command's own arguments and the RunConfig.

    Presets (`--config FILE`, several are merged in order, configs/tiny-wan.yaml if there is none) are read first, and
    `--a.b value` overrides them in any order. `unread` are settings that the command refuses; help leaves them out.
    Raises UserError for any mistake.
    """
    build = _run_parser.__wrapped__ if wants_help(argv) else _run_parser  # help hides options of its parser
    parser, keys = build(name, description, add_arguments, _called(name), frozenset(unread))
    words = arrange(argv, keys)
    given = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    files = [find_config(file) for file in given or [DEFAULT_CONFIG]]
    presets = [(file, check_config_file(file, keys)) for file in files]
    # Presets are set as defaults instead of arguments, so that --help shows their values.
    parser.default_config_files = [glob.escape(str(file)) for file in files]
    words = [word for word in words if not word.startswith("--config=")]
    namespace = parse(parser, words, unread=unread, presets=presets)
    return namespace, finished(namespace)


@functools.lru_cache(maxsize=32)
def _run_parser(
    name: str, description: str, add_arguments: Callable[[ArgumentParser], None], called: str, unread: frozenset[str]
) -> tuple[ArgumentParser, Keys]:
    """The parser of a command, which many variants are read with, and its names.

    `called` only tells parsers in the cache apart: `make_parser` writes it into the usage.
    """
    del called
    parser = make_parser(name, "[--config FILE ...] [--SETTING VALUE ...]", description)
    add_arguments(parser)
    parser.add_argument(
        "--config", action="config", help=f"YAML preset; later ones override earlier ones (default: {DEFAULT_CONFIG})"
    )
    parser.add_class_arguments(RunConfig, nested_key=None)
    for old, new in FORMER_NAMES.items():
        add_former_name(parser, old, new, type(parser.get_default(new)))
    return parser, Keys.of(parser, unread)


def make_parser(name: str, usage: str, description: str) -> ArgumentParser:
    """Make a parser that raises on errors and accepts no abbreviations; `usage` is what follows the command's name."""
    parser = ArgumentParser(
        prog=name,
        usage=f"{_called(name)} {usage}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="show the common settings, and exit")
    parser.add_argument("--help_all", action="help", help="show every setting, and exit")
    return parser


def _called(script: str) -> str:
    """The command as it was typed: `compare.py`, `freespec compare` or `python -m launch compare`."""
    start, command = Path(sys.argv[0]), script.removesuffix(".py")
    if start.stem == "freespec":
        return f"freespec {command}"
    return f"python -m launch {command}" if start.parts[-2:] == ("launch", "__main__.py") else script


def parse(
    parser: ArgumentParser,
    words: Sequence[str],
    *,
    unread: Collection[str] = (),
    presets: Sequence[tuple[Path, Collection[str]]] = (),
) -> Namespace:
    """Parse arranged words into dataclasses; UserError for a mistake. Help leaves out `unread` settings.

    `presets` are the parser's configuration files, in order, with the names of their settings.
    """
    if wants_help(words):
        show_help(parser, everything="--help_all" in words, unread=unread)
        sys.exit(0)
    try:
        in_force = _former_names_in_force(parser, words, presets)
        namespace = _use_new_names(parser, parser.parse_args(list(words)), in_force)
        refuse_null(namespace)
        return parser.instantiate(namespace)
    except ArgumentError as error:
        raise UserError(describe_parser_error(error)) from error
    except ValueError as error:  # from the checks of the dataclasses
        raise UserError(str(error)) from error


def add_former_name(
    parser: ArgumentParser,
    old: str,
    new: str,
    kind: type = str,
    convert: Callable[[Any, Namespace], Any] = lambda value, _: value,
) -> None:
    """Accept `--old` for `--new` for one release, in presets too; `convert(value, namespace)` makes the new option's value."""
    parser.add_argument(f"--{old}", type=kind, help=SUPPRESS)
    parser.former_names = _former_names(parser) | {old: (new, convert)}


def _former_names(parser: ArgumentParser) -> dict[str, tuple[str, Callable[[Any, Namespace], Any]]]:
    return getattr(parser, "former_names", {})


def _former_names_in_force(
    parser: ArgumentParser, words: Sequence[str], presets: Sequence[tuple[Path, Collection[str]]]
) -> set[str]:
    """The former names whose value counts: the preset or the command line that has its option last has it by this name.

    UserError for a preset or a command line that has an option under both names, or with `--print_config`, which prints
    what the parser read.
    """
    options = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    in_force: set[str] = set()
    for file, names in (*presets, (None, options)):
        dashes, where = ("--", "") if file is None else ("", f" in {file}")
        for old, (new, _) in _former_names(parser).items():
            if old in names and new in names:
                raise UserError(f"{dashes}{old}{where} is the former name of {dashes}{new}; give {dashes}{new} alone")
            if old in names:
                in_force.add(old)
                _say_renamed(f"{dashes}{old}{where}", f"{dashes}{new}")
            elif new in names:
                in_force.discard(old)
    if in_force and "print_config" in options:
        raise UserError(f"--print_config would leave out {', '.join(sorted(in_force))}; give present names")
    return in_force


def _use_new_names(parser: ArgumentParser, namespace: Namespace, in_force: Collection[str]) -> Namespace:
    for old, (new, convert) in _former_names(parser).items():
        value = namespace.pop(old, None)
        if old in in_force:
            namespace[new] = None if value is None else convert(value, namespace)
    return namespace


@functools.cache
def _say_renamed(old: str, new: str) -> None:
    """Print one line on stderr, on rank 0 only."""
    if LAUNCHER not in os.environ and is_first_rank():
        show(f"note: {old} is now {new}; the old name works until the next release")


def wants_help(words: Sequence[str]) -> bool:
    """Whether the words ask for help."""
    return any(word in _HELP for word in words)


def show_help(parser: ArgumentParser, *, everything: bool, unread: Collection[str]) -> None:
    """Print the options of a command with the common or all settings of a run."""
    for action in parser._actions:
        name = action.dest
        is_group = type(action).__name__ == "_ActionConfigLoad"  # `--model FILE`, which is read as `--model.path`
        if is_group or name in unread or (not everything and ("." in name or name in _SELDOM) and name not in _COMMON):
            action.help = SUPPRESS
    text = parser.format_help()
    print(re.sub(r"default config file locations:\n.*?\n\n", "", text, flags=re.DOTALL), end="")


class HelpFormatter(DefaultHelpFormatter):
    """Format help without redundant types and defaults."""

    def _expand_help(self, action: Action) -> str:
        text = super()._expand_help(action)
        text = re.sub(r"\((?:required, )?type: (?:Literal\[.*?\]|bool), ", "(", text)
        return text.replace("(required, type", "(type").replace(", default: null)", ")").replace(", default: )", ")")


def arrange(argv: Sequence[str], keys: Keys, *, num_positionals: int = 0) -> list[str]:
    """Every option as `--name=value`, positional arguments last; UserError for unknown names, missing values, and lists given twice.

    `--switch` alone means `--switch=true`, a value may begin with a dash, and `--output`, `--model` and `--method` are
    short for output.path, model.path and method.name.
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
    _check_lists(options, keys)
    return options + positionals


def _check_lists(options: Sequence[str], keys: Keys) -> None:
    """Raise UserError for a list that is given twice: the parser would drop the first. Options such as `--given` add up."""
    given: dict[str, list[str]] = {}
    for name, _, value in (option.partition("=") for option in options):
        given.setdefault(name, []).append(value)
    for name, values in given.items():
        if name.removeprefix("--") in keys.lists and len(values) > 1:
            whole = ", ".join(value.strip().removeprefix("[").removesuffix("]") for value in values)
            raise UserError(
                f'{name} is given {len(values)} times, {" and ".join(values)}; give one list, {name} "[{whole}]"'
            )


def _option(name: str, value: str | None, keys: Keys) -> str:
    """Return `--name=value`; UserError for an unknown name, a group of settings, or a missing value."""
    key = name.removeprefix("--")
    if key == "out" and key not in keys.leaves:
        key = next((target for target in _OUT if target in keys.offered), key)
    if key in keys.groups and _SHORT.get(key) in keys.leaves:
        key = _SHORT[key]
    if key.startswith("-"):
        raise UserError(_describe_unknown(key.removeprefix("-"), keys, value=value).replace("setting ", "setting -"))
    check_key(key, keys, value=value)
    if key in keys.groups:
        inner = min(leaf for leaf in keys.leaves if leaf.startswith(f"{key}."))
        raise UserError(f"{name} is a group of settings; give them one by one, such as --{inner}")
    if value is None and key not in keys.switches:
        raise UserError(f"{name} needs a value")
    return f"--{key}={'true' if value is None else value}"


def check_text(argv: Sequence[str]) -> None:
    """Raise UserError for words that are not UTF-8, which cannot be encoded or recorded."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the argument {word!r} is not UTF-8 text; write it, or rename the file, in UTF-8"
            ) from error


def check_key(key: str, keys: Keys, where: str = "", value: str | None = None) -> None:
    """Raise UserError for an unknown dotted key, suggesting the closest match if there is one."""
    if not keys.knows(key):
        raise UserError(_describe_unknown(key, keys, value=value, where=where))


def _describe_unknown(key: str, keys: Keys, *, value: str | None, where: str = "") -> str:
    return describe_unknown(key, keys.offered, commands_with=commands_with, value=value, where=where)


def commands_with(key: str) -> tuple[list[str], str]:
    """List the commands that have an option of this name, and return the name; for a former name, the present one."""
    from launch.cli.start import COMMANDS, is_installed  # noqa: PLC0415

    options: dict[str, frozenset[str]] = {}
    today = key
    for name in filter(is_installed, COMMANDS):
        parser = make_parser(name, "", "")
        importlib.import_module(f"launch.arguments.{name}").add_arguments(parser)
        keys = Keys.of(parser)
        options[name] = keys.leaves - keys.former
        if key in keys.former:
            today, _ = _former_names(parser)[key]
    return [name for name, leaves in options.items() if today in leaves], today


def check_config_file(path: Path, keys: Keys) -> frozenset[str]:
    """Return the dotted names in a preset; UserError unless it is YAML whose keys are all known."""
    return frozenset(_names_in(read_yaml(path), keys, "", path))


def _names_in(tree: dict[Any, Any], keys: Keys, prefix: str, path: Path) -> Iterator[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in keys.leaves | keys.groups:
            # Suggest from the whole key: `vidoe.num_frames` has a better match than `vidoe`.
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
            yield from _names_in(value, keys, f"{key}.", path)
        else:
            yield key
