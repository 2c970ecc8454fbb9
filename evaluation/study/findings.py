"""Write the page of findings from the reports of a study; every number comes from a report."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from engine.errors import UserError
from engine.files.tables import emptier
from engine.files.whole import atomic_path, describe_error, write_text
from evaluation.markdown import Report
from evaluation.study import sections
from evaluation.study.overview import can_tell, draw_parts, overview
from evaluation.study.reports import OTHER_MODEL
from evaluation.study.timelines_and_extensions import extensions, timelines

_PICTURE = "figures/findings-parts.png"
TITLE = "# Findings on the embedded model\n"
INTRO = """Written by `python launch/findings.py` from the reports of

    make findings       # all six methods, also from the same noise, and the seven ablation rows on held-out prompts; spectra of 20 of them
    make calibrate      # the search for FreeSpec's open settings

do not edit. The measures of every video are in [{kept}]({kept}); [compare.md](compare.md#the-full-tables) explains how to make all videos again,
and [what each measure is](compare.md#how-to-read-the-numbers). Intervals are 95 % bootstrap intervals over prompts, and differences are
paired by prompt. `prompts with that sign` counts prompts whose difference has the sign of the mean; if they are few, a few prompts decide
it.
"""


def write_findings(
    page: Path,
    reports: Mapping[str, Report | None],
    *,
    runs: Path,
    kept: Path,
    score_parts: Mapping[str, str],
    transfer: str,
    overwrite: bool,
) -> None:
    """Write the page, and copy the plots that it shows; `Not measured yet` stands for a report that is None.

    UserError if a file cannot be written, or, unless `overwrite`, if the page would lose tables.

    Args:
        page: the Markdown file.
        reports: report.json by name.
        runs: folder of the comparisons' reports.
        kept: folder of the measures and of the analysis.
        score_parts: what each part of the calibration's score is.
        transfer: the last section.
        overwrite: whether a page may lose tables.
    """
    plots = {"methods": runs / "methods/plots/clips.png", "analysis": kept / "analysis/rank-progress.png"}
    plots = {name: plot for name, plot in plots.items() if reports[name] is not None and plot.is_file()}
    figures = {name: _address(plots[name], page) if name in plots else None for name in ("methods", "analysis")}
    short = can_tell(reports)
    text = "\n".join(
        [
            TITLE,
            *([overview(reports, _PICTURE)] if short else []),
            INTRO.format(kept=os.path.relpath(kept.resolve(), page.resolve().parent)),
            *_so_far(reports),
            sections.concentration(reports["analysis"], figures["analysis"]),
            sections.low_rank(reports["analysis"]),
            *sections.claims(reports["methods"], sections.report_command(reports["methods"], runs=runs, kept=kept)),
            sections.method_tables("All six methods", reports["methods"], figures["methods"]),
            sections.same_noise(reports["methods"], reports["noise"]),
            sections.method_tables(
                "The ablation: rows of the paper's Table 3 (`freespec` is LB + RA + TA + T-GR)", reports["ablation"]
            ),
            sections.step_count(reports["methods"], reports["steps"]),
            sections.calibration(reports["calibration"], score_parts),
            timelines(reports["timelines"]),
            extensions(reports["extensions"], reports[OTHER_MODEL]),
            transfer,
            "",
        ]
    )
    try:
        if page.is_file() and not overwrite:
            refuse_emptier(page, text)
        for name, plot in plots.items():
            _copy(plot, page.parent / str(figures[name]))
        if short:
            draw_parts(reports, page.parent / _PICTURE.removesuffix(".png"))
        write_text(page, text)
    except OSError as error:
        raise UserError(describe_error(error, page)) from error


def _so_far(reports: Mapping[str, Report | None]) -> list[str]:
    """Name the reports that are missing or incomplete, in a sentence; empty if none is."""
    parts = []
    for name, report in reports.items():
        if report is not None and "pairs" in report and report["pairs"]["made"] < report["pairs"]["asked"]:
            parts.append("`{}` covers {made} of {asked} pairs of prompt and seed".format(name, **report["pairs"]))
    missing = [f"`{name}`" for name, report in reports.items() if report is None]
    if missing:
        parts.append(f"not measured: {', '.join(missing)}")
    return [f"**Not everything is measured yet**: {'; '.join(parts)}.\n"] if parts else []


def refuse_emptier(page: Path, text: str) -> None:
    """Raise UserError if the existing page has tables, or videos in them, that the new text lacks."""
    lost = emptier(page.read_text(encoding="utf-8", errors="replace"), text)
    if lost:
        more = f" and {len(lost) - 1} more sections" if len(lost) > 1 else ""
        raise UserError(
            f"{page} has tables of more than these reports hold ({lost[0]!r}{more}), and stays as it is; choose another --page, or add "
            "--overwrite (`make findings-page` makes the reports of what is kept in docs/findings)"
        )


def _address(plot: Path, page: Path) -> str:
    """Return the path of a plot relative to the page, copying it unless it lies below the page's folder."""
    if plot.resolve().is_relative_to(page.parent.resolve()):
        return plot.resolve().relative_to(page.parent.resolve()).as_posix()
    return f"figures/findings-{plot.name}"


def _copy(plot: Path, copied: Path) -> None:
    if plot.resolve() == copied.resolve():
        return
    try:
        copied.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(copied) as part:
            shutil.copyfile(plot, part)
    except OSError as error:
        raise UserError(f"cannot copy {plot} to {copied.parent}: {error.strerror or error}") from error
