"""Score videos with VBench-Long, in its own environment, proxies and exact measures, and write the report."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError
from engine.files.locks import HeldError, hold
from engine.files.storage import writing_to
from engine.shown import Say
from evaluation.measure import Measurer
from evaluation.scoring.measures import measure_videos
from evaluation.scoring.report import Evaluation, write_report
from evaluation.scoring.tables import Scored
from evaluation.vbench.bench import Bench, Evaluator, PreflightError, preflight
from evaluation.vbench.run import Outcome, evaluate, failures
from evaluation.vbench.stage import View, plan_view
from evaluation.videos import Video, groups, read_batches, read_list, what_is_missing


@dataclass(frozen=True, kw_only=True)
class Request:
    """Videos to score, and options.

    Attributes:
        runs: folders of batches.
        videos: CSV list of videos, instead of `runs`.
        out: folder of the report.
        title: heading of the report.
        dimensions: dimensions of VBench.
        evaluator: how to run VBench-Long; None without it.
        measurer: computes proxies and exact measures; None without them.
        native_frames: native length of all videos, if given.
        baseline: label to compare others with; "" for direct, or else the first.
        keep_views: whether staged videos and clips stay.
    """

    runs: Sequence[Path]
    videos: Path | None
    out: Path
    title: str
    dimensions: Sequence[str]
    evaluator: Evaluator | None
    measurer: Measurer | None
    native_frames: int | None
    baseline: str
    keep_views: bool


def score(request: Request, *, check_only: bool, say: Say, report: Callable[[str], None]) -> int:
    """Find the videos, check everything, score what is missing, and report; return 1 if a part of VBench failed.

    `say` receives progress and `report` the result; with `check_only` nothing is scored.
    """
    left_out: list[str] = []
    videos = _videos(request, left_out.append)
    missing = [*left_out, *_missing(request, videos)]
    for sentence in missing:
        say(f"some videos are missing: {sentence}")
    by_label = groups(videos)
    baseline = _baseline(request.baseline, list(by_label))
    out, evaluator = request.out, request.evaluator
    with writing_to(out, after="the same command continues from there"), _own(out):
        views = [plan_view(label, group, out / "views") for label, group in by_label.items()] if evaluator else []
        bench = _preflight(evaluator, request.dimensions, out, report) if evaluator else None
        if check_only:
            report(f"{len(videos)} videos of {len(by_label)} methods; all required files exist")
            return 0
        evaluation, paths = _report(request, by_label, views, baseline=baseline, bench=bench, missing=missing, say=say)
    report(f"{len(videos)} videos of {len(by_label)} methods: {', '.join(map(str, paths))}")
    for line in evaluation.failures:
        report(f"failed: {line}")
    return 1 if evaluation.failures else 0


def _report(
    request: Request,
    by_label: Mapping[str, Sequence[Video]],
    views: Sequence[View],
    *,
    baseline: str,
    bench: Bench | None,
    missing: Sequence[str],
    say: Say,
) -> tuple[Evaluation, list[Path]]:
    """Score the videos, and write the report."""
    outcomes: list[Outcome] = []
    if request.evaluator is not None and bench is not None:
        outcomes = evaluate(
            views,
            request.dimensions,
            evaluator=request.evaluator,
            bench=bench,
            folder=request.out,
            say=say,
            keep_views=request.keep_views,
        )
    every = [video for group in by_label.values() for video in group]
    measured = None if request.measurer is None else measure_videos(every, request.out, request.measurer)
    values: Mapping[Video, Mapping[str, float]] = {} if measured is None else measured.values
    notes = [*(() if measured is None else measured.notes)]
    scored = _dimension_values(outcomes)
    evaluation = Evaluation(
        title=request.title,
        rows=[
            Scored(label=label, video=video, values={**values.get(video, {}), **scored.get(video, {})})
            for label, group in by_label.items()
            for video in group
        ],
        baseline=baseline,
        dimensions=request.dimensions,
        measured=measured,
        scores={(o.view.label, o.dimension): o.scores for o in outcomes if o.scores is not None},
        vbench=bench.identity if bench else None,
        notes=notes + [f"{o.view.label}: {note}" for o in outcomes if o.scores for note in o.scores.notes],
        failures=failures(outcomes),
        missing=missing,
    )
    return evaluation, write_report(evaluation, request.out)


def _videos(request: Request, say: Say) -> list[Video]:
    """Read the videos of the folders or of the list, with `--native_frames` if given."""
    videos = read_batches(request.runs, say) if request.videos is None else read_list(request.videos)
    if request.native_frames is None:
        return videos
    return [dataclasses.replace(video, native_frames=request.native_frames) for video in videos]


def _missing(request: Request, videos: Sequence[Video]) -> list[str]:
    """Describe missing videos of each folder; what a list lacks is unknown."""
    return [sentence for root in request.runs if (sentence := what_is_missing(root, videos)) is not None]


def _preflight(evaluator: Evaluator, dimensions: Sequence[str], out: Path, report: Callable[[str], None]) -> Bench:
    try:
        return preflight(evaluator, dimensions, out)
    except PreflightError as error:
        if len(error.details) > 1:
            report("\n".join(error.details))
        raise


def _baseline(asked: str, labels: list[str]) -> str:
    if asked and asked not in labels:
        raise UserError(f"--baseline {asked} is not one of the methods: {', '.join(labels)}")
    return asked or ("direct" if "direct" in labels else labels[0])


@contextlib.contextmanager
def _own(out: Path) -> Iterator[None]:
    """Lock the folder for the block; UserError if another evaluation holds it, or it cannot be written to."""
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold(out / "lock"))
        except HeldError as error:
            raise UserError(
                f"another evaluation works in {out}: {error.who}; wait for it, or choose another --out"
            ) from error
        except OSError as error:
            raise UserError(f"cannot write to the folder {out}: {error.strerror}") from error
        yield


def _dimension_values(outcomes: Sequence[Outcome]) -> dict[Video, dict[str, float]]:
    values: dict[Video, dict[str, float]] = {}
    for outcome in outcomes:
        if outcome.scores is None:
            continue
        for item in outcome.view.items:
            values.setdefault(item.video, {})[outcome.dimension] = outcome.scores.videos[item.stem]
    return values
