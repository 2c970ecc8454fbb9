"""Lock files: one process at a time, known by name, whatever the file system and however the last one ended."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.files import locks
from engine.files.locks import HeldError, hold, holder_of, locked
from engine.files.processes import this_place

ROOT = Path(__file__).parent.parent.parent.parent
ELSEWHERE = {"pid": 12, "host": "other", "place": "elsewhere", "started": 5}


def fail(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.fixture(params=["flock", "no flock", "no links", "neither"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with locks and hard links, and those that lack one or both."""
    if request.param in ("no flock", "neither"):
        monkeypatch.setattr(fcntl, "flock", fail)
    if request.param in ("no links", "neither"):
        monkeypatch.setattr(os, "link", fail)
    return request.param


@pytest.fixture
def said() -> list[str]:
    return []


@contextmanager
def another(code: str) -> Iterator[subprocess.Popen]:
    """Another process that holds the files; it ends when its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


@contextmanager
def holding(path: Path, kind: str) -> Iterator[subprocess.Popen]:
    """Another process that holds a lock file."""
    without = {
        "flock": (),
        "no flock": ("fcntl.flock",),
        "no links": ("os.link",),
        "neither": ("fcntl.flock", "os.link"),
    }
    code = "\n".join(
        [
            "import errno, fcntl, os, pathlib, sys",
            "def fail(*_): raise OSError(errno.ENOSYS, 'none')",
            *(f"{name} = fail" for name in without[kind]),
            "from engine.files.locks import hold",
            f"with hold(pathlib.Path({str(path)!r}), say=lambda _: None):",
            "    print('held', flush=True)",
            "    sys.stdin.read()",
        ]
    )
    with another(code) as process:
        yield process


def test_second_claim_names_the_holder(tmp_path: Path, kind: str, said: list[str]) -> None:
    path = tmp_path / "a.lock"
    with holding(path, kind) as process:
        assert holder_of(path).pid == process.pid
        for _ in range(2):  # a look does not free it
            with pytest.raises(HeldError, match=rf"^process {process.pid} on \S+ holds {path}$"):
                with hold(path, say=said.append):
                    pass
    assert holder_of(path) is None
    with hold(path, say=said.append):
        assert holder_of(path).pid == os.getpid()
        with pytest.raises(HeldError, match=f"process {os.getpid()} on "):
            with hold(path, say=said.append):
                pass
    assert list(tmp_path.iterdir()) == []
    lines = [line for line in said if "without locks" in line]
    assert len(lines) == (1 if kind in ("no flock", "neither") else 0)
    assert said == lines


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, kind: str, said: list[str]) -> None:
    path = tmp_path / "a.lock"
    with holding(path, kind) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert path.exists()
        assert holder_of(path) is None
        with hold(path, say=said.append):
            assert holder_of(path).pid == os.getpid()
    assert list(tmp_path.iterdir()) == []
    assert [line for line in said if "taking over" in line] == []  # on this machine there is nothing to wonder about


def test_a_later_process_of_the_same_number_is_not_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", fail)
    path = tmp_path / "a.lock"
    path.write_text(json.dumps({"pid": os.getpid(), "host": "here", "place": this_place(), "started": 1}))
    with hold(path, say=said.append):
        pass


@pytest.mark.parametrize("age", [0.0, -3600.0], ids=["a moment ago", "an hour ahead"])
def test_holder_on_another_machine_is_respected_or_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, said: list[str], age: float
) -> None:
    monkeypatch.setattr(locks, "WATCH_SECONDS", 200.0)
    path = tmp_path / "a.lock"
    path.write_text(json.dumps(ELSEWHERE))
    os.utime(path, (time.time() - age,) * 2)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            now = time.time() - age
            os.utime(path, (now, now))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(HeldError, match=r"^process 12 on other holds"):
            with hold(path, say=said.append):
                pass
    finally:
        stop.set()
        thread.join()
    assert said == ["waiting up to 200 s for a heartbeat of process 12 on other, which holds a.lock"]

    monkeypatch.setattr(locks, "WATCH_SECONDS", 0.3)
    said.clear()
    with hold(path, say=said.append):
        assert holder_of(path).pid == os.getpid()
    assert "taking over a.lock from process 12 on other, whose heartbeat has stopped" in said


def test_one_that_was_silent_for_long_is_not_waited_for(tmp_path: Path, kind: str, said: list[str]) -> None:
    path = tmp_path / "a.lock"
    path.write_text(json.dumps(ELSEWHERE))
    os.utime(path, (time.time() - 2 * locks.ALIVE_SECONDS,) * 2)
    assert holder_of(path) is None
    with hold(path, say=said.append):
        pass
    assert [line for line in said if "waiting" in line] == []


@pytest.mark.parametrize(("age", "is_live"), [(1.0, True), (3600.0, False), (-3600.0, False)])
def test_who_only_looks_does_not_wait(tmp_path: Path, age: float, is_live: bool) -> None:
    path = tmp_path / "a.lock"
    path.write_text(json.dumps(ELSEWHERE))
    os.utime(path, (time.time() - age,) * 2)
    assert (holder_of(path) is not None) == is_live


def test_holder_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    path = tmp_path / "a.lock"
    with hold(path, say=said.append):
        os.utime(path, (0, 0))
        until = time.monotonic() + 200
        while path.stat().st_mtime == 0:
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}'])
def test_a_lock_file_with_anything_in_it_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, said: list[str], content: str
) -> None:
    monkeypatch.setattr(locks, "_READ_SECONDS", 0.2)
    path = tmp_path / "a.lock"
    path.write_text(content)
    with hold(path, say=said.append):
        assert holder_of(path).pid == os.getpid()


def test_without_links_a_file_that_is_still_empty_is_not_held_by_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Another process finds the new file before its maker has locked it, and takes it for one that a dead process left."""
    monkeypatch.setattr(os, "link", fail)
    path, flock = tmp_path / "a.lock", locks._flock
    removed: list[bool] = []

    def late(descriptor: int) -> bool | None:
        if not removed and path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            removed.append(True)
            path.unlink()
        return flock(descriptor)

    monkeypatch.setattr(locks, "_flock", late)
    with hold(path, say=said.append):
        assert removed == [True]
        assert holder_of(path).pid == os.getpid()


def test_a_lock_of_a_former_version_is_taken_over(tmp_path: Path, said: list[str]) -> None:
    """It stays in the folder when its driver has ended."""
    path = tmp_path / "a.lock"
    path.write_text(json.dumps({"pid": os.getpid(), "host": os.uname().nodename, "time": time.time()}))
    with hold(path, say=said.append):
        pass
    assert said == []


def test_an_error_that_is_not_about_locks_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"):
        with hold(tmp_path / "a.lock"):
            pass
    assert list(tmp_path.iterdir()) == []


def race(path: Path, kind: str, enter: str, count: int) -> list[subprocess.Popen]:
    code = "\n".join(
        [
            "import errno, fcntl, os, pathlib, sys, time",
            "def fail(*_): raise OSError(errno.ENOSYS, 'none')",
            *([f"{name} = fail" for name in ("fcntl.flock",) if kind in ("no flock", "neither")]),
            *([f"{name} = fail" for name in ("os.link",) if kind in ("no links", "neither")]),
            "from engine.files.locks import *",
            f"path = pathlib.Path({str(path)!r})",
            "print('ready', flush=True); sys.stdin.readline()",
            enter,
        ]
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(count)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


def test_of_several_that_come_at_once_one_holds_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.lock"
    enter = "\n".join(
        [
            "try:",
            "    with hold(path):",
            "        print('held', flush=True); sys.stdin.readline()",
            "except HeldError as error:",
            "    print(error.who, flush=True)",
        ]
    )
    processes = race(path, kind, enter, 4)
    said = [process.stdout.readline().strip() for process in processes]
    assert said.count("held") == 1, said
    winner = processes[said.index("held")]
    assert {line for line in said if line != "held"} == {f"process {winner.pid} on {os.uname().nodename}"}
    for process in processes:
        process.communicate("end\n")


def test_a_lock_that_is_waited_for_is_one_at_a_time(tmp_path: Path, kind: str) -> None:
    """Each adds one to a number in a file, many times; without the lock (the negative control) some would be lost."""
    path, number = tmp_path / "a.lock", tmp_path / "number"
    number.write_text("0")
    add = [
        "for _ in range(20):",
        "    with locked(path):",
        f"        number = pathlib.Path({str(number)!r})",
        "        value = int(number.read_text()); time.sleep(0.002); number.write_text(str(value + 1))",
    ]
    for process in race(path, kind, "\n".join(add), 3):
        process.communicate()
    assert number.read_text() == "60"
    number.write_text("0")
    add[1] = "    if True:"
    for process in race(path, kind, "\n".join(add), 3):
        process.communicate()
    assert number.read_text() != "60"


def test_waiting_for_a_lock_that_is_freed(tmp_path: Path) -> None:
    order: list[Callable[[], None] | str] = []

    def second() -> None:
        with locked(tmp_path / "a.lock"):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked(tmp_path / "a.lock"):
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_storage_that_fails_at_the_end_hides_no_error_of_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next process takes the file over."""
    path = tmp_path / "a.lock"

    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with pytest.raises(ValueError, match="the cause"):
        with hold(path):
            monkeypatch.setattr(Path, "unlink", stale)
            raise ValueError("the cause")
    assert path.exists()
    monkeypatch.undo()
    with hold(path):
        assert holder_of(path) is not None
    assert not path.exists()
