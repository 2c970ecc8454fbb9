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
from engine.files.whole import TakenError, WriteError, atomic_path, sweep, write_json, write_text

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
    path, strange = tmp_path / "p0000-s0.checkpoint.safetensors", tmp_path / "other.checkpoint.safetensors.1-a.part"
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
