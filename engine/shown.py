"""Text for a terminal: lines for the user, foreign text escaped, sizes and durations in units. Standard library only."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

# Of GiB, below which different numbers of bytes may look alike.
MOST_DECIMALS = 11
# Control characters except tab and newline, marks of writing direction, and surrogates (from names that are not UTF-8).
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with control characters escaped: `\x1b[2J` is shown instead of clearing the screen."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


Say = Callable[[str], None]
"""Prints a line for the user while a command works."""


def say_on_stderr(line: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(f"{printable(line)}\n")


def quoted(text: str) -> str:
    """The text in quotation marks, with control characters escaped."""
    return f'"{printable(text)}"'


class PrintableStream:
    """A stream that escapes control characters; other attributes are those of `stream`.

    After a broken pipe, such as `| head`, writes are dropped, so that the work continues.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write the text as `printable` shows it."""
        with self._read_or_not():
            self.stream.write(printable(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with self._read_or_not():
            self.stream.flush()

    @contextlib.contextmanager
    def _read_or_not(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # also for what is still buffered and flushed when Python exits
            os.close(nowhere)

    def writelines(self, lines: Any) -> None:
        """Write each of them."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def describe_size(num_bytes: float) -> str:
    """`1.5 GiB`, `20.0 MiB`, `3.2 KiB`, `17 bytes`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def apart(*sizes: float) -> list[str]:
    """Bytes in GiB, with one decimal, or as many as it takes to show that different sizes differ."""
    for decimals in range(1, MOST_DECIMALS):
        texts = [f"{size / 2**30:.{decimals}f}" for size in sizes]
        if len(set(texts)) == len(set(sizes)):
            break
    return texts


def describe_seconds(seconds: float) -> str:
    """`4.2 s`, `3 min 10 s`, `5 h 2 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
