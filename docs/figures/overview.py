"""Draws docs/figures/overview.png, FreeSpec in one figure, and layouts.png: `python docs/figures/overview.py`."""

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
TOKENS, HEADS = 24, 8
RANKS = ("#d1495b", "#edae49", "#3c896d", "#30638e")


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
    local, wide = 1.0 * np.exp(-rank / 26), 1.5 * np.exp(-rank / 9)
    weight = time_weight(0.15, 5.0) * rank_weight(64, 3.0).numpy()
    axis.plot(rank, wide, color=GLOBAL, label="global: few strong directions")
    axis.plot(rank, local, color=LOCAL, label="local: rich spectrum")
    axis.plot(
        rank, weight * wide + (1 - weight) * local, color=FUSED, lw=2.6, label=r"fused: $g\,\sigma_g+(1-g)\,\sigma_l$"
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


def draw_layouts() -> None:
    """Who holds which tokens (columns) and heads (rows) of q, k, v inside attention, for four ranks."""
    layouts = {"ulysses 4": (1, 4), "ring 4": (4, 1), "ring 2 x ulysses 2": (2, 2)}
    figure, axes = plt.subplots(1, 4, figsize=(14.5, 3.3))
    outside = [(index, TOKENS // 4, 0, HEADS) for index in range(4)]
    draw_shares(axes[0], "outside attention\n(norms, text, feed-forward)", outside)
    for axis, (name, (ring, ulysses)) in zip(axes[1:], layouts.items(), strict=True):
        width, height = TOKENS // ring, HEADS // ulysses
        shares = [(r, width, u * height, height) for r in range(ring) for u in range(ulysses)]
        draw_shares(axis, f"inside attention:\n{name}", shares)
    mark_halo(axes[2])
    figure.tight_layout(w_pad=2)
    figure.savefig(FOLDER / "layouts.png", dpi=130)


def draw_shares(axis: Axes, title: str, shares: list[tuple[int, int, int, int]]) -> None:
    """One rectangle per rank: (index of its token range, tokens, first head, heads)."""
    for rank, (index, width, head, height) in enumerate(shares):
        axis.add_patch(Rectangle((index * width, head), width, height, color=RANKS[rank], alpha=0.85, ec="white", lw=2))
        axis.text(
            index * width + width / 2,
            head + height / 2,
            f"rank {rank}",
            ha="center",
            va="center",
            color="white",
            fontsize=9,
        )
    axis.set(xlim=(0, TOKENS), ylim=(HEADS, 0), xticks=[], yticks=[], xlabel="tokens (frames in order)", ylabel="heads")
    axis.set_title(title, fontsize=10.5)
    for spine in axis.spines.values():
        spine.set_visible(False)


def mark_halo(axis: Axes) -> None:
    """The keys that rank 1 fetches from its neighbours for the windows of its first and last frames."""
    for start in (3, 12):
        axis.add_patch(Rectangle((start, 0), 3, 8, fill=False, hatch="///", ec=RANKS[1], lw=0))
    axis.set_title("inside attention: ring 4\nhatched: halo that rank 1 fetches", fontsize=10.5)


if __name__ == "__main__":
    draw_overview()
    draw_layouts()
