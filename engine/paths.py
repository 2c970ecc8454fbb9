"""Paths as users write them."""

import re
from pathlib import Path

from engine.errors import UserError

# The checkout, or the folder of installed packages, which has configs/ and tiny/ as well.
REPOSITORY = Path(__file__).resolve().parent.parent
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def expand(path: str) -> Path:
    """A path of the user's, with ~ resolved; UserError for the ~ of a user that does not exist, and for a zero byte."""
    if "\0" in path:
        raise UserError(f"the path {path[:60]!r} has a zero byte, which no file name has")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"cannot resolve {path!r}: {error}") from error


def find_file(path: str) -> Path:
    """A file of the user's, from the working directory, or of that name among those that come with the program (`configs/prompts/...`)."""
    own = expand(path)
    try:
        shipped = REPOSITORY / own
        return shipped if not own.exists() and shipped.is_file() else own
    except OSError:  # a name too long, no permission: reading it says so
        return own


def find_checkpoint(path: str) -> Path | str:
    """A folder (from the working directory, then from the repository), or a hub name."""
    try:
        for folder in (expand(path), REPOSITORY / path):
            if folder.is_dir():
                return folder
        is_file = expand(path).is_file()
    except OSError as error:  # no permission, a name too long
        raise UserError(f"cannot look for model.path {path!r}: {error}") from error
    if is_file and is_pickle(path):
        raise UserError(f"model.path {path} is a pickle, which can run code and is not read; give .safetensors files")
    if is_file:
        raise UserError(
            f"model.path {path} is one file; give it as model.single_file, and a folder or hub name as model.path"
        )
    if not _HUB_NAME.fullmatch(path):
        raise UserError(f"model.path {path!r} is no folder here and no hub name; give a folder in Diffusers layout")
    return path


def is_pickle(name: str) -> bool:
    """Whether a file's name says that it is a pickle, which can run code when it is read."""
    return name.lower().endswith(_PICKLES)
