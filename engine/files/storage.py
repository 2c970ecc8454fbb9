"""Distinguish faults of the storage, which affect every file, from faults of one file."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engine.errors import UserError

# No room for more bytes.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

# No permission; remounted read-only; a device or server that does not answer, or lost its open files (NFS, SMB, FUSE, Lustre);
# a damaged file system. Not listed: errors of one file (ENOENT, ENOTDIR, EISDIR, EEXIST, ENAMETOOLONG, ELOOP, EINVAL) and of
# the process (EMFILE, ENFILE, ENOMEM, EAGAIN, EINTR). Some exist on Linux only.
_NAMES = (
    "EPERM EACCES EROFS EIO ENXIO ENODEV ENOMEDIUM EREMOTEIO EUCLEAN "
    "ESTALE ETIMEDOUT ENOTCONN ESHUTDOWN EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENOLINK ECONNABORTED"
)
STORAGE_ERRORS = FULL | {getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name)}


REMEDY_FULL = "free some space"


class FolderGoneError(OSError):
    """A required folder has disappeared: its file system is not mounted, or it was deleted."""


def is_storage_fault(error: BaseException) -> bool:
    """Whether an exception is a fault of the storage, by its class and errno, or by its message if a library sets none."""
    if not isinstance(error, OSError) or isinstance(error, FolderGoneError):
        return isinstance(error, OSError)
    return error.errno in STORAGE_ERRORS if error.errno is not None else names_storage_fault(str(error))


def names_storage_fault(message: str) -> bool:
    """Whether a message reports such an exception, since other ranks receive it as text."""
    return any(os.strerror(number) in message for number in STORAGE_ERRORS)


def describe_remedy(message: str) -> str:
    """The advice for the storage fault in a message."""
    if any(os.strerror(number) in message for number in FULL):
        return REMEDY_FULL
    return "see that the folder can be read and written again"


@contextlib.contextmanager
def writing_to(root: Path, *, after: str) -> Iterator[None]:
    """Turn a storage fault in the block into a UserError of one line, which ends with `after`."""
    try:
        yield
    except OSError as error:
        if not is_storage_fault(error):
            raise
        what = error.strerror or str(error)
        if error.errno in FULL:
            what += f" ({_free_bytes(root)} bytes are free)"
        elif error.filename is not None:
            what += f": {error.filename}"
        message = f"cannot write to {root}: {what}; {describe_remedy(what)}, or choose another folder; {after}"
        raise UserError(message) from error


def _free_bytes(root: Path) -> int | str:
    try:
        return shutil.disk_usage(root).free
    except OSError:
        return "unknown"
