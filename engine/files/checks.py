"""Check, before anything is computed, that files can be written: folders, names and free space."""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from engine.errors import UserError
from engine.files.folders import foreign_entry
from engine.files.trees import read_json
from engine.files.whole import part_path
from engine.shown import describe_size


def check_places(paths: Iterable[Path], *, folders: Collection[Path] = ()) -> None:
    """Make the folders of files, and write and delete a temporary file for each, under its longest name.

    `folders` are those of the paths that will be folders of frames.

    Raises:
        UserError: a folder cannot be made or written to, a name is too long, a path is a folder where a file is expected, or a
            folder of frames is a file, a link, or holds other files.
    """
    for path in paths:
        folder, part = path.parent, part_path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from error
        _check_name(path, part)
        try:
            if path in folders:
                _check_folder(path)
            elif path.is_dir():
                raise UserError(f"{path} is a folder; give the name of a file")
            try:
                part.touch(exist_ok=False)
            finally:
                with contextlib.suppress(OSError):
                    part.unlink()
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error


def make_folder(root: Path) -> None:
    """Make the output folder; UserError if it cannot be written to."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".{os.getpid()}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to the folder {root}: {error.strerror}") from error


def _check_folder(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise UserError(f"{path} is {'a link' if path.is_symlink() else 'a file'}; give the name of a folder of frames")
    if (name := foreign_entry(path)) is not None:
        raise UserError(f"{path} holds {name}, which is not a frame of a video; give the name of a new folder")


def _check_name(path: Path, part: Path) -> None:
    try:
        most = os.pathconf(path.parent, "PC_NAME_MAX")
    except (OSError, ValueError):  # unknown on this file system; writing reports it
        return
    size = len(os.fsencode(part.name))
    if size > most:
        raise UserError(
            f"cannot write {path}: File name too long: with the ending of a temporary file it has {size} bytes, and names in "
            f"{path.parent} have at most {most}; choose a name that is {size - most} bytes shorter"
        )


# Lower bound of a video's size, for hardly any motion or detail.
_LEAST_BITS_PER_PIXEL = {"mp4": 0.02, "webp": 0.02, "gif": 0.1, "png": 0.2}


def least_video_bytes(num_frames: int, height: int, width: int, *, kind: str = "mp4") -> int:
    """Lower bound of the bytes of a video file, or of its folder of frames."""
    return round(_LEAST_BITS_PER_PIXEL[kind] / 8 * num_frames * height * width)


def snapshot_bytes(model: Path, latents: int) -> int:
    """Bytes of a run's state: its latents, and the samples and predictions that the solver keeps.

    Their number follows from the scheduler's configuration in the folder of the model.
    """
    config = read_json(model / "scheduler/scheduler_config.json")
    if not isinstance(config, dict) or not isinstance(config.get("solver_order"), int):
        return latents  # a single-step solver
    samples = 2 if "UniPC" in str(config.get("_class_name")) else 1
    return latents * (samples + max(1, config["solver_order"]))


def check_space(needed: Mapping[Path, int], *, what: str) -> None:
    """Raise UserError unless the disks have the bytes that files in existing folders need at least; `what` names them."""
    by_disk: dict[int, tuple[Path, int]] = {}
    for path, size in needed.items():
        disk = path.parent.stat().st_dev
        first, total = by_disk.get(disk, (path.parent, 0))
        by_disk[disk] = first, total + size
    for folder, total in by_disk.values():
        free = shutil.disk_usage(folder).free
        if free < total:
            raise UserError(
                f"{folder} has {describe_size(free)} free, and at least {describe_size(total)} are needed for {what}; free some "
                "space, or choose another folder"
            )
