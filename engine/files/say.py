"""Print a line for the user while a command works."""

import sys
from collections.abc import Callable

from engine.shown import printable

Say = Callable[[str], None]


def say_on_stderr(line: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(f"{printable(line)}\n")
