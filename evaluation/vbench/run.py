"""Run VBench-Long: one process per dimension; finished results are kept, and failures do not affect other dimensions."""

import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files.trees import Shape, read_kept
from engine.files.whole import file_sha256, write_json
from evaluation.vbench import stage as staging
from evaluation.vbench.bench import Bench, Evaluator, driver, environment
from evaluation.vbench.parse import DimensionScores, read_results
from evaluation.vbench.process import run_process
from evaluation.vbench.stage import View

DONE: Shape = {"identity": dict, "result.sha256": str, "seconds": int | float}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One dimension of one view: its scores, or why there are none."""

    view: View
    dimension: str
    scores: DimensionScores | None
    error: str | None
    seconds: float


def evaluate(
    views: Sequence[View],
    dimensions: Sequence[str],
    *,
    evaluator: Evaluator,
    bench: Bench,
    folder: Path,
    say: Callable[[str], None],
    keep_views: bool = False,
) -> list[Outcome]:
    """Score every dimension of every view; kept results of the same videos and VBench are reused.

    A failed dimension does not stop the others. A view is staged and cut into clips only if a result is missing, and
    deleted once all are there. An interruption ends the processes; finished results are kept.
    """
    outcomes: list[Outcome] = []
    for view in views:
        done = {name: _read_done(view, name, bench, folder) for name in dimensions}
        pending = [name for name in dimensions if done[name] is None]
        say(f"{view.label}: {len(view.items)} videos, {len(pending)} of {len(dimensions)} dimensions to be scored")
        made = _run_view(view, pending, evaluator=evaluator, bench=bench, folder=folder, say=say) if pending else []
        if not keep_views and all(outcome.error is None for outcome in made):
            staging.remove(view)
        by_name = {outcome.dimension: outcome for outcome in made} | {n: o for n, o in done.items() if o is not None}
        outcomes += [by_name[name] for name in dimensions]
    return outcomes


def _run_view(
    view: View,
    dimensions: Sequence[str],
    *,
    evaluator: Evaluator,
    bench: Bench,
    folder: Path,
    say: Callable[[str], None],
) -> list[Outcome]:
    stop = threading.Event()
    fault = _split(view, dimensions, evaluator=evaluator, folder=folder, stop=stop)
    if fault is not None:
        say(f"{view.label}: {fault}")
        return [Outcome(view=view, dimension=name, scores=None, error=fault, seconds=0.0) for name in dimensions]
    gpus: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for gpu in evaluator.gpus or (None,):
        gpus.put(gpu)

    def work(dimension: str) -> Outcome:
        gpu = gpus.get()
        try:
            outcome = _score(view, dimension, evaluator=evaluator, bench=bench, folder=folder, gpu=gpu, stop=stop)
        finally:
            gpus.put(gpu)
        how = f"{outcome.scores.video_mean:.4f}" if outcome.scores else f"failed: {outcome.error}"
        say(f"{view.label}: {dimension} {how} ({outcome.seconds:.0f} s)")
        return outcome

    with ThreadPoolExecutor(max_workers=len(evaluator.gpus) or 1) as pool:
        try:
            return list(pool.map(work, dimensions))
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _split(
    view: View, dimensions: Sequence[str], *, evaluator: Evaluator, folder: Path, stop: threading.Event
) -> str | None:
    """Stage a view and cut it into clips, unless done before; return a description of the failure, or None."""
    marker = view.folder.with_name(f"{view.folder.name}.split.json")
    split = read_kept(marker, {"fingerprint": str}, what="the note of a view that was cut into clips")
    if split == {"fingerprint": view.fingerprint} and _is_whole(view):
        return None
    marker.unlink(missing_ok=True)
    staging.stage(view)
    out = results_folder(folder, view) / "split"
    out.mkdir(parents=True, exist_ok=True)
    ended = run_process(
        [
            *driver(evaluator, "split", out),
            *("--videos", str(view.folder.absolute()), "--device", "cpu", "--dimension", *dimensions),
        ],
        env=environment(evaluator, None),
        log=folder / "logs" / f"{view.folder.name}-split.log",
        time_limit=evaluator.time_limit,
        stop=stop,
    )
    if ended is not None:
        return f"cutting into clips {ended}"
    try:
        staging.check(view, split=True)
    except UserError as error:
        return str(error)
    write_json(marker, {"fingerprint": view.fingerprint})
    return None


def _is_whole(view: View) -> bool:
    try:
        staging.check(view, split=True)
    except UserError:
        return False
    return True


def results_folder(folder: Path, view: View) -> Path:
    """Where the results of a view lie, one folder per dimension."""
    return folder / "results" / view.folder.name


def _score(
    view: View,
    dimension: str,
    *,
    evaluator: Evaluator,
    bench: Bench,
    folder: Path,
    gpu: int | None,
    stop: threading.Event,
) -> Outcome:
    started = time.monotonic()

    def outcome(scores: DimensionScores | None, error: str | None) -> Outcome:
        seconds = time.monotonic() - started
        return Outcome(view=view, dimension=dimension, scores=scores, error=error, seconds=seconds)

    if stop.is_set():
        return outcome(None, "was stopped")
    out = results_folder(folder, view) / dimension
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    staging.clear_first_frames(view, dimension)
    words = [*driver(evaluator, "score", out), "--videos", str(view.folder.absolute()), "--device", evaluator.device]
    ended = run_process(
        [*words, "--dimension", dimension],
        env=environment(evaluator, gpu),
        log=folder / "logs" / f"{view.folder.name}-{dimension}.log",
        time_limit=evaluator.time_limit,
        stop=stop,
    )
    if ended is not None:
        return outcome(None, ended)
    try:
        scores = _read(view, dimension, out)
        staging.check(view, split=True)
    except UserError as error:
        return outcome(None, str(error))
    done = outcome(scores, None)
    result = {"file": _result(out, dimension).name, "sha256": file_sha256(_result(out, dimension))}
    identity = _identity(view, dimension, bench)
    write_json(out / "done.json", {"identity": identity, "result": result, "seconds": done.seconds})
    return done


def _read_done(view: View, dimension: str, bench: Bench, folder: Path) -> Outcome | None:
    """Read a kept result; None if missing, or of other videos or another VBench."""
    out = results_folder(folder, view) / dimension
    done = read_kept(out / "done.json", DONE, what="the note of a finished dimension")
    path = _result(out, dimension)
    if (
        done is None
        or not path.is_file()
        or done["identity"] != json.loads(json.dumps(_identity(view, dimension, bench)))
    ):
        return None
    if file_sha256(path) != done["result"]["sha256"]:
        raise UserError(f"{path} was changed after it was written; delete {out} to have it made again")
    scores = _read(view, dimension, out)
    return Outcome(view=view, dimension=dimension, scores=scores, error=None, seconds=done["seconds"])


def _identity(view: View, dimension: str, bench: Bench) -> dict[str, Any]:
    return {"view": view.fingerprint, "dimension": dimension, "vbench": bench.identity}


def _read(view: View, dimension: str, out: Path) -> DimensionScores:
    return read_results(_result(out, dimension), dimension, {item.stem: item.clips for item in view.items})


def _result(out: Path, dimension: str) -> Path:
    return out / f"{dimension}_eval_results.json"


def failures(outcomes: Iterable[Outcome]) -> list[str]:
    """One line for each dimension of a view that has no scores."""
    return [f"{o.view.label}, {o.dimension}: {o.error}" for o in outcomes if o.error is not None]
