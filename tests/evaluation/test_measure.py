"""Measuring files: once each, the same in any number of processes, going on after an error, an interruption or a killed process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from engine.errors import UserError
from engine.media.read_video import read_frames, read_video
from evaluation import measure
from evaluation.measure import Job, Measurer
from metrics.video import VideoReading
from tests.evaluation.scoring.test_measures import write_clip
from tests.ranks import PATIENCE


def mean_of(frames: np.ndarray, power: int) -> VideoReading:
    values = {"mean": float((frames.astype(float) ** power).mean()), "none": float("nan")}
    return VideoReading(values=values, by_clip={"first": [float(frames[0].mean())]})


def hang(frames: np.ndarray, note: Path) -> VideoReading:
    note.write_text(str(os.getpid()))
    time.sleep(PATIENCE.total_seconds())
    return mean_of(frames, 1)


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
    with pytest.raises(UserError, match=r"one of 2 processes that measure videos was killed.* give fewer --workers"):
        Measurer(workers=2).measure(jobs)


def test_processes_end_with_a_killed_parent(files: list[Path], tmp_path: Path) -> None:
    """The parent measures in two processes, which hang; they would wait for it for ever."""
    notes = [tmp_path / "one", tmp_path / "two"]
    code = (
        "import sys\nfrom functools import partial\nfrom pathlib import Path\n"
        "from evaluation.measure import Job, Measurer\nfrom tests.evaluation.test_measure import hang\n"
        "if __name__ == '__main__':\n"
        "    files, notes = [list(map(Path, word.split(','))) for word in sys.argv[1:]]\n"
        "    jobs = [Job(path=f, place=n.with_suffix('.json'), key={}, call=partial(hang, note=n)) for f, n in zip(files, notes)]\n"
        "    Measurer(workers=2).measure(jobs)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    words = [",".join(map(str, paths)) for paths in (files[:2], notes)]
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen([sys.executable, str(script), *words], env=os.environ | {"PYTHONPATH": root})
    try:
        wait_until(lambda: all(note.exists() and note.read_text() for note in notes))
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(is_alive(int(note.read_text())) for note in notes))


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
