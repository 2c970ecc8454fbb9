"""Tables with the user's text: CSV files that are safe in a spreadsheet, and cells of Markdown."""

import csv
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.files.whole import atomic_path

# First characters of a formula in spreadsheets, also in full width.
_FORMULA = ("=", "+", "-", "@", "\t", "\n", "＝", "＋", "－", "＠")

# The first note of a comparison's report, see evaluation/comparison/report.py.
_PAIRS = re.compile(r"methods on (\d+) pairs of prompt and seed")


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as CSV, by default with the columns of the first; numbers that are not finite are empty cells.

    A text that begins like a formula gets an apostrophe before it, which spreadsheets take for "this is text": prompts and names are
    the user's, and would be computed where the file is opened.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = list(rows[0]) if columns is None else list(columns)
    writer.writerow(map(_cell, columns))
    writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    return text.getvalue()


def write_csv(
    path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, *, replace: bool = True
) -> None:
    """Write `as_csv` to a file atomically; without `replace` an existing file is an error."""
    with atomic_path(path, replace=replace) as part:
        part.write_text(as_csv(rows, columns), encoding="utf-8", newline="")


def markdown_cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table: no column, line or HTML starts in it."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def markdown_table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    head, *cells = [[markdown_cell(str(cell)) for cell in line] for line in (header, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells)) + "\n"


def emptier(before: str, after: str) -> list[str]:
    """Headings of a Markdown page under which `after` has fewer table rows, or covers fewer pairs, than `before`."""
    old, new = _contents(before), _contents(after)
    return [
        heading
        for heading, found in old.items()
        if any(a > b for a, b in zip(found, new.get(heading, (0, 0)), strict=True))
    ]


def _contents(page: str) -> dict[str, tuple[int, int]]:
    """Rows of tables, and pairs of prompt and seed, beneath each heading of a page."""
    found: dict[str, tuple[int, int]] = {}
    section = heading = ""
    for line in page.splitlines():
        if line.startswith("## "):
            section = heading = line.removeprefix("## ")
        elif line.startswith("### "):
            heading = f"{section}, {line.removeprefix('### ')}"
        rows, pairs = found.get(heading, (0, 0))
        counts = [int(count) for count in _PAIRS.findall(line)]
        found[heading] = (rows + line.startswith("|"), max([pairs, *counts]))
    return found


def _cell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if not isinstance(value, str):
        return value
    # csv does not quote a lone carriage return, at which readers end the row.
    value = value.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{value}" if value.startswith(_FORMULA) or value.lstrip().startswith(_FORMULA) else value
