"""Predicted seconds of a step: operations at assumed rates, passes over memory, and the messages that nothing hides."""

from collections.abc import Mapping
from math import prod

from engine.planner.flops import ATTENTION, FP32, GEMM, GRAMS, forward_flops
from engine.planner.gpu import EIGH_DIM, GpuSpec
from engine.planner.layout import Layout
from engine.planner.model import FP32_BYTES
from freespec.methods import Mode

TERA = 1e12
GIGA = 1e9
# These wait for their messages. Ring blocks travel while the block before is attended, so only the excess is waited for.
EXPOSED = ("all_to_all", "halo", "grams", "gather", "cfg")


def step_seconds(layout: Layout, mode: Mode, gpu: GpuSpec, kernel: str) -> dict[str, float]:
    """Predicted seconds of one denoising step by what takes them, on the rank that takes longest.

    Keys: matrices, attention, spectrum (Grams, fusion, eigh), memory (norms, rotary, merges, copies), communication.
    """
    flops = forward_flops(layout.spec, layout.share(mode), mode)
    half = layout.itemsize < FP32_BYTES
    peak = (gpu.bf16_tflops if half else gpu.fp32_tflops) * TERA
    gemm, fp32 = peak * gpu.gemm_fraction, gpu.fp32_tflops * TERA * gpu.fp32_fraction
    forwards = layout.forwards
    attention = forwards * sum(flops[part] for part in ATTENTION) / (peak * gpu.attention_rate(kernel, half=half))
    eigh = 0.0
    if mode in ("dual", "views_global"):  # heads lie side by side, and so does a batch of both passes
        eigh = layout.calls * layout.spec.layers * gpu.eigh_seconds * layout.spec.head_dim / EIGH_DIM
    seconds = {
        "matrices": forwards * sum(flops[part] for part in GEMM) / gemm,
        "attention": attention,
        # Grams of half precision are products on tensor cores.
        "spectrum": forwards * (sum(flops[part] for part in GRAMS) / gemm + sum(flops[part] for part in FP32) / fp32)
        + eigh,
        "memory": forwards * pass_bytes(layout, mode) / (gpu.memory_gb_s * GIGA * gpu.memory_fraction),
    }
    waits = communication_seconds(layout, mode, gpu, attention)
    return seconds | {"communication": waits + weight_seconds(layout, mode, gpu, sum(seconds.values()))}


def communication_seconds(layout: Layout, mode: Mode, gpu: GpuSpec, attention: float) -> float:
    """Seconds of one step in which a rank only waits for messages; `attention` is what it computes while the ring turns."""
    num_bytes = layout.step_bytes(mode)
    seconds = {kind: num_bytes[kind] / _rate(layout, kind, mode, gpu) for kind in num_bytes}
    return waiting_seconds(seconds, attention, blocks=layout.attention_plan(mode).ring)


def waiting_seconds(seconds: Mapping[str, float], attention: float, *, blocks: int) -> float:
    """Seconds that a rank only waits, of the `seconds` that its messages of each kind take.

    The ring has so many blocks, and each of its transfers runs beside the attention of one of them.
    """
    ring = max(0.0, seconds["ring"] - attention * (blocks - 1) / blocks)
    return sum(seconds[kind] for kind in EXPOSED) + ring


def weight_seconds(layout: Layout, mode: Mode, gpu: GpuSpec, computing: float) -> float:
    """Seconds of one step that a rank waits for layers of shared weights: each is gathered while the one before it runs."""
    seconds = layout.step_bytes(mode)["weights"] / _rate(layout, "weights", mode, gpu)
    return max(0.0, seconds - computing * (1 - 1 / layout.spec.layers))


def link_rate(span: int, gpu: GpuSpec, *, world: int) -> float:
    """Bytes per second inside groups of `span` neighbouring ranks, of the slowest group among `world` ranks.

    Nodes hold `gpu.gpus_per_node` neighbours each. A group crosses nodes unless its size divides that number: of three
    groups of 8 on nodes of 12 the middle one does.
    """
    within = world <= gpu.gpus_per_node or gpu.gpus_per_node % span == 0
    rate = gpu.intra_node_gb_s if within else gpu.inter_node_gb_s
    return rate * GIGA * gpu.link_fraction


def _rate(layout: Layout, kind: str, mode: Mode, gpu: GpuSpec) -> float:
    return link_rate(layout.axis_span(kind, mode), gpu, world=prod(layout.degrees))


def pass_bytes(layout: Layout, mode: Mode) -> int:
    """Bytes that one forward reads and writes outside matrix products and attention kernels, on the busiest rank."""
    e, share = layout.itemsize, layout.share(mode)
    hidden = share.shard * layout.spec.width
    inside = share.queries * share.heads * layout.spec.head_dim
    ratio = layout.spec.numbers.ffn_dim / layout.spec.width
    per_layer = hidden * layout.spec.adapter.block_passes(ratio, e) + inside * attention_passes(layout, mode)
    return round(layout.spec.layers * per_layer)


def attention_passes(layout: Layout, mode: Mode) -> float:
    """Bytes per token and channel inside self-attention: copies of outputs, merges, Grams, fusion, packing of messages."""
    e, plan = layout.itemsize, layout.attention_plan(mode)
    cast = e + FP32_BYTES if e < FP32_BYTES else 0
    merges = (plan.ring - 1 if mode != "local" else 0) + (mode == "dual")
    views = layout.num_views * layout.window_frames / layout.frames  # how many views a token is in, in the mean
    total = merges * (3 * cast + 28)
    if mode in ("local", "dual"):
        total += 3 * e * (2 if mode == "dual" else 1)  # zeros, and groups copied to their rows
    if mode == "dual":
        total += (
            2 * (4 * e if cast else 20) + 2 * cast + 8 + 20 + (4 + e)
        )  # both Grams, scaled or in fp64; O M, lam O_g, their sum
        total += 4 * e  # k and v written a second time
    if mode in ("views", "views_global"):
        total += views * (e + 3 * FP32_BYTES) + FP32_BYTES + e  # weighted, added up in fp32
    if mode == "views_global":
        total += 2 * e + views * (4 * (e + FP32_BYTES) + 4 * FP32_BYTES + e)  # scaled q; Grams; two products, their sum
    if plan.ulysses > 1:
        total += 4 * 4 * e  # q, k, v and out: packed, then put in order
    return total
