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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from engine.errors import UserError

Verify = Literal["size", "full"]

# A disk that takes nothing more: full, over a quota, or read-only by now.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

# What a JSON file must hold to be what it is taken for: the type at each dotted key.
Shape = dict[str, type | UnionType]


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
    """The content of a JSON file, or None if there is none; UserError for one that cannot be read or is something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; mend it, or give another place") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; move it away") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); move it away") from error


def read_tree(path: Path, shape: Shape, *, what: str) -> dict[str, Any] | None:
    """`read_json` of a file that must hold `shape`; UserError, which calls it no `what`, for one that does not."""
    tree = read_json(path)
    if tree is not None:
        check_tree(path, tree, shape, what=what)
    return tree


def check_tree(path: Path, tree: Any, shape: Shape, *, what: str) -> None:
    """Raise UserError, which names the file and calls it no `what`, unless the tree that was read from it holds `shape`."""
    if (wrong := lacking(tree, shape)) is not None:
        raise UserError(f"{path} is not {what}: {wrong}; move it away")


def lacking(tree: Any, shape: Shape) -> str | None:
    """What is wrong with the first key of `shape` that a tree has not, or not with this type; None if there is none."""
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


def is_done(sidecar: Path, identity: str, *, verify: Verify = "size", key: str = "item_id") -> bool:
    """Whether a sidecar says that this very result is whole, and the file beside it is the one that it means.

    `sidecar[key]` is the identity by content, `sidecar["output"]` the `FileFacts` of a file in the same folder; `size`
    compares its length, `full` its SHA-256 as well. A file that is missing or differs counts as not done. Raises UserError
    if the sidecar belongs to another result: the place is taken, and nothing of it is replaced.
    """
    shape = {key: str, "output.file": str, "output.bytes": int, "output.sha256": str}
    tree = read_tree(sidecar, shape, what="the sidecar of a result")
    if tree is None:
        return False
    if tree[key] != identity:
        raise UserError(
            f"{sidecar} belongs to another result ({key} {tree[key]}, not {identity}); choose another output folder"
        )
    output = tree["output"]
    path = beside(sidecar, output["file"])
    if not path.is_file() or path.stat().st_size != output["bytes"]:
        return False
    return verify == "size" or file_sha256(path) == output["sha256"]


def beside(sidecar: Path, name: str) -> Path:
    """The file that a sidecar names, which lies in its folder; UserError for a name that leads out of it."""
    if Path(name).name != name:
        raise UserError(f"{sidecar} names the file {name!r:.60}, which is not beside it; move it away")
    return sidecar.with_name(name)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What became of the sidecars of a folder: lines that were written, and why files that are no sidecars have none."""

    rows: int
    left_out: tuple[str, ...]


def compile_manifest(path: Path, sidecars: Iterable[Path], row: Callable[[Path], dict[str, Any]]) -> Manifest:
    """Write one JSON line `row(path)` per sidecar, sorted, so that the same sidecars give the same bytes.

    A file of which `row` raises UserError has no line: what was made is in the manifest whatever else lies in the folder.
    One process at a time may do this: see `engine.batch.locks`.
    """
    lines, left_out = [], []
    for sidecar in sidecars:
        try:
            lines.append(json.dumps(row(sidecar), sort_keys=True, allow_nan=False, ensure_ascii=False))
        except UserError as error:
            left_out.append(str(error))
    write_text(path, "".join(f"{line}\n" for line in sorted(lines)))
    return Manifest(rows=len(lines), left_out=tuple(sorted(left_out)))


def sweep(folder: Path, *, older_than: float) -> list[Path]:
    """Delete the `.part` files in a folder that nobody has written to for so many seconds: killed processes left them."""
    before = time.time() - older_than
    left = []
    for part in sorted(folder.glob("*.part")):
        with contextlib.suppress(FileNotFoundError):  # whoever writes it has just given it its name
            if part.stat().st_mtime < before:
                left.append(part)
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
