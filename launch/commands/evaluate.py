"""evaluate.py: score a batch's videos with VBench-Long, in its own environment, and proxies, and write the report."""

import os
import sys
from pathlib import Path

from jsonargparse import Namespace

from engine.errors import UserError
from engine.paths import expand
from engine.shown import say_on_stderr
from evaluation.measure import Measurer
from evaluation.scoring.score import Request, score
from evaluation.vbench.bench import Evaluator
from evaluation.vbench.dimensions import parse_dimensions
from launch.arguments.evaluate import read_gpus
from launch.process.stopping import Stopped


def run(options: Namespace) -> int:
    """Score what is missing, and report; returns 1 if a part of VBench failed."""
    out = _out(options)
    request = Request(
        runs=[expand(word.strip()) for word in options.runs.split(",") if word.strip()],
        videos=None if options.runs else expand(options.videos),
        out=out,
        title=f"Evaluation of {options.runs or options.videos}",
        dimensions=parse_dimensions(options.dimensions),
        evaluator=_evaluator(options),
        measurer=Measurer(workers=options.workers, progress=sys.stderr.isatty(), say=say_on_stderr)
        if options.proxies
        else None,
        native_frames=options.native_frames,
        baseline=options.baseline,
        keep_views=options.keep_views,
    )
    try:
        return score(request, check_only=options.check, say=say_on_stderr, report=print)
    except KeyboardInterrupt as error:
        raise Stopped(f"what was finished is kept in {out}; the same command continues from there") from error


def _evaluator(options: Namespace) -> Evaluator | None:
    if not options.vbench:
        return None
    gpus = read_gpus(options)
    checkout = expand(options.vbench).absolute()
    if not checkout.is_dir():
        raise UserError(f"--vbench {checkout} is not a folder; clone Vchitect/VBench there")
    return Evaluator(
        checkout=checkout,
        # Not resolved: the Python of a virtual environment is a symbolic link.
        python=expand(options.python).absolute(),
        weights=expand(options.weights).absolute(),
        device=options.device,
        gpus=tuple(map(int, gpus)),
        time_limit=options.time_limit,
        environment=dict(os.environ),
    )


def _out(options: Namespace) -> Path:
    if options.out:
        return expand(options.out).absolute()
    return ((expand(options.runs) if options.runs else expand(options.videos).parent) / "evaluation").absolute()
