"""Folders of frames, as videos are written to: the names of the files, and whether a folder holds anything else."""

import re
from pathlib import Path

_FRAME = re.compile(r"\d{6,}\.png")


def frame_name(index: int) -> str:
    """`000007.png`; names sort as frames do, up to a million of them."""
    return f"{index:06d}.png"


def foreign_entry(folder: Path) -> str | None:
    """The name of something in a folder that is no frame; None if there is none, so that the folder may be replaced."""
    return next((path.name for path in sorted(folder.iterdir()) if not is_frame(path)), None)


def is_frame(path: Path) -> bool:
    """Whether a path is a file with the name of a frame."""
    return _FRAME.fullmatch(path.name) is not None and path.is_file()


def is_empty_folder(path: Path) -> bool:
    """Whether there is a folder of this name with nothing in it; a link to one is none."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
