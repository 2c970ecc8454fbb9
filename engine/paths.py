"""Paths as users write them, and the revision of a checkout."""

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import UserError

# The checkout, or the folder of installed packages.
REPOSITORY = Path(__file__).resolve().parent.parent
_INSTALLED = Path(__file__).resolve().parent / "shipped"
# What has configs/ and the weights in tiny/: a folder of the installed library (setup.py), or the checkout. The folder of installed
# packages may have a configs/ of another package.
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else REPOSITORY
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def expand(path: str) -> Path:
    """Expand ~ in a user's path; UserError for the ~ of an unknown user, and for a zero byte."""
    if "\0" in path:
        raise UserError(f"the path {path[:60]!r} has a zero byte, which no file name has")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"cannot resolve {path!r}: {error}") from error


@contextlib.contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Raise UserError, `what` and the reason, for a file that the block cannot look for or read: no permission, too long a name."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what:.200}: {error.strerror}") from error


def find_file(path: str) -> Path:
    """Find a file in the working directory, or among those that come with the program (`configs/prompts/...`)."""
    own = expand(path)
    try:
        shipped = SHIPPED / own
        return shipped if not own.exists() and shipped.is_file() else own
    except OSError:  # name too long, no permission: reading the file reports it
        return own


def find_checkpoint(path: str) -> Path | str:
    """Resolve `model.path`: a folder (of the working directory, then of the repository), or a hub name."""
    with failing_as(f"cannot look for model.path {path}"):
        for folder in (expand(path), SHIPPED / path):
            if folder.is_dir():
                return folder
        is_file = expand(path).is_file()
    if is_file and is_pickle(path):
        raise UserError(f"model.path {path} is a pickle, which can run code and is not read; give .safetensors files")
    if is_file:
        raise UserError(
            f"model.path {path} is one file; give it as model.single_file, and a folder or hub name as model.path"
        )
    if not _HUB_NAME.fullmatch(path):
        raise UserError(
            f"model.path {path!r} is neither a folder here nor a hub name; give a folder in Diffusers layout"
        )
    return path


def is_pickle(name: str) -> bool:
    """Whether a file name ends like a pickle, which can run code when it is loaded."""
    return name.lower().endswith(_PICKLES)


def git_revision(checkout: Path) -> dict[str, Any] | None:
    """Commit of a git checkout and whether tracked files differ from it; None where git cannot tell."""
    if shutil.which("git") is None or not (checkout / ".git").exists():
        return None
    revision, status = (
        subprocess.run(["git", "-C", str(checkout), *command], capture_output=True, text=True, check=False)
        for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    )
    if revision.returncode or status.returncode:
        return None
    return {"revision": revision.stdout.strip(), "modified": bool(status.stdout.strip())}
