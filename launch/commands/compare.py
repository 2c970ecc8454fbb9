"""compare.py: methods on the same prompts and seeds, one load of the model, and a report."""

from engine.batch.locks import Shard
from engine.files.checks import check_places
from engine.paths import expand
from engine.progress import enabled
from evaluation.comparison.kept_measures import check_kept, measure_every
from evaluation.comparison.report import NothingToReportError, write_report
from evaluation.comparison.store import Comparison
from evaluation.measure import Measurer
from launch.arguments.compare import Arguments
from launch.batching.comparison import model_facts, open_maker, stoppable
from launch.batching.devices import arrange_for
from launch.process.environment import is_first_rank
from launch.video.prompts import look_at_prompts


def run(asked: Arguments) -> None:
    """Make missing videos on all ranks or replicas, then measure and report on rank 0."""
    given, shard, folder = asked.given, asked.shard, asked.report
    _, variants = arrange_for(asked.config, asked.variants, asked.replicas)
    comparison = Comparison(
        folder=expand(given.out),
        model=model_facts(variants[0].config),
        variants=variants,
        prompts=asked.prompts.texts,
        seeds=asked.seeds,
        kept_file=None if given.measures is None else expand(given.measures),
        long_measures=given.long_measures,
    )
    if not given.report_only:
        make_videos(comparison, asked)
    if not is_first_rank():
        return
    measurer = Measurer(workers=asked.given.workers, progress=enabled(asked.config.output.progress))
    if shard is not None:
        with stoppable(comparison.folder):
            print(_measure_shard(comparison, shard, measurer=measurer))
        return
    comparison.check()
    check_kept(comparison)
    check_places([folder / "report.json"])
    try:
        with stoppable(comparison.folder):
            summary = write_report(comparison, folder=folder, baseline=asked.baseline, measurer=measurer)
    except NothingToReportError as error:
        if not given.report_if_any:
            raise
        summary = str(error)
    print(summary)


def make_videos(comparison: Comparison, asked: Arguments) -> None:
    """Make the missing videos of a comparison's shard; all ranks call this.

    UserError before anything is loaded if the folder of the report cannot be written to.
    """
    shard, config = asked.shard, comparison.arranged_for
    agree = [*comparison.batch.config_ids.values(), *comparison.prompts, str(comparison.seeds), str(shard)]
    with open_maker(config, agree=agree, verbose=asked.given.verbose, replicas=asked.replicas, shard=shard) as maker:
        maker.check(comparison)
        look_at_prompts(config, asked.prompts.named, maker.context, variants=comparison.variants)
        maker.context.check_on_first(lambda: check_places([asked.report / "report.json"]))
        maker.make(comparison)


def _measure_shard(comparison: Comparison, shard: Shard, *, measurer: Measurer) -> str:
    """Measure this shard's videos, so that the report only reads."""
    videos = comparison.videos_of(shard)
    measure_every(comparison, videos, measurer=measurer)
    return (
        f"{comparison.folder}: {shard.name} is made and measured, {len(videos)} videos; when every shard is, the same "
        "command with --report_only and without --shard writes the report"
    )
