"""Measure each video file once, in processes of its own; every result is kept in a JSON file, under a key of all that decides it."""

import contextlib
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from engine.errors import UserError
from engine.files.trees import finite_or_none, read_kept
from engine.files.whole import write_json
from engine.media.read_video import read_frames
from engine.shown import Say
from metrics.video import VideoReading


@dataclass(frozen=True, kw_only=True)
class Job:
    """Measures to make of a video.

    Attributes:
        path: the video file.
        place: the file that keeps the result.
        key: all that decides the result, as JSON; a result kept under another key is made again.
        call: computes it from frames uint8 [T, H, W, 3]; pickled, so a function of a module or a partial of one.
    """

    path: Path
    place: Path
    key: Mapping[str, Any]
    call: Callable[[np.ndarray], VideoReading]


@dataclass(frozen=True, kw_only=True)
class Measurer:
    """How videos are measured.

    Attributes:
        workers: number of processes; with 1, this one.
        progress: whether a bar is shown.
        say: receives a line with the number of videos to be measured.
    """

    workers: int = 1
    progress: bool = False
    say: Say = lambda line: None

    def measure(self, jobs: Sequence[Job]) -> list[VideoReading]:
        """The result of every job, in order. Each file without all of its results is read once, and each result kept at once.

        UserError for a file that does not decode; the results of others are kept.
        """
        found = {job.place: kept for job in jobs if (kept := read_measures(job)) is not None}
        missing: dict[Path, list[Job]] = {}
        for job in {job.place: job for job in jobs if job.place not in found}.values():
            missing.setdefault(job.path, []).append(job)
        total = len({job.path for job in jobs})
        self.say(f"{len(missing)} of {total} videos to be measured")
        with tqdm(
            desc="measure", total=total, initial=total - len(missing), disable=not self.progress, dynamic_ncols=True
        ) as bar:
            for made in self._make(list(missing.values())):
                found |= made
                bar.update()
        return [found[job.place] for job in jobs]

    def _make(self, files: Sequence[Sequence[Job]]) -> Iterator[dict[Path, VideoReading]]:
        """Results by their place, file after file, as they are made."""
        processes = min(self.workers, len(files))
        if processes < 2:
            yield from map(_measure_file, files)
            return
        # Spawned: a fork would copy threads and locks of OpenCV and PyAV.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin) as pool:
            try:
                with _holding_interruptions():
                    submitted = [pool.submit(_measure_file, jobs) for jobs in files]
                for made in as_completed(submitted):
                    yield made.result()
            except BrokenProcessPool as error:
                raise UserError(
                    f"one of {processes} processes that measure videos ended early; unless its error is above, it was killed, "
                    "perhaps for lack of memory: give fewer --workers; what was measured is kept"
                ) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def read_measures(job: Job) -> VideoReading | None:
    """Read the kept result of a job; None if it is of another key, missing, or damaged, which a line on stderr says."""
    kept = read_kept(job.place, {"key": dict, "values": dict, "by_clip": dict}, what="the measures of a video")
    if kept is None or kept["key"] != job.key:
        return None
    values = {name: math.nan if value is None else value for name, value in kept["values"].items()}
    return VideoReading(values=values, by_clip=kept["by_clip"])


def _measure_file(jobs: Sequence[Job]) -> dict[Path, VideoReading]:
    """Make and keep the results of jobs of one file, by their place, with null for nan."""
    frames = read_frames(jobs[0].path)
    made = {}
    for job in jobs:
        made[job.place] = found = job.call(frames)
        job.place.parent.mkdir(parents=True, exist_ok=True)
        values = {name: finite_or_none(value) for name, value in found.values.items()}
        write_json(job.place, {"key": job.key, "values": values, "by_clip": found.by_clip})
    return made


@contextlib.contextmanager
def _holding_interruptions() -> Iterator[None]:
    """Handle a Ctrl-C at the end of the block; processes started in it have SIGINT blocked until `_begin`."""
    came: list[int] = []
    # A handler too: threads of libraries, where SIGINT is not blocked, may receive it.
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _begin() -> None:
    """Make a worker end with its parent, and at Ctrl-C, silently, and use one core; measures do not depend on their number."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
