"""Streams of a command: lines prefixed with a rank, and output that survives a closed pipe or a full disk. Standard library only."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


class Wrapped:
    """A stream that delegates to another."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class RankLines(Wrapped):
    """A stream whose lines begin with a rank."""

    def __init__(self, stream: TextIO, rank: int) -> None:
        super().__init__(stream)
        self._prefix, self._at_start = f"[rank {rank}] ", True

    def write(self, text: str) -> int:
        """Write through, with the prefix before each line; a progress bar's carriage returns begin none."""
        for line in text.split("\n")[:-1]:
            self._write_part(f"{line}\n")
        self._write_part(text.rpartition("\n")[2])
        return len(text)

    def _write_part(self, part: str) -> None:
        if part:
            self._stream.write(self._prefix + part if self._at_start else part)
            self._at_start = part.endswith("\n")


class Unfailing(Wrapped):
    """A stream that survives a closed pipe or a full disk; `error` keeps the last OSError."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write what can be written."""
        try:
            self._stream.write(text)
        except OSError as error:
            self.error = error
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        try:
            self._stream.flush()
        except OSError as error:
            self.error = error

    def close(self) -> None:
        """Flush, and send what is stuck to /dev/null: Python flushes again at exit, and fails if that does."""
        self.error, before = None, self.error
        self.flush()
        if self.error is not None:
            with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
                self._stream.flush()
        self.error = self.error or before


@contextlib.contextmanager
def unfailing_streams() -> Iterator[Unfailing]:
    """Make stdout and stderr `Unfailing` for the block; yields stdout."""
    out, err = Unfailing(sys.stdout), Unfailing(sys.stderr)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield out
    finally:
        out.close()
        err.close()
