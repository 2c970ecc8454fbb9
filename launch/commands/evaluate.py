"""evaluate.py: a batch's videos, scored by VBench-Long in its own environment and by proxies here, and the report."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jsonargparse import Namespace

from engine.errors import UserError
from engine.files.locks import HeldError, hold
from engine.files.say import Say
from engine.files.storage import writing_to
from engine.paths import expand
from engine.shown import printable
from evaluation.measure import measure_all, measure_all_world
from evaluation.report import Evaluation, write_report
from evaluation.tables import Scored
from evaluation.vbench.bench import Bench, Evaluator, PreflightError, preflight
from evaluation.vbench.dimensions import parse_dimensions
from evaluation.vbench.run import Outcome, evaluate, failures
from evaluation.vbench.stage import View, plan_view
from evaluation.videos import Video, groups, read_batches, read_list, what_is_missing
from evaluation.world import videos_of_world
from launch.arguments.evaluate import read, read_gpus
from launch.process.stopping import Stopped


def main(argv: list[str]) -> int:
    """Read the command line and evaluate."""
    return run(read(argv))


def run(options: Namespace) -> int:
    """Find the videos, check everything, score what is missing, and report; 1 if something of VBench failed."""
    dimensions = parse_dimensions(options.dimensions)
    evaluator = _evaluator(options)
    left_out: list[str] = []
    videos = _videos(options, left_out.append)
    missing = [*left_out, *_missing(options, videos)]
    for sentence in missing:
        _say(f"not everything is there: {sentence}")
    by_label = groups(videos)
    baseline = _baseline(options.baseline, list(by_label))
    out = _out(options)
    with writing_to(out, after="the same command goes on from there"), _own(out):
        views = [plan_view(label, group, out / "views") for label, group in by_label.items()] if evaluator else []
        bench = _preflight(evaluator, dimensions, out) if evaluator else None
        if options.check:
            print(f"{len(videos)} videos of {len(by_label)} methods; everything that was looked at is there")
            return 0
        try:
            return _run(
                options,
                by_label,
                views,
                out=out,
                baseline=baseline,
                dimensions=dimensions,
                tools=(evaluator, bench),
                missing=missing,
            )
        except KeyboardInterrupt as error:
            raise Stopped(f"what was finished is kept in {out}; the same command goes on from there") from error


def _run(
    options: Namespace,
    by_label: Mapping[str, Sequence[Video]],
    views: Sequence[View],
    *,
    out: Path,
    baseline: str,
    dimensions: Sequence[str],
    tools: tuple[Evaluator | None, Bench | None],
    missing: Sequence[str],
) -> int:
    evaluator, bench = tools
    outcomes: list[Outcome] = []
    if evaluator is not None and bench is not None:
        outcomes = evaluate(
            views, dimensions, evaluator=evaluator, bench=bench, folder=out, say=_say, keep_views=options.keep_views
        )
    every = [video for group in by_label.values() for video in group]
    values, exact, not_world, left_out = _measures(options, every, out)
    scored = _dimension_values(outcomes)
    evaluation = Evaluation(
        title=f"Evaluation of {options.runs or options.videos}",
        rows=[
            Scored(label=label, video=video, values=_of(video, values, exact) | scored.get(video, {}))
            for label, group in by_label.items()
            for video in group
        ],
        baseline=baseline,
        dimensions=dimensions,
        proxies=options.proxies,
        not_world=not_world,
        scores={(o.view.label, o.dimension): o.scores for o in outcomes if o.scores is not None},
        vbench=bench.identity if bench else None,
        notes=left_out + [f"{o.view.label}: {note}" for o in outcomes if o.scores for note in o.scores.notes],
        failures=failures(outcomes),
        missing=missing,
    )
    paths = write_report(evaluation, out)
    print(f"{len(every)} videos of {len(by_label)} methods: {', '.join(map(str, paths))}")
    for line in evaluation.failures:
        print(f"failed: {line}")
    return 1 if evaluation.failures else 0


def _videos(options: Namespace, say: Say) -> list[Video]:
    """Those of the folders or of the list, with the native length that is given for them, if one is."""
    videos = read_batches(_roots(options), say) if options.runs else read_list(expand(options.videos))
    if options.native_frames is None:
        return videos
    return [dataclasses.replace(video, native_frames=options.native_frames) for video in videos]


def _roots(options: Namespace) -> list[Path]:
    return [expand(word.strip()) for word in options.runs.split(",") if word.strip()]


def _missing(options: Namespace, videos: Sequence[Video]) -> list[str]:
    """What the folders were asked for and have not; nothing is known of what a list might have had."""
    return [sentence for root in _roots(options) if (sentence := what_is_missing(root, videos)) is not None]


def _measures(
    options: Namespace, videos: Sequence[Video], out: Path
) -> tuple[dict[Path, dict[str, float]], dict[Path, dict[str, float]], str | None, list[str]]:
    """Proxies and exact measures by path, why there are none of the latter, and a sentence on videos that have none."""
    if not options.proxies:
        return {}, {}, "not asked for", []
    proxies = measure_all(videos, out / "proxies", workers=options.nproc, say=_say)
    of_world, reason = videos_of_world(videos)
    if not of_world:
        return proxies, {}, reason, []
    exact = measure_all_world(of_world, out / "world", workers=options.nproc, say=_say)
    share = f"The exact measures of the embedded world are of {len(of_world)} of {len(videos)} videos: {reason}."
    return proxies, exact, None, [] if reason is None else [share]


def _of(video: Video, *measured: Mapping[Path, dict[str, float]]) -> dict[str, float]:
    return {name: value for found in measured for name, value in found.get(video.path, {}).items()}


def _evaluator(options: Namespace) -> Evaluator | None:
    if not options.vbench:
        return None
    gpus = read_gpus(options)
    checkout = expand(options.vbench).absolute()
    if not checkout.is_dir():
        raise UserError(f"--vbench {checkout} is not a folder; clone Vchitect/VBench there")
    return Evaluator(
        checkout=checkout,
        # Not resolved: the Python of a virtual environment is a link, and the link is what makes it one.
        python=expand(options.python).absolute(),
        weights=expand(options.weights).absolute(),
        device=options.device,
        gpus=tuple(map(int, gpus)),
        time_limit=options.time_limit,
        environment=dict(os.environ),
    )


def _preflight(evaluator: Evaluator, dimensions: Sequence[str], out: Path) -> Bench:
    try:
        return preflight(evaluator, dimensions, out)
    except PreflightError as error:
        if len(error.details) > 1:
            print("\n".join(error.details))
        raise


def _baseline(asked: str, labels: list[str]) -> str:
    if asked and asked not in labels:
        raise UserError(f"--baseline {asked} is none of the methods: {', '.join(labels)}")
    return asked or ("direct" if "direct" in labels else labels[0])


def _out(options: Namespace) -> Path:
    if options.out:
        return expand(options.out).absolute()
    return ((expand(options.runs) if options.runs else expand(options.videos).parent) / "evaluation").absolute()


@contextlib.contextmanager
def _own(out: Path) -> Iterator[None]:
    """Hold the folder for the block; UserError if another evaluation does, or it cannot be written to."""
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
            values.setdefault(item.video, {})[outcome.dimension] = outcome.scores.videos[item.stem].score
    return values


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
