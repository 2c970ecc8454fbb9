"""Safetensors files without torch: their metadata, and snapshots under their former name."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from engine.files.trees import DamagedError

# Raised by safetensors for a damaged file; the last four for a dtype or shape that torch lacks.
DAMAGED = (SafetensorError, ValueError, LookupError, AttributeError, TypeError)

_SNAPSHOT = ".snapshot.safetensors"
FORMER_ENDING = ".checkpoint.safetensors"  # of snapshots, in older versions
_MOST_HEADER_BYTES = 100 << 20  # the library's limit


def read_metadata(path: Path) -> dict[str, str] | None:
    """Return the metadata of a safetensors file, or None if there is no file.

    Raises:
        DamagedError: the file is of another kind, or was cut.
        OSError: it cannot be read.
    """
    if not os.path.lexists(path):
        return None
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MOST_HEADER_BYTES:
                raise ValueError("its header is too long")
            header: dict[str, Any] = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
            if os.fstat(file.fileno()).st_size != 8 + length + end:
                raise ValueError(f"it has {os.fstat(file.fileno()).st_size} of {8 + length + end} bytes")
            return {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, FileNotFoundError) as error:
        why = error if isinstance(error, ValueError) and not isinstance(error, UnicodeDecodeError) else "no header"
        raise DamagedError(f"{path} is not a whole safetensors file ({why})") from error


def former_name(path: Path) -> Path:
    """`NAME.checkpoint.safetensors`, which older versions called the snapshot `NAME.snapshot.safetensors`."""
    return path.with_name(path.name.removesuffix(_SNAPSHOT) + FORMER_ENDING)


def take_former_name(path: Path) -> str | None:
    """Rename the snapshot `path` of an older version, unless `path` exists; returns why a file of the former name is left alone."""
    former = former_name(path)
    if not path.name.endswith(_SNAPSHOT) or path.exists() or not former.is_file():
        return None
    try:
        metadata = read_metadata(former) or {}
    except DamagedError as error:  # nothing but its name shows whose it is
        return str(error)
    if not metadata.keys() >= {"run_id", "step"}:
        return f"{former} is not the snapshot of a run; move it away"
    former.rename(path)
    return None
