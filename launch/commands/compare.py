"""compare.py: methods on the same prompts and seeds, one load of the model, and a report."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from engine.batch.locks import Shard, own_shard
from engine.engine import LongVideoEngine
from engine.files.checks import check_places
from engine.paths import expand
from engine.progress import enabled
from launch.arguments.compare import Arguments, read
from launch.arguments.prompts import Prompts
from launch.comparison.kept_measures import check_kept, measure_every
from launch.comparison.make import check_variants, make_missing, missing_videos
from launch.comparison.report import NothingToReportError, write_report
from launch.comparison.store import Comparison
from launch.process.stopping import Stopped
from launch.prompts import look_at_prompts
from launch.ranks.environment import RankEnv
from launch.ranks.join import open_ranks


def main(argv: list[str]) -> None:
    """Read the command line, make what is missing, and report."""
    run(read(argv))


def run(asked: Arguments) -> None:
    """Make what is missing of the videos on all ranks, then measure and report on rank 0."""
    given, shard, folder = asked.given, asked.shard, asked.report
    comparison = Comparison(
        folder=expand(given.out),
        variants=asked.variants,
        prompts=asked.prompts.texts,
        seeds=asked.seeds,
        kept_file=None if given.measures is None else expand(given.measures),
    )
    if not given.report_only:
        make_videos(comparison, asked.prompts, shard or Shard(), report=folder, verbose=given.verbose)
    rank_env = RankEnv.of_environment()
    if rank_env is not None and rank_env.rank > 0:
        return
    progress = enabled(asked.config.output.progress)
    if shard is not None:
        print(_unless_stopped(comparison, lambda: _measure_shard(comparison, shard, progress=progress)))
        return
    comparison.check()
    check_kept(comparison)
    check_places([folder / "report.json"])
    try:
        told = _unless_stopped(
            comparison, lambda: write_report(comparison, folder=folder, baseline=asked.baseline, progress=progress)
        )
    except NothingToReportError as error:
        if not given.report_if_any:
            raise
        told = str(error)
    print(told)


def make_videos(comparison: Comparison, prompts: Prompts, shard: Shard, *, report: Path, verbose: bool) -> None:
    """Make every video of a comparison's shard that is not there yet; all ranks call this.

    UserError before anything is loaded if `report`, the folder that is to tell of them, cannot be written to.
    """
    agree = [*comparison.batch.config_ids.values(), *comparison.prompts, str(comparison.seeds), str(shard)]
    config = comparison.arranged_for
    with open_ranks(config, prompts=agree, verbose=verbose) as context, contextlib.ExitStack() as stack:
        check_variants(comparison.variants, context)
        look_at_prompts(config, prompts.named, context)
        context.check_on_first(lambda: check_kept(comparison))
        context.check_on_first(comparison.open)
        context.check_on_first(lambda: check_places([report / "report.json"]))
        context.check_on_first(lambda: stack.enter_context(own_shard(comparison.folder, shard)))
        missing = missing_videos(comparison, context, shard)
        if missing:
            engine = stack.enter_context(contextlib.closing(LongVideoEngine(config, context.ranks)))
            make_missing(engine, comparison, missing, context)


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
            f"while measuring; every video that was made lies in {comparison.folder}; the same command continues"
        ) from error
