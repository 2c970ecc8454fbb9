"""Peak memory of one rank by part: the largest sum over the moments of a forward.

The moments of self-attention follow engine/hooks/self_attention.py and parallel/attention.py; the rest is counted on the meta device.
Tests compare it with measured peaks. `e` is the size of a number in the transformer; merges work in fp32.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.adapters import ModelAdapter
from engine.adapters.base import DecodeMode, TimeSettings
from engine.config import DecodeConfig
from engine.decode.live_bytes import LiveBytes
from engine.decode.pieces import decode_step
from engine.planner.forward import count_forward
from engine.planner.layout import Layout, latent_bytes, latent_values, prediction_bytes
from engine.planner.model import FP32_BYTES, ModelSpec
from freespec.attention import merge_step
from freespec.methods import Mode
from freespec.spectrum import chunk_tokens
from parallel.shards import length

FP64_BYTES = 8
GIB = 2**30
# Both passes' predictions and their combination, in the transformer's precision.
PREDICTION_TENSORS = 3
# A decode has reached its peak after this many chunks.
SHOWN_CHUNKS = 3
# D x D matrices of a head alive at once while M is made from both Grams: those, eigenvectors, identity, products.
FUSION_MATRICES = 10


def denoise_peak(layout: Layout, mode: Mode) -> dict[str, int]:
    """Bytes at the worst moment of a forward, without weights: `latents`, `activations`, `kv_copies`, and `step_cache` if there is one."""
    counted = count_forward(layout)
    moments = {
        name: (counted.at_attention + layout.batch * activations, layout.batch * keys)
        for name, (activations, keys) in _attention_moments(layout, mode).items()
    }
    activations, copies = max(((counted.peak, 0), *moments.values()), key=sum)
    predictions = PREDICTION_TENSORS * prediction_bytes(layout)
    kept = cache_bytes(layout)
    latents = layout.spec.adapter.latent_tensors * latent_bytes(layout)
    return {
        "latents": latents + predictions + layout.passes * counted.text + counted.condition,
        "activations": activations,
        "kv_copies": copies,
        **({"step_cache": kept} if kept else {}),
    }


def cache_bytes(layout: Layout) -> int:
    """Bytes that the step cache of a rank keeps from one step to the next, of all passes that it runs.

    Of hidden states `first_block` keeps the output and residual of the first block and the residual of the others, `mag` the first
    block's input and the residual of all; `taylorseer` keeps two of the output projection's in fp32. None outlives its kind of step.
    """
    shard = layout.share("global").shard
    hidden = shard * layout.spec.width * layout.itemsize
    kept = {
        "none": 0,
        "first_block": 3 * hidden,
        "mag": 2 * hidden,
        "taylorseer": 2 * shard * latent_values(layout) * FP32_BYTES,
    }
    return layout.forwards * kept[layout.cache]


def _attention_moments(layout: Layout, mode: Mode) -> dict[str, tuple[int, int]]:
    """Moments of self-attention on the busiest rank, for one entry of the batch: (bytes of activations, of copies of keys and values).

    Exchange, both branches, their merge, the fusion and the way back, beside what is alive when attention starts.
    """
    e, plan, share = layout.itemsize, layout.attention_plan(mode), layout.share(mode)
    hidden = share.shard * layout.spec.width
    inside = share.queries * share.heads * layout.spec.head_dim  # numbers of q inside attention
    row = 2 * share.heads * layout.spec.head_dim * e  # k and v of one token
    lse = share.queries * share.heads * FP32_BYTES
    base = 3 * e * inside  # q, k, v
    near = layout.near_keys(mode) * row
    turns = plan.ring > 1 and mode != "local" and not layout.thins(mode)
    ring = min(plan.ring - 1, 2) * share.queries * row if turns else 0  # buffers of blocks on their way
    first = share.queries * row if turns else 0  # while near keys are attended
    sample = layout.kept_tokens * row if layout.thins(mode) else 0
    outputs = 2 if mode == "dual" else 1
    global_bytes = FP32_BYTES if turns else e  # a number of the global branch while parts are added to it
    token = share.heads * layout.spec.head_dim * FP32_BYTES
    merging = 3 * min(merge_step(share.queries), share.queries) * token
    moments = {
        # one output, and the entries of the largest group before they are copied into it
        "branch": (base + e * inside * (2 if mode in ("local", "dual") else 1) + lse, near + first + sample),
        # q, k, v, the branches, what is fused, gathered and projected
        "project": (
            e * inside * (3 + outputs + (mode == "dual")) + e * hidden * (1 if plan.ulysses == 1 else 3),
            near,
        ),
    }
    if mode in ("views", "views_global"):
        view = share.window * share.heads * layout.spec.head_dim  # numbers of one view
        kept = layout.num_views if mode == "views_global" else 1  # the sums of all views go over the ranks together
        scaled = 2 * e * inside if mode == "views_global" else 0  # scaled q and the global branch
        moments["views"] = (base + scaled + (kept + 1) * e * view + FP32_BYTES * (inside + view) + lse, 0)
    if mode == "frames":  # one branch, those before it as one, and the keys of a frame's queries
        moments["frames"] = (base + (e + FP32_BYTES) * inside + lse, layout.set_frames * layout.frame_tokens * row)
    if mode == "tiers":  # the sum in fp32, q and k at other positions, and the part of a run of frames
        moments["tiers"] = (base + (FP32_BYTES + 3 * e) * inside + merging + 3 * lse, 0)
    if plan.ulysses > 1:  # sent, received, put in order
        moments["exchange"] = (3 * e * hidden + max(3 * e * (hidden + inside), 6 * e * inside), 0)
    if mode == "dual":
        keys = sample or (layout.near_keys(mode) or share.queries) * row
        window = layout.window_frames * layout.kept * row if layout.kept else share.window * row
        rest = max(keys - window, 0)
        # the local output, the global one and a part of it, merged a chunk at a time; and the circle: the keys outside of a
        # window, written again as far as the windows of the middle frames slide
        moments["rest"] = (base + (2 * e + global_bytes) * inside + merging + 3 * lse, near + first + sample + 2 * rest)
        matrices = FUSION_MATRICES * share.heads * layout.spec.head_dim**2 * FP64_BYTES
        fusing = 3 * min(chunk_tokens(share.heads, layout.spec.head_dim), share.queries) * token
        moments["fuse"] = (base + 3 * e * inside + fusing + matrices, near)
    if mode in ("dual", "global") and turns:
        # the global output, a part and, at the end, the rounded sum; the local output is one more
        merged = global_bytes + e + (e if mode == "dual" else 0)
        # own keys were packed for the ring's first turn only, a halo stays
        moments["merge"] = (base + merged * inside + merging + 3 * lse, ring + (near if mode == "dual" else 0))
    return moments


def decode_cost(
    spec: ModelSpec, height: int, width: int, num_latents: int, *, mode: DecodeMode = "whole", decode: DecodeConfig
) -> tuple[int, int]:
    """Peak bytes without weights, and operations, of decoding whole frames of `num_latents` latent frames on one device.

    Counted by running the decoder on the meta device. Memory of a decode in chunks is bounded from the third chunk on; operations of later
    chunks are scaled by their length. Workspaces of convolution kernels are not counted.
    """
    vae = spec.configs["vae"]
    time = spec.adapter.time_settings(vae, mode, decode, num_latents=num_latents, seed=0)
    time = replace(time, noise_scale=0.0)  # adding noise to latents costs nothing, and meta tensors have none
    *_, rows, columns = spec.video.latent_shape(1, height, width)
    chunks = spec.adapter.open_decoder(spec.vae, _latents(spec, num_latents, rows, columns), time).chunks
    shown = chunks[:SHOWN_CHUNKS]
    size = (shown[-1][1], rows, columns)
    peak, ops = _decode_trace(spec.adapter, json.dumps(vae, sort_keys=True), size, len(shown), time)
    per_latent = ops[-1] / length(shown[-1])
    return peak, sum(ops) + round(sum(per_latent * length(chunk) for chunk in chunks[SHOWN_CHUNKS:]))


def encode_cost(spec: ModelSpec, num_frames: int, height: int, width: int) -> tuple[int, int]:
    """Peak bytes without weights, and operations, of encoding the pictures without which a checkpoint makes no video; (0, 0) for others.

    Counted as those of a decode are: on the meta device, from a few chunks.
    """
    if not spec.video.needs:
        return 0, 0
    vae, sizes = json.dumps(spec.configs["vae"], sort_keys=True), [1, 1 + spec.video.temporal_factor * SHOWN_CHUNKS]
    (_, one), (peak, shown) = (_encode_trace(spec.adapter, vae, frames, height, width) for frames in sizes)
    chunks = (num_frames - 1) // spec.video.temporal_factor
    kept = 2 * FP32_BYTES * prod(spec.video.latent_shape(num_frames, height, width))  # moments of all chunks
    return peak + 2 * kept, one + (shown - one) * chunks // SHOWN_CHUNKS


@functools.cache
def _encode_trace(adapter: ModelAdapter, config: str, num_frames: int, height: int, width: int) -> tuple[int, int]:
    with torch.device("meta"):
        vae = adapter.build("vae", json.loads(config)).eval()
        picture = torch.empty(1, 3, 1, height, width)
    with torch.no_grad(), LiveBytes() as live, FlopCounterMode(display=False) as counter:
        adapter.encode_pictures(vae, {"first": picture}, num_frames=num_frames)
        return live.peak, counter.get_total_flops()


def _latents(spec: ModelSpec, frames: int, rows: int, columns: int) -> torch.Tensor:
    return torch.empty(1, spec.video.channels, frames, rows, columns, device="meta")


@functools.cache
def _decode_trace(
    adapter: ModelAdapter, config: str, size: tuple[int, int, int], num_chunks: int, time: TimeSettings
) -> tuple[int, list[int]]:
    """Peak bytes, and operations of each of the first chunks, of latents of `size` frames, rows and columns."""
    with torch.device("meta"):
        vae = adapter.build(
            "vae", json.loads(config)
        ).eval()  # before anything is counted: weights are a part of their own
        latents = torch.empty(1, adapter.latent_channels(vae.config), *size)
    peak, totals = 0, [0]
    decoder = adapter.open_decoder(vae, latents, time)
    state = decoder.start()
    with torch.no_grad(), LiveBytes() as live, FlopCounterMode(display=False) as counter:

        def pieces() -> Iterator[torch.Tensor]:
            for index in range(num_chunks):
                yield decode_step(decoder, decoder.latents(index), state, index=index)

        for frames in decoder.join(pieces()):
            shown = frames.clamp(-1.0, 1.0)
            to_bytes = 9 * shown.nbytes // 4  # engine.decode.pieces.to_uint8: scaled, rounded, and a quarter as bytes
            peak = max(peak, live.peak, live.now + to_bytes)
            totals.append(counter.get_total_flops())
            del frames, shown
    return peak, [after - before for before, after in pairwise(totals)]
