"""findings.py: make the parts of a study, report on them, and write its page."""

from evaluation.study.bench import write_bench
from evaluation.study.findings import write_findings
from evaluation.study.quality import PARTS
from launch.arguments.findings import Arguments
from launch.cli.start import run_here
from launch.process.stopping import Stopped
from launch.study.reports import KEPT, TABLES, read_report, refuse_mixed
from launch.study.transfer import transfer_section
from launch.video.outputs import claim_outputs


def run(asked: Arguments) -> None:
    """Make the requested parts, report on existing ones, and write the page; UserError for an invalid report."""
    runs, kept, page = (asked.place(name) for name in ("runs", "kept", "page"))
    try:
        asked.study.make(asked.make)
    except KeyboardInterrupt as error:
        raise Stopped("while the study was made; the same command continues from what exists") from error
    for argv in asked.study.reports():
        run_here("compare", argv)
    is_bench = asked.study.writes == "bench"
    files = {name: runs / name / "report.json" for name in (asked.study.report_names if is_bench else TABLES)}
    files |= {} if is_bench else {name: kept / name / "report.json" for name in KEPT}
    reports = {name: read_report(file, name) for name, file in files.items()}
    refuse_mixed(reports, files)
    with claim_outputs([page], flag="--page"):
        if is_bench:
            write_bench(page, reports, kept=kept, overwrite=asked.overwrite)
        else:
            write_findings(
                page,
                reports,
                runs=runs,
                kept=kept,
                score_parts=PARTS,
                transfer=transfer_section(),
                overwrite=asked.overwrite,
            )
    missing = [name for name, report in reports.items() if report is None]
    print(f"{page}: written" + (f"; not measured yet: {', '.join(missing)}" if missing else ""))
