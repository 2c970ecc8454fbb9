"""compare.py: methods on the same prompts and seeds, one load of the model, and a report."""

import contextlib
from collections.abc import Callable, Sequence

from engine.batch.locks import Shard, own_shard
from engine.engine import LongVideoEngine
from engine.files.checks import check_places
from engine.files.storage import writing_to
from engine.paths import expand
from engine.progress import enabled
from launch.arguments.compare import Arguments
from launch.batching.devices import arrange_variants, check_devices
from launch.batching.drive import make
from launch.batching.options import Replicas
from launch.batching.report import SUPPORT
from launch.batching.work import Work
from launch.comparison.kept_measures import check_kept, measure_every
from launch.comparison.make import check_variants, make_missing, missing_videos
from launch.comparison.report import NothingToReportError, write_report
from launch.comparison.store import Comparison, Video
from launch.process.stopping import Stopped
from launch.ranks.environment import is_first_rank
from launch.ranks.join import DistContext, open_ranks
from launch.video.prompts import look_at_prompts


def run(asked: Arguments) -> int:
    """Make what is missing of the videos on all ranks or replicas, then measure and report on rank 0; returns the exit code."""
    given, shard, folder = asked.given, asked.shard, asked.report
    variants = asked.variants
    if asked.replicas is not None:
        config, variants, _ = arrange_variants(asked.config, variants, asked.replicas)
        check_devices(config, asked.replicas)
    comparison = Comparison(
        folder=expand(given.out),
        variants=variants,
        prompts=asked.prompts.texts,
        seeds=asked.seeds,
        kept_file=None if given.measures is None else expand(given.measures),
    )
    if not given.report_only and (code := make_videos(comparison, asked)):
        return code
    if not is_first_rank():
        return 0
    progress = enabled(asked.config.output.progress)
    if shard is not None:
        print(_unless_stopped(comparison, lambda: _measure_shard(comparison, shard, progress=progress)))
        return 0
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
    return 0


def make_videos(comparison: Comparison, asked: Arguments) -> int:
    """Make the missing videos of a comparison's shard; all ranks call this. Returns the exit code.

    UserError before anything is loaded if the folder of the report cannot be written to.
    """
    shard, replicas = asked.shard or Shard(), asked.replicas
    agree = [*comparison.batch.config_ids.values(), *comparison.prompts, str(comparison.seeds), str(shard)]
    config = comparison.arranged_for
    with contextlib.ExitStack() as stack:
        context = DistContext()
        if replicas is None:
            context = stack.enter_context(open_ranks(config, prompts=agree, verbose=asked.given.verbose))
        check_variants(comparison.variants, context)
        context.check_on_first(lambda: check_kept(comparison))
        look_at_prompts(config, asked.prompts.named, context, variants=comparison.variants)
        context.check_on_first(comparison.open)
        context.check_on_first(lambda: check_places([asked.report / "report.json"]))
        context.check_on_first(lambda: stack.enter_context(own_shard(comparison.folder, shard)))
        missing = missing_videos(comparison, context, shard, at_once=1 if replicas is None else replicas.replicas)
        if missing and replicas is not None:
            return drive(comparison, missing, replicas)
        if missing:
            engine = stack.enter_context(contextlib.closing(LongVideoEngine(config, context.ranks)))
            make_missing(engine, comparison, missing, context)
    return 0


def drive(comparison: Comparison, missing: Sequence[Video], replicas: Replicas) -> int:
    """Make these videos on replicas, including those given up before; returns the exit code."""
    items, files = tuple(video.item for video in missing), comparison.batch_files
    for item in items:
        files.release(item)
    with writing_to(comparison.folder, after=SUPPORT):
        work = Work(done=(), given_up=(), todo=items)
        return make(comparison.config, replicas, comparison.batch, files, work)


def _measure_shard(comparison: Comparison, shard: Shard, *, progress: bool) -> str:
    """Measure this shard's videos, so that the report only reads."""
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
