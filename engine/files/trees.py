"""Parse JSON and YAML of any origin, and read and check the JSON files of results."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import yaml

from engine.errors import UserError
from engine.shown import Say, say_on_stderr

# The type that a JSON file must hold at each dotted key. `a.b[].c` is the key c in each item of the list a.b, `a.b{}` each value
# of the mapping a.b; a key that ends in `?` may be missing or null.
Shape = dict[str, type | UnionType]

_INSIDE: dict[str, type] = {"[]": list, "{}": Mapping}


# Recursion over deeper trees would exhaust the stack.
_MOST_DEPTH = 100
# YAML aliases can expand to endless trees; no settings have more values.
_MOST_SETTINGS = 100_000


class DamagedError(UserError):
    """A file that is truncated, overwritten, or of another kind; `reason` is the message without advice."""

    def __init__(self, reason: str, remedy: str = "move it away") -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


def parse_json(data: str | bytes, name: str, *, remedy: str = "move it away") -> Any:
    """Parse a JSON text; messages call it `name` and end with `remedy`.

    Raises:
        DamagedError: it is not UTF-8 or not JSON, is nested more than 100 deep, or holds a number of thousands of digits or
            text that UTF-8 does not have.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        tree = json.loads(text)
        if "\\u" in text:  # a lone surrogate can be neither printed nor written
            json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise DamagedError(f"{name} is not UTF-8 text", remedy) from error
    except UnicodeEncodeError as error:
        raise DamagedError(f"{name} holds text that is not Unicode", remedy) from error
    except json.JSONDecodeError as error:
        raise DamagedError(f"{name} is not JSON ({error})", remedy) from error
    except RecursionError as error:
        raise DamagedError(f"{name} is nested too deeply", remedy) from error
    except ValueError as error:  # an integer of thousands of digits
        why = str(error).partition(";")[0]
        raise DamagedError(f"{name} holds a number that is too long ({why})", remedy) from error
    if (wrong := absurd(tree)) is not None:
        raise DamagedError(f"{name} {wrong}", remedy)
    return tree


def read_yaml(
    path: Path, *, name: str | None = None, remedy: str = "configs/tiny-wan.yaml is an example"
) -> dict[Any, Any]:
    """Read the settings in a YAML file; messages call it `name` (default: the path) and end with `remedy`.

    UserError for a file that cannot be read, is not YAML, holds no settings, or is nested too deeply or too large.
    """
    name = str(path) if name is None else name
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{name}{where}: not YAML ({getattr(error, 'problem', None) or error})") from error
    except RecursionError as error:
        raise UserError(f"{name} is nested too deeply; {remedy}") from error
    except ValueError as error:  # an integer of thousands of digits, an invalid date
        raise UserError(f"{name} holds an invalid value ({str(error).partition(';')[0]})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{name} holds no settings; {remedy}")
    if (wrong := absurd(tree, most_values=_MOST_SETTINGS)) is not None:
        raise UserError(f"{name} {wrong}; {remedy}")
    return tree


def absurd(tree: Any, *, most_values: int | None = None) -> str | None:
    """Describe why a tree of dicts and lists is too deep or too large; None if it is not. Walks without recursion.

    YAML aliases, even circular ones, make a small file an endless tree, so for YAML give `most_values`.
    """
    level, count = [tree], 0
    for _ in range(_MOST_DEPTH):
        inner = [each for each in level if isinstance(each, dict | list)]
        count += sum(map(len, inner))
        if most_values is not None and count > most_values:
            return f"holds more than {most_values} values"
        level = [value for each in inner for value in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return None
    return f"is nested more than {_MOST_DEPTH} deep"


def finite_or_none(value: float | None) -> float | None:
    """The number, or None for NaN and infinity, which JSON lacks."""
    return value if value is not None and math.isfinite(value) else None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if there is none.

    Raises:
        DamagedError: the file is not JSON in UTF-8, or nested too deeply.
        UserError: the file cannot be read.
    """
    tree = _load(path)
    return None if tree is _MISSING else tree


def read_tree(path: Path, shape: Shape, *, what: str) -> dict[str, Any] | None:
    """`read_json` of a file that must hold `shape`; DamagedError, saying that it is not `what`, if it does not."""
    tree = _load(path)
    if tree is _MISSING:
        return None
    check_tree(path, tree, shape, what=what)
    return tree


def read_kept(path: Path, shape: Shape, *, what: str, say: Say = say_on_stderr) -> dict[str, Any] | None:
    """`read_tree` of a file that can be made again: None, and a line for the user, if it is damaged."""
    try:
        return read_tree(path, shape, what=what)
    except DamagedError as error:
        say(f"{error.reason}; it is made again")
        return None


_MISSING = object()


def _load(path: Path) -> Any:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return _MISSING
    except IsADirectoryError as error:
        raise DamagedError(f"{path} is a folder, where a file should be") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; fix it, or give another path") from error
    return parse_json(data, str(path))


def check_tree(path: Path, tree: Any, shape: Shape, *, what: str) -> None:
    """Raise DamagedError, which names the file and says it is not `what`, unless the tree read from it holds `shape`."""
    if (wrong := lacking(tree, shape)) is not None:
        raise DamagedError(f"{path} is not {what}: {wrong}")


def lacking(tree: Any, shape: Shape) -> str | None:
    """Describe the first key of `shape` that a tree lacks or has with another type; None if there is none."""
    if not isinstance(tree, Mapping):
        return "it holds no keys"
    return next(filter(None, (_lacking_at(tree, dotted, kind) for dotted, kind in shape.items())), None)


def _lacking_at(tree: Mapping[str, Any], dotted: str, kind: type | UnionType) -> str | None:
    inside = next((mark for mark in _INSIDE if mark in dotted), None)
    path, _, rest = dotted.partition(inside or "\0")
    shown = path.replace("?", "")
    value: Any = tree
    for key in path.split("."):
        name = key.removesuffix("?")
        if name != key and isinstance(value, Mapping) and value.get(name) is None:
            return None
        if not isinstance(value, Mapping) or name not in value:
            return f"it has no {shown}"
        value = value[name]
    if not isinstance(value, kind if inside is None else _INSIDE[inside]):
        return f"{shown} is {value!r:.60}"
    wrongs = (_lacking_inside(item, rest.removeprefix("."), kind) for item in _items(value, inside))
    return next((f"in {shown}, {wrong}" for wrong in wrongs if wrong is not None), None)


def _items(value: Any, inside: str | None) -> Iterable[Any]:
    if inside is None:
        return ()
    return value.values() if inside == "{}" else value


def _lacking_inside(item: Any, dotted: str, kind: type | UnionType) -> str | None:
    if dotted:
        return lacking(item, {dotted: kind})
    return None if isinstance(item, kind) else f"an item is {item!r:.60}"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines; nothing if there is no file. A truncated last line is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
