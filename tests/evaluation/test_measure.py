"""Measuring files: once each, the same in any number of processes, going on after an error, an interruption or a killed process."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.errors import UserError
from engine.media.read_video import read_frames, read_video
from evaluation import measure
from evaluation.measure import Job, Measurer
from metrics.video import VideoReading
from tests.evaluation.scoring.test_measures import write_clip
from tests.ranks import PATIENCE

# Its processes import little, and so start soon.
HANGING = """
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from evaluation.measure import Job, Measurer


def hang(frames, note):
    note.write_text(str(os.getpid()))
    time.sleep(3600)


if __name__ == "__mp_main__":  # one of the processes, which imports this before it is ready
    Path(sys.argv[2].split(",")[0]).with_name("imports").touch()
    time.sleep(1)

if __name__ == "__main__":
    files, notes = [list(map(Path, word.split(","))) for word in sys.argv[1:]]
    jobs = [Job(path=f, place=n.with_suffix(".json"), key={}, call=partial(hang, note=n)) for f, n in zip(files, notes)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job of a shell
    try:
        Measurer(workers=2).measure(jobs)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def mean_of(frames: np.ndarray, power: int) -> VideoReading:
    values = {"mean": float((frames.astype(float) ** power).mean()), "none": float("nan")}
    return VideoReading(values=values, by_clip={"first": [float(frames[0].mean())]})


def die(frames: np.ndarray) -> VideoReading:
    os.kill(os.getpid(), signal.SIGKILL)
    return mean_of(frames, 1)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{seed}.mp4" for seed in range(3)]
    for seed, path in enumerate(paths):
        write_clip(path, seed)
    return paths


def jobs_of(files: list[Path], folder: Path, *, powers: tuple[int, ...] = (1, 2)) -> list[Job]:
    """Two jobs of each file."""
    return [
        Job(
            path=path,
            place=folder / f"{path.stem}-{power}.json",
            key={"power": power},
            call=partial(mean_of, power=power),
        )
        for power in powers
        for path in files
    ]


def test_any_number_of_processes_finds_the_same_and_reads_each_file_once(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, said = [], []
    monkeypatch.setattr(measure, "read_frames", lambda path: (read.append(path), read_frames(path))[1])
    alone = Measurer(say=said.append).measure(jobs_of(files, tmp_path / "a"))
    assert read == files
    together = Measurer(workers=2, say=said.append).measure(jobs_of(files, tmp_path / "b"))
    assert read == files  # elsewhere
    plain = [mean_of(np.stack(list(read_video(path))), power) for power in (1, 2) for path in files]
    assert str(alone) == str(together) == str(plain)  # as text, because nan is not equal to itself
    assert len({str(found) for found in alone}) == 6
    for workers in (1, 2):
        assert str(Measurer(workers=workers, say=said.append).measure(jobs_of(files, tmp_path / "b"))) == str(alone)
    assert read == files
    assert said == [f"{count} of 3 videos to be measured" for count in (3, 3, 0, 0)]
    # A third job of each is made alone; the others are read.
    (tmp_path / "b/0-1.json").write_text("half")
    Measurer(say=said.append).measure(jobs_of(files, tmp_path / "b"))
    assert (read, said[-1]) == ([*files, files[0]], "1 of 3 videos to be measured")


def test_one_process_keeps_its_threads(files: list[Path], tmp_path: Path) -> None:
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(2)
        Measurer().measure(jobs_of(files[:1], tmp_path))
        assert cv2.getNumThreads() == 2
    finally:
        cv2.setNumThreads(before)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_file_is_one_line_and_the_others_are_kept(files: list[Path], tmp_path: Path, workers: int) -> None:
    files[2].write_bytes(files[2].read_bytes()[:1500])
    with pytest.raises(UserError, match=r"2\.mp4 does not decode after frame "):
        Measurer(workers=workers).measure(jobs_of(files, tmp_path / "kept"))
    said: list[str] = []
    write_clip(files[2], 2)
    Measurer(say=said.append).measure(jobs_of(files, tmp_path / "kept"))
    assert said == ["1 of 3 videos to be measured"]


def test_a_killed_process_is_one_line(files: list[Path], tmp_path: Path) -> None:
    jobs = [Job(path=path, place=tmp_path / path.stem, key={}, call=die) for path in files]
    with pytest.raises(
        UserError, match=r"^one of 3 processes .*ended early; .*it was killed, .*: give fewer --workers"
    ):
        Measurer(workers=4).measure(jobs)  # of three files


@pytest.fixture
def parent(files: list[Path], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that measures `one` and `two` in two processes, which hang, in a process group of its own."""
    script = tmp_path / "parent.py"
    script.write_text(HANGING)
    words = [",".join(map(str, paths)) for paths in (files[:2], [tmp_path / "one", tmp_path / "two"])]
    process = subprocess.Popen(
        [sys.executable, str(script), *words],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        yield process
        process.kill()


def test_processes_end_with_a_killed_parent(parent: subprocess.Popen[str], tmp_path: Path) -> None:
    """They would wait for it for ever."""
    notes = [tmp_path / "one", tmp_path / "two"]
    wait_until(lambda: all(note.exists() and note.read_text() for note in notes))
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(is_alive(int(note.read_text())) for note in notes))


def test_processes_that_start_end_silently_at_ctrl_c(parent: subprocess.Popen[str], tmp_path: Path) -> None:
    """Python's own handler would print a traceback of each one's imports."""
    wait_until((tmp_path / "imports").exists)
    os.killpg(parent.pid, signal.SIGINT)
    _, said = parent.communicate(timeout=PATIENCE.total_seconds())
    assert (parent.returncode, said) == (130, "")
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("thread", ["main", "other"])
def test_an_interruption_waits_until_processes_are_started(thread: str) -> None:
    """Also one that another thread receives, such as a library's."""
    over, held = threading.Event(), []
    other = threading.Thread(target=over.wait)
    other.start()
    receiver = threading.main_thread() if thread == "main" else other
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), measure._holding_interruptions():
            signal.pthread_kill(receiver.ident or 0, signal.SIGINT)
            time.sleep(0.1)
            held.append(True)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
        over.set()
        other.join()
    assert held
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may stay a zombie where no init collects it."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
