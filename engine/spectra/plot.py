"""The trace of a run as a table and as a plot: effective rank of both branches and fusion weights, per step and layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engine.files.tables import write_csv
from engine.files.whole import atomic_path

COLUMNS = ("step", "layer", "branch", "effective_rank", "weight_first", "weight_last", "residual")
BRANCHES = ("local", "global")
_COLOURS = {"local": "#0f6fb8", "global": "#d1622b"}
_WEIGHTS = (
    ("weight_first", "#2c2f36", "first direction"),
    ("weight_last", "#8b909b", "last direction"),
    ("residual", "#3d8f55", "global residual"),
)


def write_trace(rows: Sequence[dict[str, Any]], table: Path, plot: Path, *, replace: bool = True) -> None:
    """Write the rows of a `SpectralTrace` as CSV, and their plot as PNG."""
    write_csv(table, rows, COLUMNS, replace=replace)
    figure = draw_trace(rows)
    with atomic_path(plot, replace=replace) as part:
        figure.savefig(part, format="png", dpi=120)


def draw_trace(rows: Sequence[dict[str, Any]]) -> Figure:
    """Plot the effective rank of each branch by layer and step, its mean and spread over layers, and the weights."""
    # Figure itself, not pyplot, which needs a window system and keeps figures alive.
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    (local, globl), (ranks, weights) = figure.subplots(2, 2)
    grids = {branch: rank_grid(rows, branch) for branch in BRANCHES}
    values = np.concatenate([grid.ravel() for grid in grids.values()])
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    for axes, branch in ((local, "local"), (globl, "global")):
        image = _draw_grid(axes, grids[branch], branch, low, high)
    figure.colorbar(image, ax=[local, globl], label="effective rank", shrink=0.9)
    _draw_means(ranks, grids)
    _draw_weights(weights, rows)
    return figure


def rank_grid(rows: Sequence[dict[str, Any]], branch: str) -> np.ndarray:
    """Effective rank [layers, steps] of one branch; nan where the branch was not computed."""
    steps = 1 + max((row["step"] for row in rows), default=0)
    layers = 1 + max((row["layer"] for row in rows), default=0)
    grid = np.full((layers, steps), np.nan)
    for row in rows:
        if row["branch"] == branch:
            grid[row["layer"], row["step"]] = row["effective_rank"]
    return grid


def _draw_grid(axes: Axes, grid: np.ndarray, branch: str, low: float, high: float) -> Any:
    axes.set_title(f"{branch} branch", loc="left", color=_COLOURS[branch], fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel("layer")
    _count_by_ones(axes.xaxis)
    _count_by_ones(axes.yaxis)
    if np.isnan(grid).all():
        _say(axes, "not computed in this run")
    return axes.imshow(grid, aspect="auto", origin="lower", vmin=low, vmax=high, interpolation="nearest")


def _draw_means(axes: Axes, grids: dict[str, np.ndarray]) -> None:
    axes.set_title("effective rank over layers: mean, least to most", loc="left")
    for branch, grid in grids.items():
        steps = np.flatnonzero(np.isfinite(grid).any(axis=0))
        if not steps.size:
            continue
        shown = grid[:, steps]
        axes.fill_between(
            steps, np.nanmin(shown, axis=0), np.nanmax(shown, axis=0), color=_COLOURS[branch], alpha=0.15, linewidth=0
        )
        axes.plot(steps, np.nanmean(shown, axis=0), color=_COLOURS[branch], marker="o", markersize=3, label=branch)
    _finish(axes)


def _draw_weights(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    axes.set_title("weight of the global branch", loc="left")
    # Equal in every layer and branch, so any row of a step has it.
    by_step = {row["step"]: row for row in rows if row.get("weight_first") is not None}
    steps = sorted(by_step)
    for key, colour, label in _WEIGHTS:
        if steps:
            values = [by_step[step][key] for step in steps]
            axes.plot(steps, values, color=colour, marker="o", markersize=3, label=label)
    axes.set_ylim(bottom=0)
    _finish(axes)
    if not steps:
        _say(axes, "no step of this run fused the branches")


def _count_by_ones(axis: Axis) -> None:
    """Put ticks at whole numbers only."""
    locator = axis.get_major_locator()
    assert isinstance(locator, MaxNLocator)
    locator.set_params(integer=True)


def _finish(axes: Axes) -> None:
    axes.set_xlabel("step")
    _count_by_ones(axes.xaxis)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _say(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color="#8b909b")
