"""Compute proxies and exact measures, those of events too, of many videos in parallel; results are cached by the file's hash."""

import hashlib
import multiprocessing
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import cv2

import metrics.course
from engine.errors import UserError
from engine.media import read_video
from evaluation.course import COURSE, measure_course
from evaluation.events import EVENTS, measure_events, version_of
from evaluation.kept import keep_measures, read_measures
from evaluation.videos import Video
from evaluation.world import WORLD, measure_world
from metrics import proxies
from metrics.proxies import PROXIES
from metrics.version import source_digest
from metrics.video import VideoReading


def measure_all(
    videos: Sequence[Video], folder: Path, *, workers: int, say: Callable[[str], None]
) -> dict[Path, dict[str, float]]:
    """Compute all proxies of every video, by path; kept values of the same code and file are reused.

    UserError for a fractional frame rate: windows of two seconds are counted in frames.
    """
    broken = next((video for video in videos if video.fps.denominator != 1), None)
    if broken is not None:
        raise UserError(f"{broken.path} has {float(broken.fps):.3f} frames per second; proxies need a whole rate")
    jobs = [
        _Job(video.path, (video.path, int(video.fps)), folder / f"{video.sha256}-{video.fps}.json") for video in videos
    ]
    # Kept values depend on the code of the proxies and of the reader too.
    code = source_digest(*(Path(module.__file__) for module in (proxies, read_video)), packages=("av",))
    return _measure_kept(jobs, measure_file, "proxies", PROXIES, code=code, workers=workers, say=say)


def measure_all_world(
    videos: Sequence[Video], folder: Path, *, workers: int, say: Callable[[str], None]
) -> dict[Path, dict[str, float]]:
    """Measure videos of the embedded world, by path, reusing kept values; `evaluation.world.videos_of_world` selects them."""
    jobs = []
    for video in videos:
        what = hashlib.sha256(f"{video.prompt}\n{video.native_frames}".encode()).hexdigest()[:12]
        given = (video.path, video.prompt, video.native_frames)
        jobs.append(_Job(video.path, given, folder / f"{video.sha256}-{what}.json"))
    return _measure_kept(jobs, measure_world, "exact measures", WORLD, code=source_digest(), workers=workers, say=say)


def measure_all_events(
    videos: Sequence[Video], folder: Path, *, workers: int, say: Callable[[str], None]
) -> dict[Path, dict[str, float]]:
    """Measure timelines, by path, reusing kept values, whose sidecars list their events."""
    jobs = []
    for video in videos:
        what = hashlib.sha256(repr(video.events).encode()).hexdigest()[:12]
        jobs.append(_Job(video.path, (video.path, video.events), folder / f"{video.sha256}-{what}.json"))
    code = version_of(videos[0].prompt)
    return _measure_kept(jobs, measure_events, "measures of events", EVENTS, code=code, workers=workers, say=say)


def measure_all_course(
    videos: Sequence[Video], folder: Path, *, workers: int, say: Callable[[str], None]
) -> dict[Path, dict[str, float]]:
    """Measure the course of long videos, by path, reusing kept values; `evaluation.course.long_videos` selects them."""
    jobs = [
        _Job(video.path, (video.path, video.native_frames), folder / f"{video.sha256}-{video.native_frames}.json")
        for video in videos
    ]
    code = source_digest(Path(metrics.course.__file__))
    return _measure_kept(jobs, measure_course, "measures of the course", COURSE, code=code, workers=workers, say=say)


def measure_file(path: Path, fps: int) -> dict[str, float]:
    """Compute all proxies of a video file on one thread."""
    cv2.setNumThreads(1)
    return proxies.proxies(read_video.read_frames(path), fps)


class _Job(NamedTuple):
    """A video, the arguments of its measure, and the file that keeps the result."""

    path: Path
    given: tuple[Any, ...]
    place: Path


def _measure_kept(
    jobs: Sequence[_Job],
    call: Callable[..., dict[str, float]],
    what: str,
    names: Collection[str],
    *,
    code: str,
    workers: int,
    say: Callable[[str], None],
) -> dict[Path, dict[str, float]]:
    key = {"version": code, "measures": list(names)}
    kept = {job.path: read_measures(job.place, key) for job in jobs}
    missing = [job for job in jobs if kept[job.path] is None]
    say(f"{what}: {len(missing)} of {len(jobs)} videos to be measured")
    for job, values in _measure(missing, call, workers):
        kept[job.path] = VideoReading(values=values, by_clip={})
        keep_measures(job.place, key, kept[job.path])
    return {path: found.values for path, found in kept.items() if found is not None}


def _measure(
    given: Sequence[_Job], call: Callable[..., dict[str, float]], workers: int
) -> Iterator[tuple[_Job, dict[str, float]]]:
    if workers == 1 or len(given) < 2:
        for job in given:
            yield job, call(*job.given)
        return
    # Spawned: a fork would copy threads and locks of OpenCV and PyAV. This module imports little.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(given)), mp_context=context) as pool:
        jobs = {pool.submit(call, *job.given): job for job in given}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
