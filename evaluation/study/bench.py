"""Write the page of the bench: for each report of compare.py quality beside cost, as tables and in one plot."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files.tables import markdown_table
from engine.files.whole import describe_error, write_text
from evaluation import markdown
from evaluation.comparison.plots import draw_costs, save_figure
from evaluation.comparison.quality import PARTS, score_of
from evaluation.comparison.summary import from_json
from evaluation.markdown import Report, estimate
from evaluation.study.findings import refuse_emptier
from metrics.bootstrap import Estimate, Pair, mean_interval, paired_interval, shared_seed_means

PICTURE = "figures/bench.png"
COLUMNS = {
    "quality": "quality ↑",
    "motion_as_captioned": "motion as told ↑",
    "speed_error": "speed error ↓, px/frame",
    "rgb_drift": "colour drift ↓, levels",
    "loops": "loops",
    "alike_far": "alike far apart",
    "colour_slope": "colour slope ↓",
    "sharpness_slope": "sharpness slope",
    "cuts": "cuts ↓",
}
"""What the tables of many methods show, with the direction of what is better; those without one depend on the prompt."""
NEAR = 0.01
"""Undecided differences of at most this share of the baseline have no row of their own."""
PLOTTED = {"quality": "quality", "loops": "share of videos that loop", "rgb_drift": "colour drift, levels"}
INTRO = """# The bench

Written by `python launch/findings.py --study configs/study/bench.yaml`; `--make x4,x8` makes the videos whose measures [{kept}]({kept}) lacks. Every
method has the same prompts, seeds and noise, on the embedded model.

- **Cost** is the CPU time of denoising over that of the first method. A GPU has other ratios.
- **Quality** is the mean of four shares: {parts}.
- **Loops** is the share of videos that correlate with themselves at a distance by 0.9 or more. [Returning paths count
  too](long-videos.md#measures): compare methods, not with 0. [Other measures](compare.md#the-embedded-world-metricsworldpy).
- Intervals are 95 % over prompts; paired differences are bold if theirs leaves out 0: one in twenty by chance.
- `-iid`: without noise of its own; `freespec-far`: an eighth of the [far keys](far-keys.md).
"""


def write_bench(page: Path, reports: Mapping[str, Report | None], *, kept: Path, overwrite: bool) -> None:
    """Write the page with a section for each report, and the plot of those on more than two methods.

    UserError if a file cannot be written, or, unless `overwrite`, if the page would lose tables or pairs.
    """
    there = {name: report for name, report in reports.items() if report is not None}
    drawn = [_points(report) for report in there.values() if len(labels_of(report)) > 2 and _has_costs(report)]
    lines = [
        INTRO.format(
            kept=os.path.relpath(kept.resolve(), page.resolve().parent),
            parts="; ".join(f"{name}, {what}" for name, what in PARTS.items()),
        )
    ]
    if missing := [f"`{name}`" for name in reports if name not in there]:
        lines.append(f"Not measured yet: {', '.join(missing)}.\n")
    if drawn:
        lines.append(f"![Quality, loops and colour drift of each method beside its CPU time]({PICTURE})\n")
    lines += [_many(report) if len(labels_of(report)) > 2 else _two(report) for report in there.values()]
    try:
        if page.is_file() and not overwrite:
            refuse_emptier(page, "\n".join(lines))
        if drawn:
            save_figure(draw_costs(drawn), (page.parent / PICTURE).with_suffix(""), kinds=("png",))
        write_text(page, "\n".join(lines))
    except OSError as error:
        raise UserError(describe_error(error, page)) from error


def labels_of(report: Report) -> list[str]:
    """The variants of a report, in its order."""
    return list(report["noise"])


def cost(report: Report, label: str) -> Estimate | None:
    """CPU time of denoising over the baseline's; None if the videos' records have none."""
    found = report["times"][label].get("cpu_ratio")
    return None if found is None else from_json(found)


def _has_costs(report: Report) -> bool:
    return any(cost(report, label) is not None for label in labels_of(report))


def quality(report: Report, label: str) -> list[tuple[Pair, float]]:
    """Quality of each video, by prompt and seed."""
    return [
        (
            (each["prompt_index"], each["seed"]),
            score_of({k: math.nan if v is None else v for k, v in each["values"].items()}),
        )
        for each in report["videos"]
        if each["label"] == label
    ]


def mean(report: Report, label: str, metric: str) -> Estimate:
    """The mean of a measure over prompts."""
    if metric == "quality":
        return mean_interval(*shared_seed_means(quality(report, label)))
    return from_json(_row(report, label, metric)["mean"])


def difference(report: Report, label: str, metric: str) -> Estimate:
    """A measure's mean difference from the baseline."""
    if metric == "quality":
        return paired_interval(*shared_seed_means(quality(report, label), quality(report, report["baseline"])))
    return from_json(_row(report, label, metric)["difference"])


def _many(report: Report) -> str:
    """Means and differences, a method in a row."""
    labels, baseline = labels_of(report), report["baseline"]
    found = {name: {mean(report, label, name).mean for label in labels} for name in _shown(report)}
    shown = [name for name in found if found[name] != {0.0}]
    nowhere = [f"{COLUMNS[name].split()[0]} 0" for name in found if name not in shown]
    header = ["method", f"cost, over {baseline}", *(COLUMNS[name] for name in shown)]
    means = [
        [f"`{label}`", estimate(cost(report, label)), *(estimate(mean(report, label, name)) for name in shown)]
        for label in labels
    ]
    others = [
        [f"`{label}`", *(markdown.difference(difference(report, label, name)) for name in shown)]
        for label in labels
        if label != baseline
    ]
    return "\n".join(
        [
            f"## {_frames(report)}: {len(labels)} methods",
            "",
            *_basis(report),
            *([f"Every video has {' and '.join(nowhere)}.", ""] if nowhere else []),
            markdown_table(header, means),
            f"Difference from `{baseline}`:",
            "",
            markdown_table(["method", *(COLUMNS[name] for name in shown)], others),
        ]
    )


def _two(report: Report) -> str:
    """Every measure of two methods, a measure in a row; those that are within `NEAR` of each other are listed."""
    labels, baseline = labels_of(report), report["baseline"]
    [other] = [label for label in labels if label != baseline] or labels
    units = {"quality": "0..1"} | {row["metric"]: row["unit"] for row in report["summary"]}
    found = {name: difference(report, other, name) for name in units}
    means = {name: (mean(report, baseline, name), mean(report, other, name)) for name in units}
    near = [
        name
        for name, each in found.items()
        if not each.leaves_out_zero and abs(each.mean) <= NEAR * abs(means[name][0].mean)
    ]
    rows = [
        [f"`{name}`", *map(estimate, means[name]), markdown.difference(each)]
        for name, each in found.items()
        if name not in near
    ]
    decided = [f"`{name}`" for name, each in found.items() if each.leaves_out_zero]
    told = f"The interval leaves out 0 for {', '.join(decided)}." if decided else "No interval leaves out 0."
    return "\n".join(
        [
            f"## {_frames(report)}: `{other}` against `{baseline}`",
            "",
            *_basis(report),
            f"{other} costs {estimate(cost(report, other))} of {baseline}. {told}",
            "",
            markdown_table(["measure", baseline, other, "difference"], rows),
            *(
                [f"Undecided and within {100 * NEAR:g} %: {', '.join(f'`{name}`' for name in near)}.", ""]
                if near
                else []
            ),
        ]
    )


def _basis(report: Report) -> list[str]:
    """What the numbers of a section are of: pairs made and asked for, steps and guidance."""
    settings = report["comparison"]["settings"]
    counts = (
        f"{report['notes'][0]} {settings['sampler.num_steps']} steps, guidance {settings['sampler.guidance_scale']:g}."
    )
    return [counts, ""]


def _frames(report: Report) -> str:
    return f"{report['comparison']['settings']['video.num_frames']} frames"


def _shown(report: Report) -> list[str]:
    there = {row["metric"] for row in report["summary"]}
    return [name for name in COLUMNS if name == "quality" or name in there]


def _row(report: Report, label: str, metric: str) -> dict[str, Any]:
    return next(row for row in report["summary"] if (row["label"], row["metric"]) == (label, metric))


def _points(report: Report) -> tuple[str, str, dict[str, dict[str, tuple[Estimate, Estimate]]]]:
    """Title, label of the axis of cost, and of each plotted measure (cost, value) by method."""
    points: dict[str, dict[str, tuple[Estimate, Estimate]]] = {}
    for name, title in PLOTTED.items():
        costs: Sequence[tuple[str, Estimate | None]] = [(label, cost(report, label)) for label in labels_of(report)]
        if name in _shown(report):
            points[title] = {label: (x, mean(report, label, name)) for label, x in costs if x is not None}
    return _frames(report), f"CPU time over {report['baseline']}", points
