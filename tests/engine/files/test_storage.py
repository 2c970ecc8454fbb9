"""Storage faults are distinguished from faults of one file, and reported in one line."""

import errno
import os
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.files.storage import (
    FolderGoneError,
    describe_remedy,
    is_storage_fault,
    names_storage_fault,
    writing_to,
)
from engine.files.whole import WriteError

STORAGE = (
    "ENOSPC EDQUOT EPERM EACCES EROFS EIO ENXIO ENODEV ESTALE ETIMEDOUT EREMOTEIO ENOTCONN ESHUTDOWN EHOSTDOWN EUCLEAN"
).split()
OTHERS = (
    "ENOENT ENOTDIR EISDIR EEXIST ENAMETOOLONG ELOOP EINVAL EMFILE ENFILE ENOMEM EAGAIN EINTR ENOTEMPTY EPIPE".split()
)


def fault(name: str, path: str | None = None) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), *([path] if path is not None else []))


@pytest.mark.parametrize("name", STORAGE)
def test_a_fault_of_the_storage_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        with writing_to(tmp_path, after="the same command continues"):
            raise fault(name, "a.mp4")
    line = str(caught.value)
    assert line.startswith(f"cannot write to {tmp_path}: {os.strerror(getattr(errno, name))}")
    assert line.endswith("; the same command continues")
    assert "\n" not in line
    full = name in ("ENOSPC", "EDQUOT")
    assert (" bytes are free); free some space, or " in line) == full
    assert ("a.mp4" in line) != full
    # Another rank hears of it as text, with or without the number.
    assert names_storage_fault(f"rank 1: {fault(name, 'a.mp4')}")
    assert is_storage_fault(WriteError(getattr(errno, name), os.strerror(getattr(errno, name)), "a.mp4"))


@pytest.mark.parametrize("name", OTHERS)
def test_a_fault_of_one_file_or_of_the_process_passes(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match=os.strerror(getattr(errno, name))) as caught:
        with writing_to(tmp_path, after="go on"):
            raise fault(name)
    assert not is_storage_fault(caught.value)
    assert not names_storage_fault(str(caught.value))


def test_the_line_needs_nothing_of_a_storage_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown bytes are free"):
        with writing_to(tmp_path / "gone", after="go on"):
            raise fault("ENOSPC")


def test_libraries_that_set_no_number_are_understood_by_their_words() -> None:
    assert is_storage_fault(OSError("Stale file handle (os error 116)"))
    assert not is_storage_fault(OSError("a.mp4 decodes to 3 frames, not 17"))
    assert not is_storage_fault(ValueError("Stale file handle"))
    assert is_storage_fault(FolderGoneError(errno.ENOENT, "gone", "out"))
    assert describe_remedy("No space left on device") == "free some space"
    assert describe_remedy("Stale file handle").startswith("see that the folder can be read")
