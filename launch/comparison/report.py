"""Write the report of a comparison from its measures, with `evaluation.study.report`."""

from pathlib import Path

from engine.errors import UserError
from evaluation.study.report import Compared
from evaluation.study.report import write_report as write_study_report
from evaluation.study.summary import comparable
from launch.comparison.checks import is_native
from launch.comparison.kept_measures import add_kept, measure_there
from launch.comparison.measure import native_frames, not_world, strange_prompts, units_of
from launch.comparison.store import Comparison
from launch.video.outputs import writing_report


class NothingToReportError(UserError):
    """No prompt and seed has a video of every method yet."""


def write_report(comparison: Comparison, *, folder: Path, baseline: str, progress: bool) -> str:
    """Measure the videos, keep the measures, and write the report into `folder`; return a line that summarises it.

    Compares prompts and seeds for which every variant has a video; NothingToReportError if there are none.
    """
    found = measure_there(comparison, progress=progress)
    add_kept(comparison, found)
    measured = comparable(found, [variant.label for variant in comparison.variants])
    if not measured:
        raise NothingToReportError(
            f"{comparison.folder} has no prompt and seed with a video of every method yet; nothing to report"
        )
    compared = _compared(comparison)
    with writing_report(folder):
        return write_study_report(compared, measured, folder=folder, baseline=baseline)


def _compared(comparison: Comparison) -> Compared:
    """Collect the facts of a comparison for its report."""
    return Compared(
        described=comparison.describe(),
        config=comparison.config,
        noise={variant.label: variant.config.noise[0] for variant in comparison.variants},
        prompts=comparison.prompts,
        num_seeds=len(comparison.seeds),
        units=units_of(comparison),
        clip_frames=native_frames(comparison),
        is_native=is_native(comparison.config),
        not_world=not_world(comparison),
        num_world=len(comparison.prompts) - len(strange_prompts(comparison)),
        kept_file=comparison.kept_file,
        long=comparison.long_measures,
    )
