"""Tell a fault of the storage, which every other file would meet too, from the fault of one file."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engine.errors import UserError

# No room for more bytes.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

# Forbidden; read-only by now; a device or a server that does not answer, or has lost what it had opened (NFS, SMB, FUSE, Lustre);
# a damaged file system. Of one file are names (ENOENT, ENOTDIR, EISDIR, EEXIST, ENAMETOOLONG, ELOOP) and EINVAL; of the
# process are EMFILE, ENFILE, ENOMEM, EAGAIN and EINTR. Linux has some that other systems lack.
_NAMES = (
    "EPERM EACCES EROFS EIO ENXIO ENODEV ENOMEDIUM EREMOTEIO EUCLEAN "
    "ESTALE ETIMEDOUT ENOTCONN ESHUTDOWN EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENOLINK ECONNABORTED"
)
STORAGE_ERRORS = FULL | {getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name)}


REMEDY_FULL = "free some space"


class FolderGoneError(OSError):
    """A folder that must exist does not any more: its file system is not mounted, or it was deleted."""


def is_storage_fault(error: BaseException) -> bool:
    """Whether an exception is a fault of the storage, by its class and errno, or by its words where a library sets none."""
    if not isinstance(error, OSError) or isinstance(error, FolderGoneError):
        return isinstance(error, OSError)
    return error.errno in STORAGE_ERRORS if error.errno is not None else names_storage_fault(str(error))


def names_storage_fault(message: str) -> bool:
    """Whether a message was made of such an exception, by its words: other ranks hear of it as text."""
    return any(os.strerror(number) in message for number in STORAGE_ERRORS)


def describe_remedy(message: str) -> str:
    """What to do about the storage fault that a message names."""
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
