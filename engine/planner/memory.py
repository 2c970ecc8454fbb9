"""Peak memory of one rank, part by part: a list of the moments of a forward and of what is alive in each.

Read off engine/hooks.py, parallel/attention.py and the eager WanTransformerBlock; tests compare it with measured peaks.
`e` is the size of a number in the transformer; norms, gates and merges work in fp32.
"""

import functools
import json

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.decode import stream_decode
from engine.planner.flops import Share
from engine.planner.layout import Layout, latent_bytes
from engine.planner.live_bytes import LiveBytes
from engine.planner.model import FP32_BYTES, ModelSpec
from freespec.spectrum import CHUNK_TOKENS
from parallel.plan import Mode

FP64_BYTES = 8
GIB = 2**30
# Latents between steps (they, two model outputs and the last sample of the multistep solver), in fp32, and the first
# pass's prediction, the second one and the sum of both in the transformer's precision.
LATENT_TENSORS = 4
PREDICTION_TENSORS = 3
# D x D matrices of a head alive at once while M is made from both Grams: those, eigenvectors, identity, products.
FUSION_MATRICES = 10


def denoise_peak(layout: Layout, mode: Mode) -> dict[str, int]:
    """Bytes at the worst moment of a forward, without weights: `latents`, `activations`, `kv_copies`."""
    moments = block_moments(layout, mode) | {"embedding": (_embedding_moment(layout), 0)}
    activations, copies = max(moments.values(), key=sum)
    return {"latents": _always(layout), "activations": activations, "kv_copies": copies}


def block_moments(layout: Layout, mode: Mode) -> dict[str, tuple[int, int]]:
    """Moments of one block on the busiest rank: (bytes of activations, bytes of copies of keys and values)."""
    share, e = layout.share(mode), layout.itemsize
    cast = FP32_BYTES if e < FP32_BYTES else 0  # an fp32 copy of what is already fp32 costs nothing
    hidden = share.shard * layout.spec.width  # numbers of a hidden state on this rank
    hidden_ffn = share.shard * layout.spec.transformer.ffn_dim
    return {
        # hidden state, its fp32 copy, the norm and its product
        "norm": (hidden * (e + max(cast + 4, 8)), 0),
        # hidden state, normed, q, k, v, both rotated, three halves in fp32
        "rotary": (hidden * (7 * e + 6), 0),
        **_attention_moments(layout, share, mode),
        # the block's input, hidden state, normed, cross-attention's output, and both sides of the GELU
        "feed_forward": (hidden * 4 * e + hidden_ffn * 2 * e, 0),
        # the same four, the feed-forward's output, it and the hidden state in fp32, gated, their sum
        "residual": (hidden * (5 * e + 2 * cast + 8), 0),
    }


def _attention_moments(layout: Layout, share: Share, mode: Mode) -> dict[str, tuple[int, int]]:
    """Exchange, both branches, their merge, the fusion and the way back."""
    e, plan = layout.itemsize, layout.attention_plan(mode)
    cast = FP32_BYTES if e < FP32_BYTES else 0
    hidden = share.shard * layout.spec.width
    inside = share.queries * share.heads * layout.spec.head_dim  # numbers of q inside attention
    row = 2 * share.heads * layout.spec.head_dim * e  # k and v of one token
    lse = share.queries * share.heads * FP32_BYTES
    base = 2 * e * hidden + 3 * e * inside  # hidden state, normed, q, k, v
    near = layout.near_keys(mode) * row
    ring = min(plan.ring - 1, 2) * share.queries * row if mode != "local" else 0  # buffers of blocks on their way
    first = min(plan.ring - 1, 1) * share.queries * row if mode != "local" else 0  # while near keys are attended
    outputs = 2 if mode == "dual" else 1
    moments = {
        # one output, and the entries of the largest group before they are copied into it
        "branch": (base + e * inside * (1 if mode == "global" else 2) + lse, near + first),
        # q, k, v, the branches, what is fused, gathered and projected
        "project": (
            2 * e * hidden
            + e * inside * (3 + outputs + (mode == "dual"))
            + e * hidden * (1 if plan.ulysses == 1 else 3),
            near,
        ),
    }
    if plan.ulysses > 1:  # sent, received, put in order
        moments["exchange"] = (5 * e * hidden + max(3 * e * (hidden + inside), 6 * e * inside), 0)
    if mode == "dual":
        keys = (layout.near_keys(mode) or share.queries) * row
        window = share.window * row
        # both outputs, and the circle: keys outside a window twice as far as a window's slice runs over the end
        moments["rest"] = (base + 3 * e * inside + 3 * lse, near + first + max(keys - window, 0))
        chunk = min(CHUNK_TOKENS, share.queries) * share.heads * layout.spec.head_dim * FP32_BYTES
        matrices = FUSION_MATRICES * share.heads * layout.spec.head_dim**2 * FP64_BYTES
        moments["fuse"] = (base + 3 * e * inside + 3 * chunk + matrices, near)
    if mode == "dual" or (mode == "global" and plan.ring > 1):
        # both outputs, the first in fp32, three products and sums; from the second merge on the local output is one more
        merged = 2 * e + cast + 12 + (FP32_BYTES if plan.ring > 1 and mode == "dual" and not cast else 0)
        # own keys were packed for the ring's first turn only, a halo stays
        moments["merge"] = (base + merged * inside + 6 * lse, ring + (near if mode == "dual" else 0))
    return moments


def _embedding_moment(layout: Layout) -> int:
    """The whole embedded video, and this rank's tokens of it in order."""
    tokens = layout.tokens + layout.share("global").shard
    return tokens * layout.spec.width * layout.itemsize


def _always(layout: Layout) -> int:
    """Latents and predictions, rotary tables (whole, since a share of them is a view) and embedded text."""
    spec, e = layout.spec, layout.itemsize
    _, out_values = spec.patch_values
    latents = LATENT_TENSORS * latent_bytes(layout) + PREDICTION_TENSORS * layout.tokens * out_values * e
    rotary = 2 * layout.tokens * spec.head_dim * FP32_BYTES
    text = layout.text * (layout.passes * spec.transformer.text_dim + spec.width) * e
    return latents + rotary + text


def decode_cost(spec: ModelSpec, height: int, width: int, num_latents: int) -> tuple[int, int]:
    """Peak bytes without weights, and operations, of decoding `num_latents` latent frames one by one on one device.

    From running the decoder on the meta device: three frames show its peak, since memory is bounded from then on. What a
    convolution kernel takes for itself is not in it.
    """
    shape = spec.video.latent_shape(1, height, width)
    by_frame = _decode_trace(json.dumps(spec.configs["vae"], sort_keys=True), (shape[1], shape[3], shape[4]))
    shown = by_frame[: min(num_latents, len(by_frame))]
    extra = max(num_latents - len(by_frame), 0)
    return max(peak for peak, _ in shown), sum(ops for _, ops in shown) + extra * by_frame[-1][1]


@functools.cache
def _decode_trace(config: str, latent: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Peak bytes and operations of each of three latent frames [z, h, w]."""
    spec = ModelSpec(name="", source="", configs={"vae": json.loads(config)})
    channels, rows, columns = latent
    latents = torch.empty(1, channels, 3, rows, columns, device="meta")
    by_frame = []
    vae = spec.make_vae()  # before anything is counted: weights are a part of their own
    with LiveBytes() as live, FlopCounterMode(display=False) as counter:
        done = 0
        for frames in stream_decode(vae, latents):
            to_bytes = 3 * frames.nbytes  # engine.decode.to_uint8: scaled, clamped, rounded
            total = counter.get_total_flops()
            by_frame.append((max(live.peak, live.now + to_bytes), total - done))
            done = total
    return by_frame
