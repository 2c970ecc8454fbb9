"""Read the report.json files of a study, and check that they are complete and of the same weights."""

import itertools
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files.trees import parse_json
from engine.identity import flat
from engine.shown import quoted
from evaluation.study.wan_section import EMBEDDED

Report = dict[str, Any]
TABLES = ("methods", "noise", "ablation", "steps")
"""Reports of compare.py; the others are `analysis` (analyze.py), `calibration` (calibrate.py), and those of two benchmarks."""
OTHER_MODEL = "extensions-ltx"
"""The report that is of other weights than all others."""
KEPT = ("analysis", "calibration", "timelines", "extensions", OTHER_MODEL)
"""Reports that are kept themselves."""

_STEPS = "sampler.num_steps"
_SETTINGS = tuple(f"comparison/settings/{key}" for key in ("checkpoint", "video.num_frames", _STEPS))
_OF_TABLES = (
    "comparison/variants",
    "comparison/prompts",
    "pairs/made",
    "pairs/asked",
    "notes",
    "baseline",
    "noise",
    "summary",
    "videos",
    "times",
)
_NEEDED = {
    "analysis": ("comparison/prompts", "comparison/settings/method.name", "spectra/stages", "spectra/heads_that_fall"),
    "calibration": (
        *("num_steps/search", "num_steps/judged"),
        *("search_seed", "space", "trials", "rounds", "best", "judged"),
    ),
    "timelines": ("comparison/settings/sampler.guidance_scale", "videos"),
    "extensions": ("comparison/settings/sampler.guidance_scale", "videos"),
    OTHER_MODEL: ("comparison/settings/model", "comparison/settings/sampler.guidance_scale", "videos"),
}
_OF_LOW_RANK = ("metric", "ratio", "unit", "prompts", "mean", "difference", "low", "high")
_NOTHING = object()


def read_report(path: Path, name: str) -> Report | None:
    """Read the report `name`, of compare.py unless it is kept itself; None if it does not exist, UserError if it lacks a key of the page."""
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error}); make it again") from error
    report = parse_json(data, str(path), remedy="make it again")
    lacking = next(_lacking(report, name), None)
    if lacking is not None:
        raise UserError(f"{path} lacks {lacking}: it is from another command or an older version; make it again")
    return report


def model_of(report: Report) -> str:
    """The embedded model of a benchmark's report; others name none, and are of the first."""
    return report["comparison"]["settings"].get("model", EMBEDDED)


def report_name(benchmark: str, model: str) -> str:
    """The name of a benchmark's report on an embedded model."""
    return benchmark if model == EMBEDDED else f"{benchmark}-{model.rpartition('/')[2]}"


def refuse_mixed(reports: Mapping[str, Report | None], files: Mapping[str, Path]) -> None:
    """Raise UserError if reports are of different weights, or tables of different settings or prompts.

    Tables may differ in their variants and the number of prompts, and `steps` in the number of steps. Videos are paired by
    the index of their prompt. The report of another model is of that model, and made as the one it stands beside.
    """
    there = [(name, report) for name, report in reports.items() if report is not None]
    for name, report in there:
        if name != report_name(name.partition("-")[0] if name in KEPT else name, model := model_of(report)):
            raise UserError(
                f"{files[name]} is of {model}, and is not the report of that model on the page; make it again"
            )
    for (one, first), (other, second) in itertools.combinations(there, 2):
        before, now = (_decisive(report, {one, other}) for report in (first, second))
        if "steps" in (one, other):
            before.pop(_STEPS, None)
            now.pop(_STEPS, None)
        key = next((key for key in before if key in now and before[key] != now[key]), None)
        if key is not None:
            raise UserError(
                f"{files[one]} and {files[other]} are of different runs: {key} is {before[key]} in the first and "
                f"{now[key]} in the second; make one of them again"
            )
        if {one, other} <= {*TABLES}:
            for number, prompts in enumerate(
                zip(*(report["comparison"]["prompts"] for report in (first, second)), strict=False)
            ):
                if prompts[0] != prompts[1]:
                    raise UserError(
                        f"{files[one]} and {files[other]} are of different prompts: number {number} is {quoted(prompts[0])} in the first "
                        f"and {quoted(prompts[1])} in the second; make one of them again"
                    )


def _decisive(report: Report, names: Set[str]) -> dict[str, Any]:
    """What two reports of these names have in common."""
    settings = report["comparison"]["settings"]
    if OTHER_MODEL in names:
        beside = OTHER_MODEL.partition("-")[0] in names
        return {key: value for key, value in settings.items() if beside and key not in ("model", "checkpoint")}
    if not names <= {*TABLES}:
        return {"checkpoint": settings["checkpoint"]}
    return settings | flat(report["comparison"]["variants"])


def _lacking(report: Any, name: str) -> Iterator[str]:
    """Yield the keys that the page needs and the report lacks."""
    for path in (*_SETTINGS, *_NEEDED.get(name, _OF_TABLES)):
        found = report
        for key in path.split("/"):
            found = found.get(key, _NOTHING) if isinstance(found, dict) else _NOTHING
        if found is _NOTHING:
            yield path
    if name == "analysis" and isinstance(report, dict):
        yield from (
            f"{key} of low_rank" for row in report.get("low_rank", ()) for key in _OF_LOW_RANK if key not in row
        )
    if name not in KEPT and isinstance(report, dict):
        metrics = {row["metric"] for row in report.get("summary", ())}
        for video in report.get("videos", ()):
            yield from (f"{metric} of {video['label']}" for metric in sorted(metrics - video["values"].keys()))
