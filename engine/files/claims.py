"""Claim the files that a run will write, so that a second run with the same files fails before it computes anything.

Each folder has one claim file per run, which lists the names; it is a lock file (engine.files.locks), so that claims of dead
processes are taken over. A file is claimed in its resolved folder, so every path to that folder finds the same claim.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.errors import UserError
from engine.files.locks import HeldError, hold, holder_of, locked
from engine.files.whole import describe_error, sweep
from engine.shown import Say, say_on_stderr


@contextlib.contextmanager
def claim(paths: Sequence[Path], *, advice: str, say: Say = say_on_stderr) -> Iterator[None]:
    """Claim files in existing folders for the block, and delete their temporary files that killed processes left.

    Args:
        paths: the files, which need not exist.
        advice: what to do instead, for the error.
        say: see `engine.files.locks.hold`.

    Raises:
        UserError: another process has claimed one of them, or a folder cannot be written to.
    """
    folders: dict[Path, set[str]] = {}
    for path in paths:
        folders.setdefault(path.parent.resolve(), set()).add(path.name)
    with contextlib.ExitStack() as stack:
        for folder, names in sorted(folders.items()):
            try:
                with locked(folder / ".claims.lock"):
                    _check_free(folder, names, paths, advice, say)
                    own = folder / f".{os.getpid()}-{secrets.token_hex(4)}.claim"
                    stack.enter_context(hold(own, say=say, files=sorted(names)))
                sweep(folder, names)
            except OSError as error:
                raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from error
        yield


@contextlib.contextmanager
def writing_report(folder: Path) -> Iterator[None]:
    """Hold the lock of a report's folder for the block; UserError for a file that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".report.lock"):
            yield
    except OSError as error:
        raise UserError(describe_error(error, folder)) from error


def _check_free(folder: Path, names: set[str], paths: Sequence[Path], advice: str, say: Say) -> None:
    """Raise UserError if a live process has claimed one of the names; delete the claims of dead ones."""
    for other in sorted(folder.glob(".*.claim")):
        try:
            if (holder := holder_of(other)) is not None and names & {*holder.files}:
                holder = holder_of(other, say=say)  # wait for a holder on another machine only if the names overlap
        except HeldError as error:  # it has not written its names yet
            raise UserError(f"{error.who} is starting in {folder}; try again in a moment, or {advice}") from error
        if holder is None:
            other.unlink(missing_ok=True)
        elif both := names & {*holder.files}:
            path = next(path for path in paths if path.name in both and path.parent.resolve() == folder)
            raise UserError(f"{path} is being made by {holder}; wait for it, or {advice}")
