"""Claims: of two runs of one file the second ends before it computes anything, by whatever path it names the file."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.files.claims import claim
from engine.files.processes import this_place
from tests.engine.files.test_locks import ELSEWHERE, ROOT, another

Say = Callable[[str], None]


@contextmanager
def claimed_elsewhere(paths: Sequence[Path], *, then: str = "sys.stdin.read()") -> Iterator[subprocess.Popen]:
    """Another process that has claimed files."""
    code = f"""
import pathlib, sys
from engine.files.claims import claim
with claim([pathlib.Path(path) for path in {[str(path) for path in paths]!r}], advice="-"):
    print("held", flush=True)
    {then}
"""
    with another(code) as process:
        yield process


def test_one_file_in_common_is_enough(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    with claimed_elsewhere([a, b]) as process:
        with pytest.raises(UserError) as caught:
            with claim([b, c], advice="choose another --output.path"):
                pass
        host = os.uname().nodename
        assert str(caught.value) == (
            f"{b} is being made by process {process.pid} on {host}; wait for it, or choose another --output.path"
        )
        with claim([c], advice="-"):  # of two that have none in common both may run
            pass
        with claim([c], advice="-"):  # the refused run has left nothing that would hold it
            pass
    with claim([a, b, c], advice="-"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["relative", "linked folder", "dots"])
def test_the_same_file_by_another_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    other = {"relative": Path("a.mp4"), "linked folder": tmp_path / "link/a.mp4", "dots": folder / "../folder/a.mp4"}[
        how
    ]
    with claimed_elsewhere([folder / "a.mp4"]):
        with pytest.raises(UserError, match=f"^{other} is being made by process"):
            with claim([other], advice="-"):
                pass


def test_files_of_several_folders_are_claimed_together_or_not_at_all(tmp_path: Path) -> None:
    for name in "xy":
        (tmp_path / name).mkdir()
    video, latents = tmp_path / "x/a.mp4", tmp_path / "y/z.safetensors"
    with claimed_elsewhere([latents]):
        with pytest.raises(UserError, match=f"^{latents} is being made"):
            with claim([video, latents], advice="-"):
                pass
        with claim([video], advice="-"):
            pass


def test_what_a_killed_run_left_is_taken_over_and_deleted(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    then = "from engine.files.whole import atomic_path; import os\n    with atomic_path(path := pathlib.Path(%r)) as part: part.touch(); os.kill(os.getpid(), 9)"
    with claimed_elsewhere([path], then=then % str(path)) as process:
        process.wait()
    assert len(list(tmp_path.iterdir())) == 2  # the claim and the unfinished file
    with claim([path, tmp_path / "b"], advice="-"):
        assert not [entry for entry in tmp_path.iterdir() if entry.suffix == ".part"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_run_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_alive: bool) -> None:
    """It is listened to only if it has claimed the same file."""
    heard: list[Path] = []
    monkeypatch.setattr("engine.files.locks._beats", lambda path, _: heard.append(path) or is_alive)
    other = tmp_path / ".12-abcd.claim"
    other.write_text(json.dumps(ELSEWHERE | {"files": ["a"]}))
    with claim([tmp_path / "b"], advice="-"):
        pass
    assert heard == []
    if is_alive:
        with pytest.raises(UserError, match="is being made by process 12 on other; wait for it"):
            with claim([tmp_path / "a"], advice="-", say=lambda _: None):
                pass
    else:
        with claim([tmp_path / "a"], advice="-", say=lambda _: None):
            pass
    assert other.exists() == is_alive


def test_without_locks_a_claim_is_known_by_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    other, said = tmp_path / ".12-abcd.claim", []
    other.write_text(json.dumps({"pid": os.getppid(), "host": "here", "place": this_place(), "files": ["a"]}))
    with pytest.raises(UserError, match=f"is being made by process {os.getppid()} on here"):
        with claim([tmp_path / "a"], advice="-", say=said.append):
            pass
    with claim([tmp_path / "b"], advice="-", say=said.append):
        pass
    assert said == [f"{tmp_path} is on a file system without locks; holders are identified by a heartbeat instead"]


def test_of_runs_that_start_at_once_one_goes_on(tmp_path: Path) -> None:
    code = f"""
import pathlib, sys
from engine.errors import UserError
from engine.files.claims import claim
print("ready", flush=True); sys.stdin.readline()
try:
    with claim([pathlib.Path({str(tmp_path)!r}) / name for name in sys.argv[1]], advice="-"):
        print("claimed", flush=True); sys.stdin.readline()
except UserError as error:
    print(error, flush=True)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, names], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for names in ("ab", "bc", "ab", "cb")  # each has b
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.stdout.readline().strip() for process in processes]
    assert said.count("claimed") == 1, said
    winner = processes[said.index("claimed")]
    assert all(f"process {winner.pid} on " in line for line in said if line != "claimed"), said
    for process in processes:
        process.communicate("end\n")
    assert list(tmp_path.iterdir()) == []
