"""Download a checkpoint's files from the hub."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import errors as hub_errors
from huggingface_hub import hf_hub_download, snapshot_download

from engine.errors import UserError, first_line

# Raised by newer versions of the hub's client; older ones return a partial folder, which the checks of the folder report.
_INCOMPLETE: tuple[type[Exception], ...] = tuple(filter(None, [getattr(hub_errors, "IncompleteSnapshotError", None)]))

_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/(.+)")

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes of a published file that are read; those of others need scales that diffusers would not apply."""


def fetch(source: Path | str, revision: str | None, *, parts: Sequence[str], offline: bool = False) -> Path:
    """Return the folder of a checkpoint: a local folder as it is, or the local copy of a hub name, completed by a download.

    Fetches JSON files, the weights of `parts`, and with the text encoder its tokenizer; nothing with `offline`. Raises
    UserError if the hub does not know the name, or cannot be reached and there is no local copy.
    """
    if isinstance(source, Path):
        if revision is not None:
            raise UserError(
                f"model.revision {revision!r} requires a hub name, and {source} is a folder; leave it unset"
            )
        return source
    patterns = ["*.json", *(f"{part}/*.safetensors" for part in parts)]
    patterns += ["tokenizer/*.model", "tokenizer/*.txt"] if {"text_encoder", "tokenizer"} & set(parts) else []
    try:
        with quiet("huggingface_hub"):
            return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except (OSError, ValueError) as error:  # base classes of all errors of huggingface_hub and its connections
        first = first_line(error)
        at = f" at revision {revision}" if revision else ""
        if isinstance(error, _INCOMPLETE):
            raise UserError(
                f"the local copy of {source!r}{at} is incomplete and the hub cannot be reached; finish the download "
                f"({type(error).__name__}: {first})"
            ) from error
        if offline:
            raise UserError(
                f"model.offline is true, and the hub's local copy does not hold {source!r}{at}; download it first"
            ) from error
        raise UserError(
            f"there is no folder {source!r} here, and the hub has no such checkpoint{at} or cannot be reached "
            f"({type(error).__name__}: {first})"
        ) from error


def hub_file(name: str) -> tuple[str, str] | None:
    """Repository and file of ORGANISATION/NAME/FILE; None for another name."""
    found = _HUB_FILE.fullmatch(name)
    return None if found is None else (found[1], found[2])


def fetch_file(repository: str, file: str, *, what: str, offline: bool) -> Path:
    """Return the local copy of a file of the hub, downloaded unless `offline`; UserError, which begins with `what`, without one."""
    try:
        with quiet("huggingface_hub"):
            return Path(hf_hub_download(repository, file, local_files_only=offline))
    except (OSError, ValueError) as error:
        how = "model.offline is true, and it is not in the hub's local copy" if offline else first_line(error)
        raise UserError(f"{what} is not a file here, and the hub does not have it ({how})") from error


def commit_of(path: Path) -> str:
    """The commit of a file in the hub's local copy, .../snapshots/COMMIT/..."""
    return path.parts[path.parts.index("snapshots") + 1]


@contextmanager
def quiet(library: str, *, below: int = logging.ERROR) -> Iterator[None]:
    """Silence a library's messages below a level: they would precede the one line of our error, or say less than ours."""
    log = logging.getLogger(library)
    level = log.level
    log.setLevel(below)
    try:
        yield
    finally:
        log.setLevel(level)
