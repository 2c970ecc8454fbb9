"""Publish results with a sidecar that is written last, and compile a manifest from the sidecars.

A result is written to a temporary file, checked, hashed, flushed and renamed; then its sidecar, a small JSON file, is.
Whenever a process is killed, a sidecar exists only beside a complete result, and a result without one is made again.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.errors import UserError
from engine.files import whole
from engine.files.trees import DamagedError, Shape, read_kept
from engine.files.whole import file_sha256, write_text
from engine.shown import Say, say_on_stderr

Verify = Literal["size", "full"]


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """A published file: its name, its size in bytes and its SHA-256."""

    file: str
    bytes: int
    sha256: str


def publish(part: Path, final: Path, *, check: Callable[[Path], None]) -> FileFacts:
    """Rename a written `.part` file to its final name after `check(part)`, which raises for a broken file.

    Both lie in one folder. The bytes are flushed before the name, so that a power cut leaves no empty file.
    """
    check(part)
    facts = FileFacts(file=final.name, bytes=part.stat().st_size, sha256=file_sha256(part))
    whole.publish(part, final)
    return facts


def is_done(
    sidecar: Path,
    identity: str,
    *,
    verify: Verify = "size",
    key: str = "item_id",
    shape: Shape | None = None,
    say: Say = say_on_stderr,
) -> bool:
    """Whether a sidecar has this identity, and the file beside it is the one that it describes.

    `sidecar[key]` is the identity by content, `sidecar["output"]` the `FileFacts` of a file in the same folder; `size`
    compares its length, `full` its SHA-256 as well. A file that is missing or differs counts as not done, and so does a
    sidecar that is damaged or lacks a key of `shape`; `say` receives a line about a file that is made again.

    Raises:
        UserError: the sidecar belongs to another result, which is not replaced.
    """
    needed = {key: str, "output.file": str, "output.bytes": int, "output.sha256": str} | (shape or {})
    tree = read_kept(sidecar, needed, what="the sidecar of a result", say=say)
    if tree is None:
        return False
    if tree[key] != identity:
        raise UserError(
            f"{sidecar} belongs to another result ({key} {tree[key]}, not {identity}); choose another output folder"
        )
    output = tree["output"]
    try:
        path = beside(sidecar, output["file"])
    except DamagedError as error:
        say(f"{error.reason}; it is made again")
        return False
    if not path.is_file():
        return False
    same_size = path.stat().st_size == output["bytes"]
    if same_size and (verify == "size" or file_sha256(path) == output["sha256"]):
        return True
    say(f"{path} is not the file that its sidecar describes; it is made again")
    return False


def beside(sidecar: Path, name: str) -> Path:
    """Return the file that a sidecar names; DamagedError for a name outside its folder."""
    if Path(name).name != name:
        raise DamagedError(f"{sidecar} names the file {name!r:.60}, which is not beside it")
    return sidecar.with_name(name)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The number of rows, and the reason for each file without a row."""

    rows: int
    left_out: tuple[str, ...]


def compile_manifest(path: Path, sidecars: Iterable[Path], row: Callable[[Path], dict[str, Any]]) -> Manifest:
    """Write one JSON line `row(path)` per sidecar, sorted, so that the same sidecars give the same bytes.

    A file for which `row` raises UserError is left out. Only one process at a time may do this; see `engine.batch.locks`.
    """
    lines, left_out = [], []
    for sidecar in sidecars:
        try:
            lines.append(json.dumps(row(sidecar), sort_keys=True, allow_nan=False, ensure_ascii=False))
        except UserError as error:
            left_out.append(str(error))
    write_text(path, "".join(f"{line}\n" for line in sorted(lines)))
    return Manifest(rows=len(lines), left_out=tuple(sorted(left_out)))
