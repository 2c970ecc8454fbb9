"""Draws docs/figures/layouts.png, which rank holds what in each step of an attention layer: `python docs/figures/layouts.py`."""

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from freespec.windows import window_range
from parallel.shards import Range, SequencePlan, halo_needs, length, ring_order, subtract

FOLDER = Path(__file__).parent
RANKS = ("#d1495b", "#edae49", "#3c896d", "#30638e")
FRAMES, WINDOW, HEADS = 20, 5, 8
TOLD = 1
"""The rank whose keys are drawn."""

Share = tuple[Range, Range, int]  # tokens, heads, rank
Keys = tuple[Range, str]  # tokens, hatch

LAYOUTS = {"ulysses 4": (1, 1, 4), "ring 4": (1, 4, 1), "ring 2 x ulysses 2": (1, 2, 2), "cfg 2 x ring 2": (2, 2, 1)}
STEPS = (
    "1  outside attention\nnorms, q k v, text, feed-forward",
    "2  local branch\nown window of every frame",
    "3  global branch\nthe keys outside of it",
    "4  Grams, spectra, fusion\none matrix M per head",
    "5  after the layer",
)
NOTES = {
    "ulysses 4": ("", "all-to-all of q, k, v:\nall tokens of own heads", "nothing moves", "nothing moves", "all-to-all of the output"),
    "ring 4": ("", "halo of k, v (hatched)", "blocks of k, v go round", "D x D sums over the ring", "nothing moves"),
    "ring 2 x ulysses 2": (
        "",
        "all-to-all in the pair,\nhalo between the pairs",
        "blocks go round",
        "D x D sums over the ring",
        "all-to-all in the pair",
    ),
    "cfg 2 x ring 2": (
        "top: with the prompt,\nbelow: without",
        "halo inside each pass",
        "blocks go round",
        "D x D sums over the ring",
        "once a step: one prediction\nacross the passes",
    ),
}  # fmt: skip


def draw() -> None:
    """One row per layout, one column per step."""
    figure, axes = plt.subplots(len(LAYOUTS), len(STEPS), figsize=(14.5, 9.6))
    for row, (name, (cfg, ring, ulysses)) in zip(axes, LAYOUTS.items(), strict=True):
        plan = SequencePlan(tokens=FRAMES, heads=HEADS // cfg, ring=ring, ulysses=ulysses)
        row[0].set_ylabel(f"{name}\n\nheads", fontsize=10.5)
        for step, axis in enumerate(row):
            for index in range(cfg):
                draw_step(axis, plan, step, first_rank=index * plan.ranks, first_head=index * plan.heads)
            axis.set(xlim=(0, FRAMES), ylim=(HEADS, 0), xticks=[], yticks=[])
            axis.set_xlabel(NOTES[name][step], fontsize=9.5)
            axis.spines[:].set_visible(False)
            if cfg > 1:
                axis.axhline(HEADS / cfg, color="black", lw=1.5)
    for axis, title in zip(axes[0], STEPS, strict=True):
        axis.set_title(title, fontsize=10.5)
    figure.text(
        0.5,
        0.008,
        f"Across: the tokens of {FRAMES} frames in order, windows of {WINDOW}; down: heads. A colour is the rank that holds the queries (with its "
        f"number). Hatched: keys that rank {TOLD} fetches: /// halo, \\\\\\ the first block of the ring.",
        ha="center",
        fontsize=9.5,
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1), h_pad=1.6)
    figure.savefig(FOLDER / "layouts.png", dpi=110)


def draw_step(axis: Axes, plan: SequencePlan, step: int, *, first_rank: int, first_head: int) -> None:
    """The shares of one pass in one step, and what rank TOLD fetches."""
    inside = 1 <= step <= 3
    for tokens, heads, rank in shares(plan, inside=inside):
        box = (tokens[0], first_head + heads[0]), length(tokens), length(heads)
        axis.add_patch(Rectangle(*box, color=RANKS[first_rank + rank], alpha=0.85, ec="white", lw=2))
        middle = (sum(tokens) / 2, first_head + sum(heads) / 2)
        label = f"{first_rank + rank}" + (" · M" if step == 3 else "")
        axis.text(*middle, label, ha="center", va="center", color="white", fontsize=10)
    if first_rank <= TOLD < first_rank + plan.ranks and plan.ring > 1:
        _, heads, _ = shares(plan, inside=True)[TOLD - first_rank]
        for tokens, hatch in fetched(plan, step, TOLD - first_rank):
            corner = (tokens[0], first_head + heads[0])
            axis.add_patch(
                Rectangle(corner, length(tokens), length(heads), fill=False, hatch=hatch, ec=RANKS[TOLD], lw=0)
            )


def shares(plan: SequencePlan, *, inside: bool) -> list[Share]:
    """Tokens and heads of every rank, outside of attention or inside."""
    if not inside:
        return [(tokens, (0, plan.heads), rank) for rank, tokens in enumerate(plan.shards)]
    ranks = ((ring, ulysses) for ring in range(plan.ring) for ulysses in range(plan.ulysses))
    return [(plan.ring_shards[r], plan.head_shares[u], rank) for rank, (r, u) in enumerate(ranks)]


def fetched(plan: SequencePlan, step: int, rank: int) -> list[Keys]:
    """Token ranges of the keys that a rank fetches in a step, and their hatch."""
    member = rank // plan.ulysses
    if step == 1:
        halo = partial(_halo, num_frames=plan.tokens)
        need = halo_needs(plan.ring_shards, halo, plan.tokens)[member]
        return [(span, "////") for span in subtract(need, plan.ring_shards[member])]
    if step == 2:
        return [(plan.ring_shards[ring_order(member, plan.ring)[0]], "\\\\\\\\")]
    return []


def _halo(start: int, stop: int, num_frames: int) -> Range:
    return window_range(start, stop, num_frames=num_frames, frame_tokens=1, window_frames=WINDOW)


if __name__ == "__main__":
    draw()
