"""findings.py: make the parts of a study, report on them, and write its page."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from engine.config import ModelConfig
from engine.errors import UserError
from engine.files.whole import atomic_path
from engine.paths import REPOSITORY, expand
from engine.planner.model import read_model
from evaluation.comparison.quality import PARTS
from evaluation.study.bench import write_bench
from evaluation.study.findings import write_findings
from evaluation.study.parts import Part, Study, words
from evaluation.study.reports import KEPT, TABLES, read_report, refuse_mixed
from evaluation.study.wan_section import EMBEDDED, WAN, transfer_section
from launch.arguments.findings import Arguments
from launch.cli.start import run_here
from launch.process.stopping import Stopped
from launch.video.outputs import claim_outputs

# glibc returns large temporaries to the system at every free and asks for them again, which costs some 5 % of a CPU run; 32 MiB is the
# most that older versions take. Other C libraries do not read the two.
_ONE_CORE = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
}


class PartFailedError(UserError):
    """A command of the study failed; its own message says why."""


def run(asked: Arguments) -> None:
    """Make the requested parts, report on existing ones, and write the page; UserError for an invalid report."""
    runs, kept, page = (asked.place(name) for name in ("runs", "kept", "page"))
    try:
        make_parts(asked.study, asked.make)
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
                transfer=transfer_section(
                    *(read_model(ModelConfig(path=path, offline=True)) for path in (WAN, EMBEDDED))
                ),
                overwrite=asked.overwrite,
            )
    missing = [name for name, report in reports.items() if report is None]
    print(f"{page}: written" + (f"; not measured yet: {', '.join(missing)}" if missing else ""))


def make_parts(study: Study, names: Sequence[str]) -> None:
    """Run these parts of a study; each continues from what exists. PartFailedError if one fails."""
    for part in (study.parts[name] for name in names):
        kept = [study.places["kept"] / part.name / file for file in part.keep]
        if part.once and all(path.exists() for path in kept):
            continue
        shards = [["--shard", f"{shard}/{study.shards}"] for shard in range(1, study.shards + 1)]
        _run(part, shards if part.command == "compare" else [[]])
        for path in kept:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as file_there:
                shutil.copyfile(expand(part.settings["out"]) / path.name, file_there)


def _run(part: Part, shares: Sequence[Sequence[str]]) -> None:
    """Run the command once per entry of `shares`, concurrently; PartFailedError if one fails."""
    command = [sys.executable, str(REPOSITORY / "launch" / f"{part.command}.py"), *words(part.settings)]
    running = [subprocess.Popen([*command, *share], env=os.environ | _ONE_CORE) for share in shares]
    try:
        codes = [process.wait() for process in running]
    except BaseException:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        raise
    if any(codes):
        failed = sum(map(bool, codes))
        raise PartFailedError(f"{part.name}: {failed} of {len(codes)} processes of {part.command}.py failed, see above")
