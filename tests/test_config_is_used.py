"""Every field of the configuration has a reader: a setting that nothing reads is a promise that is not kept."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from engine import config
from freespec.methods import METHODS

ROOT = Path(__file__).parent.parent
FLOORS = ("engine", "launch", "freespec")
GROUPS = {field.name for field in dataclasses.fields(config.RunConfig)}


def config_classes() -> list[type]:
    """The dataclasses of the configuration, and the methods, whose fields are settings too."""
    ours = [value for value in vars(config).values() if dataclasses.is_dataclass(value)]
    return [*ours, *(method for method in METHODS.values() if method not in ours)]


def names_read(source: str) -> Iterator[str]:
    """Attributes that a source reads outside of `__post_init__`, where a field is checked rather than used.

    A record holds the configuration as maps: `output["crf"]` reads a field too, of the map of that name.
    """
    tree = ast.parse(source)
    checks = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name == "__post_init__"
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in checks:
            yield node.attr
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and isinstance(node.value, ast.Name):
            if node.value.id in GROUPS and isinstance(node.slice, ast.Constant):
                yield str(node.slice.value)


def unread(classes: list[type], read: set[str]) -> set[str]:
    """Fields that are not among the names that are read."""
    return {
        f"{owner.__name__}.{field.name}"
        for owner in classes
        for field in dataclasses.fields(owner)
        if field.name not in read
    }


def test_every_field_is_read() -> None:
    sources = [path.read_text() for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]
    read = {name for source in sources for name in names_read(source)}
    assert unread(config_classes(), read) == set()


def test_an_unread_field_would_be_found() -> None:
    @dataclasses.dataclass
    class Extra:
        nobody_reads_this: int = 0

        def __post_init__(self) -> None:
            assert self.nobody_reads_this >= 0

    read = set(names_read("class A:\n    def __post_init__(self):\n        self.nobody_reads_this\n"))
    assert unread([Extra], read) == {"Extra.nobody_reads_this"}
    assert unread([Extra], set(names_read("words['nobody_reads_this']"))) == {"Extra.nobody_reads_this"}
    assert unread([Extra], set(names_read("x.nobody_reads_this"))) == set()
    assert unread([Extra], set(names_read("output['nobody_reads_this']"))) == set()
