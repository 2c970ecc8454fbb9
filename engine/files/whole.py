"""Write a file, or a folder of frames, atomically: under a temporary name beside it, flushed to the disk, then renamed."""

import contextlib
import errno
import filecmp
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from engine.files.folders import foreign_entry, is_empty_folder
from engine.files.processes import is_running, this_place

# A live process writes to its temporary file more often than this; older files belong to killed processes.
DEAD_SECONDS = 24 * 3600.0

# The process id and namespace in the name of a temporary file.
_ENDING = re.compile(r"\.[^.]*\.part$")
_OWNER = re.compile(r"\.(\d+)-([0-9a-f]{8})-[0-9a-f]{6}\.part$")


class WriteError(OSError):
    """A file that could not be written: `filename` is its final name, `errno` and `strerror` say why."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


class TakenError(WriteError):
    """A file of this name has appeared, and may not be replaced."""


def describe_error(error: OSError, path: Path) -> str:
    """One line for the user: which file could not be written, or read, and why; `path` if the error names none."""
    if isinstance(error, WriteError):
        return str(error)
    reason = error.strerror or str(error) or type(error).__name__
    return f"cannot write {path}: {reason}" if error.filename is None else f"{error.filename}: {reason}"


@contextlib.contextmanager
def atomic_path(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, published when the block ends and deleted if it fails; the block may make it a folder.

    Every call uses a new temporary path, so that two processes never write to the same one. Temporary files of `path` that
    killed processes left are deleted, see `sweep`. Without `replace`, see `publish`.

    Raises:
        WriteError: the file system refuses the file.
        TakenError: without `replace`, another file has the name.
    """
    sweep(path.parent, (path.name,))
    part = part_path(path)
    try:
        yield part
        publish(part, path, replace=replace)
    except OSError as error:
        # An error about another file, such as one that was read, passes unchanged.
        named = part if error.filename is None else Path(os.fsdecode(error.filename))
        if isinstance(error, WriteError) or part not in (named, named.parent):
            raise
        raise WriteError(error.errno, error.strerror or str(error) or type(error).__name__, str(path)) from error
    finally:
        _remove(part)


def part_path(path: Path) -> Path:
    """Return a temporary path for `path` that no other call returns."""
    return path.with_name(f"{path.name}.{os.getpid()}-{this_place()}-{secrets.token_hex(3)}.part")


def publish(part: Path, path: Path, *, replace: bool = True) -> None:
    """Flush a written file, or folder of frames, beside `path` and give it that name.

    The content is flushed before the rename, so that a power cut leaves no empty file. Without `replace`, a file
    that has the name is left alone: TakenError, unless it holds the same bytes. A folder that holds anything but frames is
    never replaced.
    """
    if part.is_dir():
        _publish_folder(part, path, replace=replace)
        return
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    if replace:
        part.replace(path)
    else:
        _publish_new(part, path)
    sync_folder(path.parent)


def _publish_folder(part: Path, path: Path, *, replace: bool) -> None:
    for entry in part.iterdir():
        with entry.open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(part)
    if not os.path.lexists(path) or is_empty_folder(path):
        part.rename(path)  # fails if the folder was filled in between
    elif not path.is_dir() or path.is_symlink() or (foreign := foreign_entry(path)) is not None:
        what = (
            f"it holds {foreign}, which is not a frame"
            if path.is_dir() and not path.is_symlink()
            else "it is not a folder"
        )
        raise TakenError(errno.EEXIST, what, str(path))
    elif replace:
        old = part_path(path)
        path.rename(old)
        part.rename(path)
        shutil.rmtree(old)
    elif content_sha256(part) != content_sha256(path):
        raise TakenError(errno.EEXIST, "another folder of this name appeared meanwhile", str(path))
    sync_folder(path.parent)


def _remove(part: Path) -> None:
    """Delete a temporary file or folder, if it is there."""
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)


def _publish_new(part: Path, path: Path) -> None:
    try:
        os.link(part, path)  # fails if the name exists, where rename() would replace it
    except FileExistsError as error:
        _refuse_other(part, path, error)
    except OSError as error:
        # A file system without hard links. Claims (engine.files.claims) prevent races between our own runs.
        if os.path.lexists(path):
            _refuse_other(part, path, error)
        else:
            part.replace(path)


def _refuse_other(part: Path, path: Path, error: OSError) -> None:
    if not path.is_file() or not filecmp.cmp(part, path, shallow=False):
        raise TakenError(error.errno, "another file of this name appeared meanwhile", str(path)) from error


def sweep(folder: Path, names: Collection[str] | None = None) -> list[Path]:
    """Delete temporary files and folders (of these names) in a folder whose process has ended; returns them.

    Those of processes on other machines are deleted once they are a day old.
    """
    swept = []
    for part in sorted(folder.glob("*.part")):
        if names is not None and _ENDING.sub("", part.name) not in names:
            continue
        if part.is_dir() and not _OWNER.search(part.name):  # a user's folder
            continue
        with contextlib.suppress(FileNotFoundError):  # another process has published or deleted it meanwhile
            if _is_dead(part):
                _remove(part)
                swept.append(part)
    return swept


def _is_dead(part: Path) -> bool:
    owner = _OWNER.search(part.name)
    if owner is not None and owner[2] == this_place() and not is_running(int(owner[1])):
        return True
    return part.stat().st_mtime < time.time() - DEAD_SECONDS


def write_json(path: Path, tree: Any, *, replace: bool = True) -> None:
    """Write JSON atomically; nan and infinity are a ValueError."""
    write_text(path, json.dumps(tree, indent=2, allow_nan=False, ensure_ascii=False) + "\n", replace=replace)


def write_text(path: Path, text: str, *, replace: bool = True) -> None:
    """Write a text in UTF-8 atomically."""
    with atomic_path(path, replace=replace) as part:
        part.write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(path: Path) -> str:
    """SHA-256 of a file, or of what `sha256sum *` prints in a folder of files, in hex."""
    if not path.is_dir():
        return file_sha256(path)
    lines = [f"{content_sha256(entry)}  {entry.name}\n" for entry in sorted(path.iterdir())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def content_bytes(path: Path) -> int:
    """Size of a file, or of all files in a folder."""
    return sum(entry.stat().st_size for entry in path.iterdir()) if path.is_dir() else path.stat().st_size


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, if the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
