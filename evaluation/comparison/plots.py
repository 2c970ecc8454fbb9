"""Plots of a comparison, as PNG and SVG."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.files.whole import atomic_path
from evaluation.comparison.summary import Row
from metrics.bootstrap import Estimate

COLOURS = ("#0f6fb8", "#d1622b", "#3d8f55", "#8a5fb5", "#b8860f", "#c0437a", "#4aa3a3", "#6b6f78")
_KINDS = {
    "global": "#d1622b",
    "local": "#0f6fb8",
    "dual": "#8a5fb5",
    "views": "#3d8f55",
    "views_global": "#b8860f",
    "frames": "#4d6b78",
}
_COLUMNS = 4
_MARKERS = "os^vDPX*<>"


def colour_of(index: int) -> str:
    """A colour for the index-th of several lines or bars."""
    return COLOURS[index % len(COLOURS)]


def save_figure(figure: Figure, stem: Path, *, kinds: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write a figure as STEM.png and STEM.svg, or as `kinds` say, each whole or not at all; return the files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind in kinds:
        path = stem.with_name(f"{stem.name}.{kind}")
        with atomic_path(path) as part:
            # No date in the file: the same numbers give the same bytes.
            figure.savefig(part, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
        figure.set_layout_engine("none")  # the first file has found the places of all
        paths.append(path)
    return paths


def draw_metrics(rows: Sequence[Row], labels: Sequence[str]) -> Figure:
    """A panel for each measure: every variant's mean over prompts with its interval."""
    metrics = list(dict.fromkeys((row.metric, row.unit) for row in rows))
    lines = math.ceil(len(metrics) / _COLUMNS)
    figure = Figure(
        figsize=(4.2 * min(_COLUMNS, len(metrics)), (0.9 + 0.28 * len(labels)) * lines), layout="constrained"
    )
    panels = np.atleast_1d(figure.subplots(lines, min(_COLUMNS, len(metrics)), squeeze=False)).ravel()
    for axes, (metric, unit) in zip(panels, metrics, strict=False):
        for place, label in enumerate(labels):
            mean = next(row.mean for row in rows if (row.metric, row.label) == (metric, label))
            _draw_interval(axes, mean, place, colour_of(place))
        axes.set_title(f"{metric} ({unit})", loc="left", fontsize=9)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(metrics) :]:
        axes.remove()
    return figure


def draw_times(times: dict[str, dict[str, Any]]) -> Figure:
    """Left: seconds of a denoising run by kind of step. Right: median seconds of one step of each kind."""
    figure = Figure(figsize=(10, 1.2 + 0.35 * len(times)), layout="constrained")
    runs, steps = figure.subplots(1, 2)
    kinds = [kind for kind in _KINDS if any(kind in found["steps"] for found in times.values())]
    for place, found in enumerate(times.values()):
        left = 0.0
        for kind in kinds:
            step = found["steps"].get(kind)
            if step is None:
                continue
            seconds = step["median"] * (step["per_run"] or 0)
            runs.barh(place, seconds, left=left, color=_KINDS[kind], height=0.6)
            left += seconds
            steps.plot(step["median"], place, "o", color=_KINDS[kind])
    for axes, title in ((runs, "denoising one video, s (median step x number)"), (steps, "one step, s (median)")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_yticks(range(len(times)), list(times), fontsize=8)
        axes.set_ylim(len(times) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    for kind in kinds:
        steps.plot([], [], "o", color=_KINDS[kind], label=kind)
    steps.legend(frameon=False, fontsize=8)
    return figure


def draw_clips(series: dict[str, dict[str, list[Estimate]]], titles: dict[str, str]) -> Figure:
    """A panel for each measure per clip: the mean of every variant, clip after clip, with its interval."""
    figure = Figure(figsize=(4.6 * len(series), 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(series), squeeze=False)).ravel()
    for axes, (metric, by_label) in zip(panels, series.items(), strict=True):
        for place, (label, estimates) in enumerate(by_label.items()):
            if not estimates:
                continue
            clip = np.arange(len(estimates)) + (0 if metric == "identity_kept" else 1)
            means, low, high = (np.array([getattr(each, end) for each in estimates]) for end in ("mean", "low", "high"))
            axes.plot(clip, means, color=colour_of(place), marker="o", markersize=3, label=label)
            axes.fill_between(clip, low, high, color=colour_of(place), alpha=0.12, linewidth=0)
        axes.set_title(titles[metric], loc="left", fontsize=9)
        axes.set_xlabel("clip of native length")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _draw_interval(axes: Axes, mean: Estimate, place: int, colour: str) -> None:
    if math.isnan(mean.mean):
        axes.text(
            0.02, place, "no value", transform=axes.get_yaxis_transform(), va="center", fontsize=7, color="#8b909b"
        )
        return
    if not math.isnan(mean.low):
        axes.plot([mean.low, mean.high], [place, place], color=colour, linewidth=2)
    axes.plot(mean.mean, place, "o", color=colour, markersize=5)


def draw_costs(reports: Sequence[tuple[str, str, dict[str, dict[str, tuple[Estimate, Estimate]]]]]) -> Figure:
    """A row of panels for each report (title, axis of cost, points of each measure): every method's mean beside its cost."""
    labels = list(dict.fromkeys(label for _, _, panels in reports for points in panels.values() for label in points))
    widest = max(len(panels) for _, _, panels in reports)
    figure = Figure(figsize=(4.0 * widest + 1.8, 3.1 * len(reports)), layout="constrained")
    grid = figure.subplots(len(reports), widest, squeeze=False)
    for line, (title, cost, panels) in zip(grid, reports, strict=True):
        for axes, (measure, points) in zip(line, panels.items(), strict=False):
            for label, (x, y) in points.items():
                index = labels.index(label)
                if not math.isnan(y.low):
                    axes.plot([x.mean, x.mean], [y.low, y.high], color=colour_of(index), linewidth=1.5)
                axes.plot(x.mean, y.mean, _MARKERS[index % len(_MARKERS)], color=colour_of(index), markersize=6)
            axes.set_title(f"{title}: {measure}", loc="left", fontsize=9)
            axes.set_xlabel(cost, fontsize=8)
            axes.set_xlim(left=0)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in line[len(panels) :]:
            axes.remove()
    for index, label in enumerate(labels):
        grid[0][0].plot([], [], _MARKERS[index % len(_MARKERS)], color=colour_of(index), label=label)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure
