"""compare.py: methods on the same prompts and seeds, one load of the model, and a report."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from engine.batch.locks import Shard, own_shard
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.paths import expand
from engine.progress import enabled
from launch.cli import parse_run
from launch.commands.generate import read_prompts
from launch.comparison.checks import check_output, check_seeds
from launch.comparison.kept_measures import check_kept, measure_every
from launch.comparison.make import check_variants, make_missing, missing_videos
from launch.comparison.report import NothingToReportError, write_report
from launch.comparison.store import Comparison
from launch.comparison.variants import read_variants
from launch.outputs import check_outputs
from launch.ranks import check_started, open_ranks
from launch.stopping import Place, Stopped

NAME = "compare.py"
DESCRIPTION = "Make the same prompts and seeds with several methods, measure the videos, and write a report."
METHODS = "direct,sliding_window,freenoise,freelong,freepca,freespec"


def main(argv: list[str]) -> None:
    """Read the settings, make what is missing of the videos on all ranks, then measure and report on rank 0."""
    namespace, config = parse_run(argv, name=NAME, description=DESCRIPTION, add_arguments=_add_arguments)
    check_started(namespace.nproc)
    if namespace.num_seeds < 1:
        raise UserError(f"--num_seeds must be 1 or more, got {namespace.num_seeds}")
    check_seeds(config.sampler.seed, namespace.num_seeds, "--num_seeds")
    check_output(config.output, NAME)
    prompts = choose_prompts(namespace)
    variants = read_variants(namespace.methods, argv, name=NAME, add_arguments=_add_arguments)
    labels = [variant.label for variant in variants]
    baseline = namespace.baseline or labels[0]
    if baseline not in labels:
        raise UserError(f"--baseline {baseline} is none of the compared: {', '.join(labels)}")
    seeds = [config.sampler.seed + number for number in range(namespace.num_seeds)]
    comparison = Comparison(
        folder=expand(namespace.out),
        variants=variants,
        prompts=prompts,
        seeds=seeds,
        kept_file=None if namespace.measures is None else expand(namespace.measures),
    )
    shard = None if namespace.shard is None else Shard.parse(namespace.shard)
    if shard is not None and namespace.report_only:
        raise UserError("--report_only reports on every shard's videos; leave --shard out")
    folder = comparison.folder if namespace.report is None else expand(namespace.report)
    if not namespace.report_only:
        make_videos(comparison, shard or Shard(), report=folder, verbose=namespace.verbose)
    place = Place.of_environment()
    if place is not None and place.rank > 0:
        return
    progress = enabled(config.output.progress)
    if shard is not None:
        print(_unless_stopped(comparison, lambda: _measure_shard(comparison, shard, progress=progress)))
        return
    comparison.check()
    check_kept(comparison)
    _check_report(folder)
    try:
        told = _unless_stopped(
            comparison, lambda: write_report(comparison, folder=folder, baseline=baseline, progress=progress)
        )
    except NothingToReportError as error:
        if not namespace.report_if_any:
            raise
        told = str(error)
    print(told)


def make_videos(comparison: Comparison, shard: Shard, *, report: Path, verbose: bool) -> None:
    """Make every video of a comparison's shard that is not there yet; all ranks call this.

    UserError before anything is loaded if `report`, the folder that is to tell of them, cannot be written to.
    """
    agree = [json.dumps(comparison.describe(), sort_keys=True), str(comparison.seeds), str(shard)]
    config = comparison.arranged_for
    with open_ranks(config, prompts=agree, verbose=verbose) as party, contextlib.ExitStack() as stack:
        check_variants(comparison.variants, party)
        party.check_on_first(lambda: check_kept(comparison))
        party.check_on_first(comparison.open)
        party.check_on_first(lambda: _check_report(report))
        party.check_on_first(lambda: stack.enter_context(own_shard(comparison.folder, shard)))
        missing = missing_videos(comparison, party, shard)
        if missing:
            engine = stack.enter_context(contextlib.closing(LongVideoEngine(config, party.ranks)))
            make_missing(engine, comparison, missing, party)


def _check_report(folder: Path) -> None:
    check_outputs([folder / "report.json"], overwrite=True, overwrite_flag="")


def _measure_shard(comparison: Comparison, shard: Shard, *, progress: bool) -> str:
    """Measure what this process made, so that the report has nothing left to do but to read."""
    videos = comparison.videos_of(shard)
    measure_every(comparison, videos, progress=progress)
    return (
        f"{comparison.folder}: {shard.name} is made and measured, {len(videos)} videos; when every shard is, the same "
        "command with --report_only and without --shard writes the report"
    )


def _unless_stopped(comparison: Comparison, measure: Callable[[], str]) -> str:
    try:
        return measure()
    except KeyboardInterrupt as error:
        raise Stopped(
            f"while measuring; every video that was made lies in {comparison.folder / 'videos'}; "
            "the same command continues"
        ) from error


def choose_prompts(namespace: Namespace) -> list[str]:
    """The first `--num_prompts` prompts; UserError for one that is there twice, which would count as two."""
    prompts = read_prompts(namespace.prompt, namespace.prompt_file)
    twice = next((prompt for index, prompt in enumerate(prompts) if prompt in prompts[:index]), None)
    if twice is not None:
        raise UserError(f"a prompt is there twice, and would count as two: {twice!r}; leave one out")
    count = namespace.num_prompts
    if count is not None and not 1 <= count <= len(prompts):
        raise UserError(f"--num_prompts must lie in [1, {len(prompts)}], the number of prompts, got {count}")
    return prompts[:count]


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        type=str,
        default=METHODS,
        help="comma-separated: METHOD, or METHOD:PRESET.yaml with settings of its own, or NAME=METHOD:PRESET.yaml",
    )
    parser.add_argument("--prompt", type=str, help="what the videos show")
    parser.add_argument("--prompt_file", type=str, help="text file with one prompt a line, instead of --prompt")
    parser.add_argument(
        "--num_prompts", type=int, help="how many of its prompts are used, the first ones (default: all)"
    )
    parser.add_argument("--num_seeds", type=int, default=1, help="seeds per prompt, from sampler.seed on")
    parser.add_argument("--out", type=str, default="runs/compare", help="folder of the videos and the report")
    parser.add_argument("--baseline", type=str, help="method that differences are from (default: the first)")
    parser.add_argument("--report_only", type=bool, default=False, help="make no video; report on those that are there")
    parser.add_argument(
        "--report_if_any", type=bool, default=False, help="it is no error if no prompt has a video of every method yet"
    )
    parser.add_argument(
        "--report", type=str, help="folder of the report, such as one on some of the methods (default: --out)"
    )
    parser.add_argument(
        "--measures",
        type=str,
        help="file that keeps every measure: a video that is in it is not made again, and the report adds its own",
    )
    parser.add_argument(
        "--shard",
        type=str,
        help="i/n: make and measure the i-th of n shares of the pairs of prompt and seed, one process each, without a report",
    )
    parser.add_argument(
        "--nproc", type=int, help="ranks to start on this machine, one per GPU; torchrun starts its own"
    )
    parser.add_argument("--verbose", type=bool, default=False, help="show what every rank says, with its number")
