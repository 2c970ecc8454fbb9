"""Read the JSON files of results and check that they hold what they are taken for."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from engine.errors import UserError

# What a JSON file must hold to be what it is taken for: the type at each dotted key.
Shape = dict[str, type | UnionType]


class DamagedError(UserError):
    """A file whose content is not what its name promises: cut, overwritten, or of another kind."""


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if there is none.

    Raises:
        DamagedError: the file is not JSON in UTF-8, or nested too deeply.
        UserError: the file cannot be read.
    """
    tree = _load(path)
    return None if tree is _MISSING else tree


def read_tree(path: Path, shape: Shape, *, what: str) -> dict[str, Any] | None:
    """`read_json` of a file that must hold `shape`; DamagedError, which says it is not `what`, for one that does not."""
    tree = _load(path)
    if tree is _MISSING:
        return None
    check_tree(path, tree, shape, what=what)
    return tree


_MISSING = object()


def _load(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return _MISSING
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; mend it, or give another place") from error
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} is not UTF-8 text; move it away") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DamagedError(f"{path} is not JSON ({error}); move it away") from error
    except (RecursionError, ValueError) as error:  # nested thousands deep; an integer of thousands of digits
        raise DamagedError(f"{path} is not JSON of a result ({error}); move it away") from error


def check_tree(path: Path, tree: Any, shape: Shape, *, what: str) -> None:
    """Raise DamagedError, which names the file and says it is not `what`, unless the tree read from it holds `shape`."""
    if (wrong := lacking(tree, shape)) is not None:
        raise DamagedError(f"{path} is not {what}: {wrong}; move it away")


def lacking(tree: Any, shape: Shape) -> str | None:
    """Describe the first key of `shape` that a tree lacks or has with another type; None if there is none."""
    if not isinstance(tree, Mapping):
        return "it holds no keys"
    for dotted, kind in shape.items():
        value: Any = tree
        for key in dotted.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return f"it has no {dotted}"
            value = value[key]
        if not isinstance(value, kind):
            return f"{dotted} is {value!r:.60}"
    return None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines; nothing if there is no file. A last line that was cut is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
