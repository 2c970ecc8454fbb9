"""Files that are whole or absent: results under their name with a sidecar that is written last, and a compiled manifest.

The order of writing is the whole idea. A result goes to a `.part` file, is checked, hashed, flushed to the disk and
renamed; its sidecar, a small JSON file, follows in the same way. Whatever moment a process is killed at, a sidecar only
ever stands beside a whole result, and a result without a sidecar counts as missing.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.errors import UserError

Verify = Literal["size", "full"]

# A disk that takes nothing more: full, over a quota, or read-only by now.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """A published file: its name, its size in bytes and its SHA-256."""

    file: str
    bytes: int
    sha256: str


def publish(part: Path, final: Path, *, check: Callable[[Path], None]) -> FileFacts:
    """Give a written `.part` file its name, after `check(part)`, which raises if the file is not what it should be.

    Both lie in one folder. The bytes are on the disk before the name is, so that a power cut leaves no empty file behind.
    """
    check(part)
    facts = FileFacts(file=final.name, bytes=part.stat().st_size, sha256=file_sha256(part))
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(final)
    sync_folder(final.parent)
    return facts


def write_json(path: Path, tree: Any, *, token: str | None = None) -> None:
    """Write JSON, whole or not at all; nan and infinity are a ValueError. See `write_text`."""
    write_text(path, json.dumps(tree, indent=2, allow_nan=False, ensure_ascii=False) + "\n", token=token)


def write_text(path: Path, text: str, *, token: str | None = None) -> None:
    """Write a text, whole or not at all, and flush it to the disk.

    One writer at a time, unless each has a token of its own, which keeps their unfinished files apart.
    """
    part = path.with_name(f"{path.name}.part" if token is None else f"{path.name}.{token}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None if there is none; UserError for a file that is something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; move it away") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); move it away") from error


def is_done(sidecar: Path, identity: str, *, verify: Verify = "size", key: str = "item_id") -> bool:
    """Whether a sidecar says that this very result is whole, and the file beside it is the one that it means.

    `sidecar[key]` is the identity by content, `sidecar["output"]` the `FileFacts` of a file in the same folder; `size`
    compares its length, `full` its SHA-256 as well. A file that is missing or differs counts as not done. Raises UserError
    if the sidecar belongs to another result: the place is taken, and nothing of it is replaced.
    """
    tree = read_json(sidecar)
    if tree is None:
        return False
    if tree.get(key) != identity:
        raise UserError(
            f"{sidecar} belongs to another result ({key} {tree.get(key)}, not {identity}); choose another output folder"
        )
    output = tree["output"]
    path = sidecar.with_name(output["file"])
    if not path.is_file() or path.stat().st_size != output["bytes"]:
        return False
    return verify == "size" or file_sha256(path) == output["sha256"]


def compile_manifest(path: Path, sidecars: Iterable[Path], row: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Write one JSON line `row(sidecar)` per sidecar, sorted, so that the same sidecars give the same bytes; returns how many.

    One process at a time may do this: see `engine.batch.locks`.
    """
    lines = sorted(
        json.dumps(row(read_json(sidecar)), sort_keys=True, allow_nan=False, ensure_ascii=False) for sidecar in sidecars
    )
    write_text(path, "".join(f"{line}\n" for line in lines))
    return len(lines)


def sweep(folder: Path) -> list[Path]:
    """Delete the `.part` files below a folder, which killed processes left; returns them. Nobody may be writing there."""
    left = sorted(folder.rglob("*.part"))
    for part in left:
        part.unlink(missing_ok=True)
    return left


@contextlib.contextmanager
def writing_to(root: Path, *, after: str) -> Iterator[None]:
    """Turn an OSError of a disk that takes nothing more into a UserError of one line, which ends with `after`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        free = shutil.disk_usage(root).free
        raise UserError(f"cannot write to {root}: {error.strerror} ({free} bytes are free); {after}") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk; a file system that cannot, says so and is left alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; nothing if there is no file. A last line that was cut is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
