"""The page of a comparison: the videos of a prompt side by side in step, and the tables. One file, no network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluation.comparison.summary import Row
from evaluation.markdown import estimate, number


def write_page(
    *,
    title: str,
    notes: Sequence[str],
    videos: dict[str, Any],
    rows: Sequence[Row],
    times: dict[str, dict[str, Any]],
    plots: Sequence[tuple[str, str]],
) -> str:
    """The HTML text.

    Args:
        title: heading.
        notes: paragraphs beneath it.
        videos: {fps, prompts: [{text, events, seeds: [{seed, videos: [{label, file}]}]}]}, files relative to the page; `events` of a
            timeline are {text, start, stop}, in frames.
        rows: of the table of measures.
        times: of the table of times.
        plots: (file relative to the page, caption).
    """
    metrics: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        metrics.setdefault((row.metric, row.unit), []).append(row)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"estimate": estimate, "number": number}
    return environment.get_template("page.html.jinja").render(
        title=title,
        notes=notes,
        videos=videos,
        labels=list(dict.fromkeys(row.label for row in rows)),
        metrics=metrics,
        kinds=list(dict.fromkeys(kind for found in times.values() for kind in found["steps"])),
        times=times,
        plots=plots,
    )
