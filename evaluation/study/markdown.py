"""Format numbers, estimates, and the tables of a comparison as Markdown, from its report.json."""

import math
from collections.abc import Container, Sequence
from typing import Any

from engine.files.tables import markdown_table
from metrics.bootstrap import Estimate

Report = dict[str, Any]


def tables(report: Report, *, without: Container[str] = ()) -> str:
    """Both tables, every measure and method but those of `without`; a difference whose interval leaves out 0 is bold."""
    baseline = report["baseline"]
    labels = [label for label in dict.fromkeys(row["label"] for row in report["summary"]) if label not in without]
    others = [label for label in labels if label != baseline]
    means = _table(report, labels, "mean")
    if not others:
        return means
    return f"{means}\nDifference from {baseline}, paired by prompt:\n\n{_table(report, others, 'difference')}"


def number(value: float | None) -> str:
    """Format a number with three significant digits, avoiding exponents."""
    if value is None or math.isnan(value):
        return "–"
    if abs(value) < 1e-12:  # what rounding leaves of a sum that cancels
        return "0"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def estimate(found: Estimate | dict[str, Any] | None, *, signed: bool = False) -> str:
    """Format an estimate, or its dict in report.json, as `mean [low, high]`, or the mean alone without an interval."""
    if found is None:
        return "–"
    ends = [found[key] if isinstance(found, dict) else getattr(found, key) for key in ("mean", "low", "high")]
    mean, low, high = (_number(end, signed) for end in ends)
    return mean if low == "–" else f"{mean} [{low}, {high}]"


def _table(report: Report, labels: Sequence[str], what: str) -> str:
    cells = {(row["metric"], row["label"]): row for row in report["summary"]}
    metrics = dict.fromkeys((row["metric"], row["unit"]) for row in report["summary"])
    rows = []
    for metric, unit in metrics:
        line = [cells[metric, label] for label in labels]
        signed = what == "difference"
        texts = [estimate(row[what], signed=signed) for row in line]
        if signed:
            texts = [f"**{text}**" if row["differs"] else text for row, text in zip(line, texts, strict=True)]
        rows.append([f"`{metric}` ({unit})", *texts])
    return markdown_table(["measure", *labels], rows)


def _number(value: float | None, signed: bool) -> str:
    """`number` with a minus sign in place of the hyphen, and a plus sign if `signed`."""
    text = number(value)
    if value is None or math.isnan(value):
        return text
    if math.copysign(1.0, value) < 0:
        return text.replace("-", "−", 1)
    return f"+{text}" if signed and value > 0 else text
