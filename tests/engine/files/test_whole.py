"""Files that are written whole or not at all, and never in place of one that may not be replaced."""

import errno
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.files import whole
from engine.files.processes import this_place
from engine.files.whole import (
    TakenError,
    WriteError,
    atomic_path,
    content_bytes,
    content_sha256,
    sweep,
    write_json,
    write_text,
)

ROOT = Path(__file__).parent.parent.parent.parent


def fail(number: int) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture(params=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with hard links, and one without."""
    if request.param == "no links":
        monkeypatch.setattr(os, "link", fail(errno.EPERM))


@pytest.mark.usefixtures("links")
def test_a_file_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(TakenError, match=f"cannot write {path}: another file of this name appeared meanwhile"):
        with atomic_path(path, replace=False) as part:
            part.write_text("mine")
            path.write_text("another's")
    assert path.read_text() == "another's"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_path(path) as part:  # the negative control: this one may
        part.write_text("mine")
    assert path.read_text() == "mine"


@pytest.mark.usefixtures("links")
@pytest.mark.parametrize("what", ["a folder", "a link that leads nowhere"])
def test_nor_is_anything_else_of_the_name(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a"
    path.mkdir() if what == "a folder" else path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(TakenError):
        write_text(path, "mine", replace=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert not path.is_file()


@pytest.mark.usefixtures("links")
def test_the_same_bytes_need_no_replacing(tmp_path: Path) -> None:
    """A run that was killed after it published a file makes the same one again."""
    path = tmp_path / "a"
    write_text(path, "mine", replace=False)
    first = path.stat().st_ino
    write_text(path, "mine", replace=False)
    assert path.stat().st_ino == first
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(os, "fsync", fail(errno.ENOSPC))
    with pytest.raises(WriteError) as caught:
        write_json(path, {"a": 2})
    assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert caught.value.errno == errno.ENOSPC
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_about_another_file_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        with atomic_path(tmp_path / "a"):
            (tmp_path / "weights").read_bytes()
    assert caught.value.filename == str(tmp_path / "weights")


def test_a_folder_that_is_missing_is_named_by_the_file(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"cannot write .*/none/a: No such file or directory"):
        write_text(tmp_path / "none" / "a", "mine")


def test_json_that_cannot_be_written_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_an_unfinished_file_belongs_to_one_call_and_old_ones_go(tmp_path: Path) -> None:
    """A rank that has lost its driver may still be writing when its successor begins."""
    path, strange = tmp_path / "p0000-s0.snapshot.safetensors", tmp_path / "other.snapshot.safetensors.1-a.part"
    old = path.with_name(f"{path.name}.1-a.part")
    for left in (old, strange):
        left.touch()
        os.utime(left, (0, 0))
    with atomic_path(path) as first:
        first.write_bytes(b"first")
        with atomic_path(path) as second:
            second.write_bytes(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert sorted(tmp_path.iterdir()) == sorted([path, strange])


def test_unfinished_files_of_processes_that_ended_are_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()

    def part(pid: int, place: str, age: float = 0.0) -> Path:
        path = tmp_path / f"a.mp4.{pid}-{place}-{secrets.token_hex(3)}.part"
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
        return path

    mine, elsewhere = part(os.getpid(), this_place()), part(dead.pid, "0" * 8)
    gone = [part(dead.pid, this_place()), part(dead.pid, "0" * 8, age=2 * whole.DEAD_SECONDS)]
    assert sorted(sweep(tmp_path)) == sorted(gone)
    assert sorted(tmp_path.iterdir()) == sorted([mine, elsewhere])


def test_the_name_says_who_writes(tmp_path: Path) -> None:
    """Killed in the middle of writing: the next writer of the file deletes what is left."""
    path = tmp_path / "a"
    code = f"""
import os, pathlib
from engine.files.whole import atomic_path
with atomic_path(pathlib.Path({str(path)!r})) as part:
    part.write_text("half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("a.")
    write_text(path, "whole")
    assert list(tmp_path.iterdir()) == [path]


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    real = {"fsync": os.fsync, "sync_folder": whole.sync_folder}

    def note(name: str) -> Callable[..., None]:
        def call(*args: object) -> None:
            seen.append((name, (tmp_path / "a").exists()))
            real[name](*args)

        return call

    monkeypatch.setattr(os, "fsync", note("fsync"))
    monkeypatch.setattr(whole, "sync_folder", note("sync_folder"))
    write_text(tmp_path / "a", "mine")
    assert seen == [("fsync", False), ("sync_folder", True), ("fsync", True)]


def write_folder(path: Path, *contents: bytes, replace: bool = True) -> None:
    with atomic_path(path, replace=replace) as part:
        part.mkdir()
        for index, content in enumerate(contents):
            (part / f"{index:06d}.png").write_bytes(content)


def in_folder(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir()}


def test_folder_is_written_and_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "frames"
    path.mkdir()
    write_folder(path, b"a", b"b", b"c", replace=False)  # an empty folder is there to be filled
    write_folder(path, b"d")
    assert in_folder(path) == {"000000.png": b"d"}

    def fail() -> None:
        with atomic_path(path) as part:
            part.mkdir()
            (part / "000000.png").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert in_folder(path) == {"000000.png": b"d"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_may_not_be_replaced_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "frames"
    write_folder(path, b"a", b"b")
    write_folder(path, b"a", b"b", replace=False)  # the same, as an earlier run has left it
    with pytest.raises(TakenError, match="another folder of this name appeared meanwhile"):
        write_folder(path, b"a", b"c", replace=False)
    assert in_folder(path) == {"000000.png": b"a", "000001.png": b"b"}
    (path / "notes.txt").touch()
    for replace in (True, False):
        with pytest.raises(TakenError, match=r"it holds notes\.txt, which is not a frame"):
            write_folder(path, b"a", b"b", replace=replace)
    for name, make in (("link", lambda each: each.symlink_to(path)), ("file", Path.touch)):
        make(tmp_path / name)
        with pytest.raises(TakenError, match="it is not a folder"):
            write_folder(tmp_path / name, b"a")
    assert len(in_folder(path)) == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "frames", "link"]


def test_an_error_in_a_folder_names_the_folder(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "frames") as part:
            part.mkdir()
            raise OSError(errno.ENOSPC, "No space left on device", str(part / "000003.png"))

    with pytest.raises(WriteError, match=r"cannot write .*/frames: No space left on device"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_folders_of_processes_that_ended_are_swept_and_those_of_users_are_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = tmp_path / f"frames.{dead.pid}-{this_place()}-abcdef.part"
    mine, users = tmp_path / f"frames.{os.getpid()}-{this_place()}-abcdef.part", tmp_path / "frames.old.part"
    for folder in (gone, mine, users):
        folder.mkdir()
        (folder / "000000.png").touch()
    os.utime(users, (0, 0))
    assert sweep(tmp_path, ("frames",)) == [gone]
    assert sorted(tmp_path.iterdir()) == sorted([mine, users])


def test_the_content_of_a_folder_is_what_sha256sum_prints(tmp_path: Path) -> None:
    write_folder(tmp_path / "frames", b"a", b"bc")
    printed = subprocess.run(
        "sha256sum * | sha256sum", shell=True, cwd=tmp_path / "frames", capture_output=True, check=True
    )
    assert content_sha256(tmp_path / "frames") == printed.stdout.split()[0].decode()
    assert content_bytes(tmp_path / "frames") == 3
