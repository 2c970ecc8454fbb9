"""Format numbers, estimates, and the tables of a comparison as Markdown, from its report.json."""

import math
from collections.abc import Container, Mapping, Sequence
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


def estimate(found: Estimate | Mapping[str, Any] | None, *, signed: bool = False, decimals: int | None = None) -> str:
    """Format an estimate, or its dict in a report, as `mean [low, high]`, or the mean alone without an interval.

    `decimals`: instead of three significant digits.
    """
    if found is None:
        return "–"
    mean, low, high = (_number(end, signed, decimals) for end in _ends(found))
    return mean if low == "–" else f"{mean} [{low}, {high}]"


def difference(found: Estimate | Mapping[str, Any] | None, *, decimals: int | None = None) -> str:
    """Format an estimate of a difference with its sign, bold if the interval leaves out 0."""
    text = estimate(found, signed=True, decimals=decimals)
    _, low, high = (math.nan,) * 3 if found is None else _ends(found)
    return f"**{text}**" if low > 0 or high < 0 else text


def _ends(found: Estimate | Mapping[str, Any]) -> list[float]:
    """Mean, low and high, nan where a report has null."""
    ends = [getattr(found, key) if isinstance(found, Estimate) else found[key] for key in ("mean", "low", "high")]
    return [math.nan if end is None else end for end in ends]


def _table(report: Report, labels: Sequence[str], what: str) -> str:
    cells = {(row["metric"], row["label"]): row for row in report["summary"]}
    metrics = dict.fromkeys((row["metric"], row["unit"]) for row in report["summary"])
    rows = []
    for metric, unit in metrics:
        line = [cells[metric, label] for label in labels]
        texts = [difference(row[what]) if what == "difference" else estimate(row[what]) for row in line]
        rows.append([f"`{metric}` ({unit})", *texts])
    return markdown_table(["measure", *labels], rows)


def _number(value: float, signed: bool, decimals: int | None) -> str:
    """`number`, or `decimals` digits after the point, with a minus sign in place of the hyphen, and a plus sign if `signed`."""
    if math.isnan(value):
        return number(value)
    text = number(value) if decimals is None else f"{value:.{decimals}f}"
    if math.copysign(1.0, value) < 0:
        return text.replace("-", "−", 1)
    return f"+{text}" if signed and value > 0 else text
