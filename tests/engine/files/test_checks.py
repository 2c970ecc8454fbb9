"""What would fail after hours is found before: folders, names and free space."""

import os
import shutil
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.files.checks import check_places, check_space
from engine.files.whole import part_path, write_text
from engine.shown import describe_size


def test_a_place_that_can_be_written_to_is_left_as_it_was(tmp_path: Path) -> None:
    check_places([tmp_path / "new" / "a.mp4", tmp_path / "b"])
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]


def test_the_longest_name_is_that_of_the_temporary_file(tmp_path: Path) -> None:
    """A name that fits is written in the end; one byte more is refused at the start, which would not have been written."""
    most = os.pathconf(tmp_path, "PC_NAME_MAX")
    room = most - len(part_path(tmp_path / "x").name) + 1
    name = "é" * (room // 2) + "x" * (room % 2)
    check_places([tmp_path / name])
    write_text(tmp_path / name, "whole")
    with pytest.raises(
        UserError, match=rf"it has {most + 1} bytes, and names in .* at most {most}; .* 1 bytes shorter"
    ):
        check_places([tmp_path / f"{name}x"])
    with pytest.raises(OSError, match="File name too long"):
        write_text(tmp_path / f"{name}x", "whole")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("file/a", "cannot write to the folder .*/file: "),
        ("/proc/none/a", "cannot write to the folder /proc/none: "),
        ("/proc/a", "cannot write /proc/a: "),
        ("folder", "folder is a folder; give the name of a file"),
    ],
)
def test_places_that_cannot_be_written_to(tmp_path: Path, path: str, words: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=words):
        check_places([tmp_path / path])


def test_a_folder_of_frames_may_be_new_empty_or_hold_frames(tmp_path: Path) -> None:
    path = tmp_path / "frames"
    check_places([path], folders=[path])
    path.mkdir()
    check_places([path], folders=[path])
    (path / "000000.png").touch()
    check_places([path], folders=[path])
    (path / "holiday.png").touch()
    with pytest.raises(
        UserError, match=r"frames holds holiday\.png, which is not a frame of a video; give the name of a new"
    ):
        check_places([path], folders=[path])
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(path)
    for name, what in (("file", "a file"), ("link", "a link")):
        with pytest.raises(UserError, match=f"{name} is {what}; give the name of a folder"):
            check_places([tmp_path / name], folders=[tmp_path / name])


def test_files_on_one_disk_need_their_sum(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    (tmp_path / "x").mkdir()
    check_space({tmp_path / "a": free // 4, tmp_path / "x/b": free // 4}, what="the video")
    with pytest.raises(UserError, match=r" has .* free, and at least .* are needed for the video; free some space, or"):
        check_space({tmp_path / "a": free, tmp_path / "x/b": free}, what="the video")


def test_sizes_in_words() -> None:
    assert [describe_size(n) for n in (17, 3 * 2**10, 20 * 2**20, 1.5 * 2**30)] == [
        "17 bytes",
        "3.0 KiB",
        "20.0 MiB",
        "1.5 GiB",
    ]
