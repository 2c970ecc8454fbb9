"""Plots after the paper's Fig. 2: rank over progress, over windows and by head; low-rank frames and their flow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.analysis.spectra import Rows, by_layer_and_head, over_prompts, stages
from evaluation.comparison.plots import colour_of
from metrics.frames import luma
from metrics.motion import flow_between, flow_colours


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One row of pictures of a low-rank figure: its name, a note, and frames uint8 [T, H, W, 3]."""

    name: str
    note: str
    frames: np.ndarray


def draw_progress(rows: Rows) -> Figure:
    """Fig. 2a: effective rank against denoising progress, a curve per window, mean and standard error over prompts."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    found = over_prompts(rows, ("multiple", "window_frames", "progress"))
    for place, multiple in enumerate(sorted({row["multiple"] for row in found})):
        curve = [row for row in found if row["multiple"] == multiple]
        label = f"{multiple:g} x native ({curve[0]['window_frames']} latent frames)"
        _draw_curve(axes, curve, "progress", place, label)
    axes.set_xlabel("denoising progress (share of steps)")
    axes.set_ylabel("effective rank, mean of layers and heads")
    axes.legend(frameon=False, fontsize=8)
    _open(axes)
    return figure


def draw_windows(rows: Rows) -> Figure:
    """Fig. 2b: effective rank against the window at three stages, mean and standard error over prompts."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for place, (name, progress) in enumerate(stages(rows).items()):
        curve = over_prompts([row for row in rows if row["progress"] == progress], ("multiple",))
        _draw_curve(axes, curve, "multiple", place, f"{name}: progress {progress:.2f}")
    axes.set_xlabel("window, native lengths")
    axes.set_ylabel("effective rank, mean of layers and heads")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8)
    _open(axes)
    return figure


def draw_heads(rows: Rows) -> Figure:
    """By layer and head, how the rank changes from the native window to the widest; and each layer's mean."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    change = 100 * by_layer_and_head(rows)
    limit = max(float(np.abs(change).max()), 1e-9)
    image = left.imshow(change, aspect="auto", origin="lower", cmap="RdBu", vmin=-limit, vmax=limit)
    widest = max(row["multiple"] for row in rows)
    figure.colorbar(image, ax=left, label=f"rank at {widest:g} x native over native, %")
    left.set_xlabel("head")
    left.set_ylabel("layer")
    for place, multiple in enumerate(sorted({row["multiple"] for row in rows})):
        curve = over_prompts([row for row in rows if row["multiple"] == multiple], ("layer",))
        _draw_curve(right, curve, "layer", place, f"{multiple:g} x native")
    right.set_xlabel("layer")
    right.set_ylabel("effective rank, mean of heads and steps")
    right.legend(frameon=False, fontsize=8)
    _open(right)
    for axis in (left.xaxis, left.yaxis, right.xaxis):
        axis.get_major_locator().set_params(integer=True)
    return figure


def draw_frames(strips: Sequence[Strip], moments: Sequence[int], *, title: str) -> Figure:
    """Fig. 2c: the frames at the same moments, a row for each share of directions that was kept."""
    rows = [(strip, [strip.frames[moment] for moment in moments]) for strip in strips]
    return _draw_strips(rows, [f"frame {moment}" for moment in moments], title)


def draw_flows(strips: Sequence[Strip], moments: Sequence[int], *, title: str) -> Figure:
    """Fig. 2d: the flow from each of these frames to the next, one scale of colour for all rows."""
    moments = [min(moment, len(strips[0].frames) - 2) for moment in moments]
    flows = [
        [flow_between(luma(strip.frames[moment]), luma(strip.frames[moment + 1])) for moment in moments]
        for strip in strips
    ]
    full = float(np.quantile(np.linalg.norm(np.array(flows), axis=-1), 0.995))
    rows = [(strip, [flow_colours(flow, full) for flow in line]) for strip, line in zip(strips, flows, strict=True)]
    return _draw_strips(rows, [f"frame {moment}" for moment in moments], f"{title}; full colour is {full:.1f} px/frame")


def draw_low_rank(summary: Rows, metrics: Sequence[tuple[str, str]]) -> Figure:
    """Measures of the videos against the share of directions that was kept, mean and standard error over prompts."""
    figure = Figure(figsize=(4 * len(metrics), 3.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(metrics), squeeze=False)).ravel()
    for axes, (metric, unit) in zip(panels, metrics, strict=True):
        lines = [row for row in summary if row["metric"] == metric]
        axes.errorbar(
            [row["ratio"] for row in lines],
            [row["mean"] for row in lines],
            yerr=np.nan_to_num([row["error"] for row in lines]),
            marker="o",
            color=colour_of(0),
            capsize=3,
        )
        axes.set_title(f"{metric} ({unit})", loc="left", fontsize=9)
        axes.set_xlabel("share of singular directions kept")
        _open(axes)
    return figure


def _draw_strips(rows: Sequence[tuple[Strip, list[np.ndarray]]], titles: Sequence[str], title: str) -> Figure:
    columns = len(titles)
    height, width = rows[0][1][0].shape[:2]
    side = 1.5
    figure = Figure(
        figsize=(1.6 + side * columns, 0.6 + (side * height / width + 0.15) * len(rows)), layout="constrained"
    )
    figure.suptitle(title, fontsize=9, parse_math=False)  # a prompt, which may speak of $5
    cells = figure.subplots(len(rows), columns, squeeze=False)
    for number, (line, (strip, pictures)) in enumerate(zip(cells, rows, strict=True)):
        for axes, picture, text in zip(line, pictures, titles, strict=True):
            axes.imshow(picture, interpolation="nearest" if width < 200 else "antialiased")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if number == 0:
                axes.set_title(text, fontsize=8)
        line[0].set_ylabel(f"{strip.name}\n{strip.note}", fontsize=8, rotation=0, ha="right", va="center")
    return figure


def _draw_curve(axes: Axes, curve: Sequence[dict[str, Any]], along: str, place: int, label: str) -> None:
    x = [row[along] for row in curve]
    mean = np.array([row["effective_rank_mean"] for row in curve])
    error = np.nan_to_num([row["effective_rank_error"] for row in curve])
    axes.plot(x, mean, color=colour_of(place), marker="o", markersize=3, label=label)
    axes.fill_between(x, mean - error, mean + error, color=colour_of(place), alpha=0.18, linewidth=0)


def _open(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
