"""Floating-point operations of one call of the transformer on one rank: two for each multiplication and its addition."""

from engine.planner.forward import count_forward
from engine.planner.layout import VIEW_MODES, Layout
from freespec.methods import Mode


def call_operations(layout: Layout, mode: Mode) -> dict[str, int]:
    """Operations of one call, its whole batch, on the busiest rank, by what decides their rate.

    Keys: `matrices`, `attention` (in attention kernels), `grams` (in the model's precision) and `fp32` (the fusion).
    """
    counted, per_entry = count_forward(layout), _attention_operations(layout, mode)
    kernels = {kind: layout.batch * layout.spec.layers * num for kind, num in per_entry.items()}
    if mode == "dual":  # of each matrix U diag(w) Uᵀ, a share of which is made on each member of the ring
        shared = -(-layout.batch * layout.share(mode).heads // layout.attention_plan(mode).ring)
        kernels["fp32"] += 2 * layout.spec.layers * shared * layout.spec.head_dim**3
    return {"matrices": counted.other_operations + layout.spec.layers * counted.block_operations, **kernels}


def _attention_operations(layout: Layout, mode: Mode) -> dict[str, int]:
    """Operations of the attentions of one block for one entry of the batch."""
    share, head_dim = layout.share(mode), layout.spec.head_dim
    attention = 4 * share.queries * share.heads * head_dim * layout.keys(mode)  # q kᵀ and p v; dual merges its parts
    attention += 4 * share.shard * (layout.text + layout.spec.image_tokens) * layout.spec.width
    grams = fp32 = 0
    if mode == "dual":
        products = share.queries * share.heads * head_dim**2
        grams, fp32 = 4 * products, 2 * products
    if mode in VIEW_MODES:
        view = share.window * share.heads * head_dim
        attention += 4 * layout.num_views * view * share.window
        if (
            mode == "views_global"
        ):  # sums over each view but the first and its mixing of frames, whose n x n algebra is left out
            fp32 = (3 * 2 + 2 * 2) * (layout.num_views - 1) * view * layout.window_frames
    return {"attention": attention, "grams": grams, "fp32": fp32}
