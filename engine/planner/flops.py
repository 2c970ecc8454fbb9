"""Floating-point operations of one forward on one rank, part by part: two for each multiplication and its addition."""

from dataclasses import dataclass

from engine.planner.model import ModelSpec
from parallel.plan import Mode


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
    """

    tokens: int
    window: int
    shard: int
    queries: int
    heads: int
    text: int


# Which parts run at which rate: products of bf16 matrices, attention kernels, products of fp32 matrices.
GEMM = ("embeddings", "projections", "cross_projections", "feed_forward", "output")
ATTENTION = ("attention_local", "attention_rest", "attention_global", "attention_cross")
FP32 = ("grams", "fusion")


def forward_flops(spec: ModelSpec, share: Share, mode: Mode) -> dict[str, int]:
    """Operations of one forward by part; GEMM, ATTENTION and FP32 group their names.

    Patch embedding and the embeddings of time and text are computed whole on every rank.
    """
    width, layers, head_dim = spec.width, spec.layers, spec.head_dim
    config = spec.transformer
    in_values, out_values = spec.patch_values
    per_key = 4 * share.queries * share.heads * head_dim * layers  # q kᵀ and p v
    square = share.heads * head_dim**2 * layers
    dual = mode == "dual"
    return {
        "embeddings": 2 * share.tokens * in_values * width
        + 2 * (config.freq_dim * width + 7 * width**2)
        + 2 * share.text * (config.text_dim * width + width**2),
        "projections": layers * 4 * 2 * share.shard * width**2,
        "attention_local": per_key * share.window if mode != "global" else 0,
        "attention_rest": per_key * (share.tokens - share.window) if dual else 0,
        "attention_global": per_key * share.tokens if mode == "global" else 0,
        "cross_projections": layers * 2 * 2 * (share.shard + share.text) * width**2,
        "attention_cross": layers * 4 * share.shard * share.text * width,
        "feed_forward": layers * 2 * 2 * share.shard * width * config.ffn_dim,
        "output": 2 * share.shard * width * out_values,
        "grams": 2 * 2 * share.queries * square if dual else 0,
        "fusion": 2 * share.queries * square + 2 * square * head_dim if dual else 0,
    }
