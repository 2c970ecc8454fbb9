"""Floating-point operations of one forward on one rank, part by part: two for each multiplication and its addition."""

from dataclasses import dataclass

from engine.planner.model import ModelSpec
from freespec.methods import Mode


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one rank computes of one forward.

    Attributes:
        tokens: S, all tokens of the video.
        window: tokens that a query of the local branch sees.
        shard: s, this rank's tokens outside attention.
        queries: r, its tokens inside attention.
        heads: n, its heads inside attention.
        text: K, text tokens, all of them on every rank.
        num_views: views of a step with views, each of `window` tokens.
        window_frames: frames of a view.
    """

    tokens: int
    window: int
    shard: int
    queries: int
    heads: int
    text: int
    num_views: int = 1
    window_frames: int = 1


# Which parts run at which rate: products of matrices in the transformer's precision, attention kernels, products in fp32 and fp64.
GEMM = ("embeddings", "projections", "cross_projections", "feed_forward", "output")
ATTENTION = ("attention_local", "attention_rest", "attention_global", "attention_views", "attention_cross")
GRAMS = ("grams",)
FP32 = ("temporal_grams", "fusion")


def forward_flops(spec: ModelSpec, share: Share, mode: Mode) -> dict[str, int]:
    """Operations of one forward by part; GEMM, ATTENTION, GRAMS and FP32 group their names.

    Patch embedding and the embeddings of time and text are computed whole on every rank.
    """
    width, layers, head_dim = spec.width, spec.layers, spec.head_dim
    numbers = spec.numbers
    per_key = 4 * share.queries * share.heads * head_dim * layers  # q kᵀ and p v
    square = share.heads * head_dim**2 * layers
    dual, views, fused_views = mode == "dual", mode in ("views", "views_global"), mode == "views_global"
    viewed = share.num_views * share.window * share.heads * head_dim * layers
    # FreePCA's sums over a view and its mixing of frames, for every view but the first; its n x n algebra counts for nothing.
    mixed = viewed // share.num_views * (share.num_views - 1) * share.window_frames if fused_views else 0
    return {
        "embeddings": 2 * share.tokens * numbers.in_values * width
        + 2 * (numbers.time_dim * width + 7 * width**2)
        + 2 * share.text * (numbers.text_dim * width + width**2),
        "projections": layers * 4 * 2 * share.shard * width**2,
        "attention_local": per_key * share.window if mode in ("local", "dual") else 0,
        "attention_rest": per_key * (share.tokens - share.window) if dual else 0,
        "attention_global": per_key * share.tokens if mode in ("global", "views_global") else 0,
        "attention_views": 4 * viewed * share.window if views else 0,
        "cross_projections": layers * 2 * 2 * (share.shard + share.text) * width**2,
        "attention_cross": layers * 4 * share.shard * share.text * width,
        "feed_forward": layers * 2 * 2 * share.shard * width * numbers.ffn_dim,
        "output": 2 * share.shard * width * numbers.out_values,
        "grams": 2 * 2 * share.queries * square * dual,
        "temporal_grams": 3 * 2 * mixed,
        "fusion": (2 * share.queries * square + 2 * square * head_dim) * dual + 2 * 2 * mixed,
    }
