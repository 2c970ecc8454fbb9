"""Folders of frames: the names of frames, and whether a folder holds anything else."""

import re
from pathlib import Path

_FRAME = re.compile(r"\d{6,}\.png")


def frame_name(index: int) -> str:
    """`000007.png`; names sort as frames do, up to a million of them."""
    return f"{index:06d}.png"


def foreign_entry(folder: Path) -> str | None:
    """The name of an entry that is not a frame; None if there is none, so that the folder may be replaced."""
    return next((path.name for path in sorted(folder.iterdir()) if not is_frame(path)), None)


def is_frame(path: Path) -> bool:
    """Whether a path is a file with the name of a frame."""
    return _FRAME.fullmatch(path.name) is not None and path.is_file()


def is_empty_folder(path: Path) -> bool:
    """Whether the path is an empty folder, and not a link to one."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
