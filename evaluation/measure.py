"""Proxies of many videos: each is measured once, on as many processes as wanted, and kept by the file's hash."""

import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from engine.batch.store import read_json, write_json
from engine.errors import UserError
from evaluation.proxies import PROXIES, measure_file, version
from evaluation.videos import Video


def measure_all(
    videos: Sequence[Video], folder: Path, *, workers: int, say: Callable[[str], None]
) -> dict[Path, dict[str, float]]:
    """Every proxy of every video, by path; values that the same code found in the same file are read again.

    UserError for rates that are not whole: windows of two seconds are counted in frames.
    """
    broken = next((video for video in videos if video.fps.denominator != 1), None)
    if broken is not None:
        raise UserError(f"{broken.path} has {float(broken.fps):.3f} frames per second; proxies need a whole rate")
    folder.mkdir(parents=True, exist_ok=True)
    code = version()
    found = {video.path: _read(_place(video, folder), code) for video in videos}
    missing = [video for video in videos if found[video.path] is None]
    say(f"proxies: {len(missing)} of {len(videos)} videos to be measured")
    for video, values in _measure(missing, workers):
        write_json(_place(video, folder), {"version": code, "values": {n: _json(v) for n, v in values.items()}})
        found[video.path] = values
    return {path: values for path, values in found.items() if values is not None}


def _measure(videos: Sequence[Video], workers: int) -> Iterator[tuple[Video, dict[str, float]]]:
    if workers == 1 or len(videos) < 2:
        for video in videos:
            yield video, measure_file(video.path, int(video.fps))
        return
    # Spawned, because OpenCV and PyAV hold threads and locks that a fork would copy; evaluation.proxies imports little.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(videos)), mp_context=context) as pool:
        jobs = {pool.submit(measure_file, video.path, int(video.fps)): video for video in videos}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _place(video: Video, folder: Path) -> Path:
    return folder / f"{video.sha256}-{video.fps}.json"


def _read(path: Path, code: str) -> dict[str, float] | None:
    kept = read_json(path)
    if kept is None or kept["version"] != code or kept["values"].keys() != PROXIES.keys():
        return None
    return {name: math.nan if value is None else value for name, value in kept["values"].items()}


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None
