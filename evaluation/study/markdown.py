"""Tables of a comparison in Markdown, from its report.json: means with intervals, and differences from the baseline."""

import math
from collections.abc import Sequence
from typing import Any

from engine.files.tables import markdown_cell
from evaluation.study.page import number

Report = dict[str, Any]


def tables(report: Report) -> str:
    """Both tables, every measure and method; a difference whose interval leaves out 0 is bold."""
    baseline = report["baseline"]
    labels = list(dict.fromkeys(row["label"] for row in report["summary"]))
    others = [label for label in labels if label != baseline]
    means = _table(report, labels, "mean")
    if not others:
        return means
    return f"{means}\nDifference from {baseline}, paired by prompt:\n\n{_table(report, others, 'difference')}"


def estimate(found: dict[str, Any] | None, *, signed: bool = False) -> str:
    """`mean [low, high]` of an estimate as report.json has it; the mean alone where there is no interval."""
    if found is None or found["mean"] is None:
        return "–"
    text = _number(found["mean"], signed)
    return (
        text if found["low"] is None else f"{text} [{_number(found['low'], signed)}, {_number(found['high'], signed)}]"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    head, *cells = [[markdown_cell(cell) for cell in line] for line in (header, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells)) + "\n"


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
    return table(["measure", *labels], rows)


def _number(value: float, signed: bool) -> str:
    """As the page shows it, with a sign that a reader sees."""
    text = number(value)
    if math.copysign(1.0, value) < 0:
        return text.replace("-", "−", 1)
    return f"+{text}" if signed and value > 0 else text
