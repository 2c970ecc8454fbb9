"""Draws docs/figures/overview.png, FreeSpec in one figure: `python docs/figures/overview.py`."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from freespec.schedule import rank_weight, time_weight
from freespec.windows import window_start

FOLDER = Path(__file__).parent
LOCAL, GLOBAL, FUSED, QUIET = "#d1495b", "#30638e", "#3c896d", "#e8e8e8"
FRAMES, WINDOW = 16, 4


def draw_overview() -> None:
    """Windows, spectra and the course of a run, left to right."""
    figure, axes = plt.subplots(1, 4, figsize=(14.5, 3.9), width_ratios=[1.0, 1.0, 1.25, 1.25])
    draw_window(axes[0], WINDOW, LOCAL, "local branch\nmotion and detail, no long memory")
    draw_window(axes[1], FRAMES, GLOBAL, "global branch\nlong memory, motion washed out")
    draw_spectra(axes[2])
    draw_course(axes[3])
    figure.tight_layout(w_pad=2.2)
    figure.savefig(FOLDER / "overview.png", dpi=130)


def draw_window(axis: Axes, window: int, color: str, title: str) -> None:
    """Which frames (columns) the queries of each frame (rows) see."""
    for frame in range(FRAMES):
        start = window_start(frame, FRAMES, window)
        for key in range(FRAMES):
            inside = start <= key < start + window
            axis.add_patch(Rectangle((key, frame), 0.92, 0.92, color=color if inside else QUIET))
    axis.set(xlim=(0, FRAMES), ylim=(FRAMES, 0), xticks=[], yticks=[], aspect="equal")
    axis.set_xlabel("frame that is seen")
    axis.set_ylabel("frame that looks")
    axis.set_title(title, fontsize=10.5)
    for spine in axis.spines.values():
        spine.set_visible(False)


def draw_spectra(axis: Axes) -> None:
    """Singular values of both branches and of their fusion at half of the fusion stage."""
    rank = np.arange(1, 65)
    local, o_global = 1.0 * np.exp(-rank / 26), 1.5 * np.exp(-rank / 9)
    weight = time_weight(0.15, 5.0) * rank_weight(64, 3.0).numpy()
    axis.plot(rank, o_global, color=GLOBAL, label="global: few strong directions")
    axis.plot(rank, local, color=LOCAL, label="local: rich spectrum")
    axis.plot(
        rank,
        weight * o_global + (1 - weight) * local,
        color=FUSED,
        lw=2.6,
        label=r"fused: $g\,\sigma_g+(1-g)\,\sigma_l$",
    )
    axis.fill_between(rank, 0, weight * 0.9, color=FUSED, alpha=0.13, label="weight g of the global branch")
    axis.set(
        xlabel="singular direction r, strongest first", ylabel=r"singular value $\sigma_r$", xlim=(1, 64), ylim=(0, 1.6)
    )
    axis.set_title("per head: keep the local singular vectors,\nmove the singular values", fontsize=10.5)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def draw_course(axis: Axes) -> None:
    """The weight of the global branch over the denoising steps."""
    steps = np.arange(20)
    progress = steps / 10
    weight = np.where(steps < 10, np.exp(-5 * progress), 0)
    axis.bar(steps[:10], weight[:10], color=FUSED, width=0.8, label="dual: both branches for the price of one")
    axis.bar(steps[10:], np.full(10, 0.03), color=LOCAL, width=0.8, label="late: local branch alone")
    axis.set(
        xlabel="denoising step, noise to video",
        ylabel=r"time weight $e^{-\alpha p}$",
        ylim=(0, 1.15),
        xticks=[0, 10, 19],
    )
    axis.set_title("structure from the whole video first,\nmotion and detail from the window after", fontsize=10.5)
    axis.legend(fontsize=8, frameon=False, loc="upper right")
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    draw_overview()
