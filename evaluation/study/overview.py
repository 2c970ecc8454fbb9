"""First section of the findings page: FreeSpec's results, the effect of each of its parts, and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.files.tables import markdown_table
from evaluation.comparison.plots import draw_metrics, save_figure
from evaluation.comparison.summary import Row, from_json
from evaluation.markdown import Report, estimate, number

METRICS = ("speed_error", "repetition", "motion_as_captioned", "rgb_drift")
"""Measures of the section: motion as captioned, loops, and the drift that guidance should reduce."""

COMPARED = ("direct", "sliding_window")
ROWS = {
    "GB": "global basis, fixed weight, no residual",
    "LB-fixed": "local basis instead",
    "RA+TA": "and weights by rank and time",
    "F-GR": "and a constant residual",
}
"""Rows of the ablation that lead to FreeSpec, and what each changes of the one above it."""

RESIDUAL = """With it off, the final latents of three prompts were 0.05, 0.53 and 0.39 (relative) from those of
`sliding_window`, and 0.32, 0.39 and 0.68 from those of FreeSpec: it is a large part of the effect, and its share varies. In the paper's ablation it
brings most of the consistency."""


def can_tell(reports: Mapping[str, Report | None]) -> bool:
    """Whether the reports have all methods and measures of the section."""
    needed = {"methods": {*COMPARED, "freespec"}, "ablation": {*ROWS, "freespec"}}
    return all(
        report is not None and {(label, metric) for label in labels for metric in METRICS} <= _summary(report).keys()
        for report, labels in ((reports[name], labels) for name, labels in needed.items())
    )


def overview(reports: Mapping[str, Report | None], figure: str) -> str:
    """The section, from reports of which `can_tell` holds."""
    methods, ablation = reports["methods"] or {}, reports["ablation"] or {}
    settings, seconds = methods["comparison"]["settings"], methods["times"]
    denoised = ", ".join(f"{seconds[label]['denoise']:.3g} s with `{label}`" for label in (*COMPARED, "freespec"))
    lines = [
        f"**In short**, on {methods['pairs']['made']} videos of each method ({settings['video.num_frames']} frames, "
        f"{settings['sampler.num_steps']} steps; bold: differs from `freespec`, paired by prompt):",
        "",
        _table(methods, ablation),
        "`speed_error` is the distance from the captioned speed, `repetition` is 1 for a loop, `motion_as_captioned` is the share of videos with the "
        "captioned motion, `rgb_drift` is how far the object's colour moves over time.",
        "",
        f"- **FreeSpec**, against `{methods['baseline']}`: {_reads(methods, 'freespec')}.",
        f"- **Local basis** (GB to LB-fixed): {_from_to(ablation, 'GB', 'LB-fixed')}.",
        f"- **Weights by rank and time** (LB-fixed to RA+TA): {_from_to(ablation, 'LB-fixed', 'RA+TA')}.",
        f"- **Residual** (RA+TA to `freespec`): {_from_to(ablation, 'RA+TA', 'freespec')}; without it {_reads(ablation, 'RA+TA')}. {RESIDUAL}",
        f"- **Residual that falls with time** (F-GR to `freespec`): {_from_to(ablation, 'F-GR', 'freespec')}.",
        f"- **Cost.** Denoising a video took {denoised}.",
        "- **Limits.** One small model of a simple world; each section below states its own.",
        "",
        f"![Means and intervals of four measures: two methods, and the rows of the ablation up to FreeSpec]({figure})",
        "",
    ]
    return "\n".join(lines)


def _reads(report: Report, label: str) -> str:
    """List the measures in which a label is above or below the baseline, and the undecided ones."""
    words: dict[str, list[str]] = {"less": [], "more": [], "not decided:": []}
    for metric in METRICS:
        row = _summary(report)[label, metric]
        sign = "more" if row["difference"]["mean"] > 0 else "less"
        words[sign if row["differs"] else "not decided:"].append(f"`{metric}`")
    return "; ".join(f"{word} {' and '.join(found)}" for word, found in words.items() if found)


def _from_to(report: Report, before: str, after: str) -> str:
    """The means of two labels, measure by measure."""
    summary = _summary(report)
    means = {
        metric: [number(summary[label, metric]["mean"]["mean"]) for label in (before, after)] for metric in METRICS
    }
    return ", ".join(f"`{metric}` {first} to {second}" for metric, (first, second) in means.items())


def draw_parts(reports: Mapping[str, Report | None], stem: Path) -> None:
    """Draw the picture of the section as STEM.png."""
    rows = []
    for name, labels in (("methods", COMPARED), ("ablation", (*ROWS, "freespec"))):
        summary = _summary(reports[name] or {})
        for found in (summary[label, metric] for label in labels for metric in METRICS):
            names = {key: found[key] for key in ("label", "metric", "unit")}
            rows.append(Row(**names, mean=from_json(found["mean"]), difference=None))
    save_figure(draw_metrics(rows, [*COMPARED, *ROWS, "freespec"]), stem, kinds=("png",))


def _table(methods: Report, ablation: Report) -> str:
    """Means of both methods, of the rows of the ablation, and of FreeSpec."""
    words = {label: f"`{label}`" for label in COMPARED}
    words |= {label: f"{label}: {what}" for label, what in ROWS.items()} | {
        "freespec": "`freespec`: and the residual falls with time"
    }
    rows = []
    for label, word in words.items():
        summary = _summary(methods if label in COMPARED else ablation)
        texts = [estimate(summary[label, metric]["mean"]) for metric in METRICS]
        differ = [label in ROWS and summary[label, metric]["differs"] for metric in METRICS]
        rows.append([word, *(f"**{text}**" if bold else text for text, bold in zip(texts, differ, strict=True))])
    units = _summary(ablation)
    return markdown_table(
        ["method", *(f"`{metric}` ({units['freespec', metric]['unit']})" for metric in METRICS)], rows
    )


def _summary(report: Report) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a report's table by label and measure."""
    return {(row["label"], row["metric"]): row for row in report["summary"]}
