"""Predicted seconds of a step: operations and bytes over a GPU's assumed rates, and messages that no computation hides."""

from collections.abc import Mapping
from math import prod

from engine.planner.flops import call_operations
from engine.planner.forward import count_forward
from engine.planner.gpu import EIGH_DIM, GpuSpec
from engine.planner.layout import VIEW_MODES, Layout
from engine.planner.model import FP32_BYTES
from freespec.methods import Mode

TERA = 1e12
GIGA = 1e9
# Kinds of messages that are waited for. Ring blocks travel while the block before is attended, so only the excess is waited for.
EXPOSED = ("all_to_all", "halo", "far", "grams", "gather", "cfg")
# Bytes that self-attention reads and writes per token and channel in half precision, its kernels aside, read off the code and rounded:
# to copy a branch's groups to their rows, merge two parts by log-sum-exp, fuse both branches, add up a view, pack and order an all-to-all.
COPY, MERGE, FUSE, VIEW, EXCHANGE = 6, 46, 80, 14, 32
TIERS = 5  # near, and two on either side, whose queries and keys are turned


def step_seconds(layout: Layout, mode: Mode, gpu: GpuSpec, kernel: str) -> dict[str, float]:
    """Predicted seconds of one denoising step on the slowest rank, by part.

    Keys: matrices, attention, spectrum (Grams, fusion, eigh), memory (norms, rotary, merges, copies), communication.
    """
    operations, half = call_operations(layout, mode), layout.itemsize < FP32_BYTES
    peak = (gpu.bf16_tflops if half else gpu.fp32_tflops) * TERA
    gemm, fp32 = peak * gpu.gemm_fraction, gpu.fp32_tflops * TERA * gpu.fp32_fraction
    eigh = 0.0
    if mode in ("dual", "views_global"):  # heads are decomposed side by side, and so is a batch of both passes
        eigh = layout.spec.layers * gpu.eigh_seconds * layout.spec.head_dim / EIGH_DIM
    call = {
        "matrices": operations["matrices"] / gemm,
        "attention": operations["attention"] / (peak * gpu.attention_rate(kernel, half=half)),
        # Grams of half precision are products on tensor cores.
        "spectrum": operations["grams"] / gemm + operations["fp32"] / fp32 + eigh,
        "memory": call_traffic(layout, mode) / (gpu.memory_gb_s * GIGA * gpu.memory_fraction),
    }
    seconds = {part: layout.calls * value for part, value in call.items()}
    waits = communication_seconds(layout, mode, gpu, seconds["attention"])
    return seconds | {"communication": waits + weight_seconds(layout, mode, gpu, sum(seconds.values()))}


def call_traffic(layout: Layout, mode: Mode) -> float:
    """Bytes that the blocks of one call read and write outside matrix products and attention kernels, on the busiest rank."""
    share, plan = layout.share(mode), layout.attention_plan(mode)
    views = layout.num_views * layout.window_frames / layout.frames  # mean number of views that hold a token
    merges = (plan.ring - 1 if mode != "local" and not layout.thins(mode) else 0) + (mode == "dual")
    passes: float = (
        MERGE * merges
        + EXCHANGE * (plan.ulysses > 1)
        + {"local": COPY, "frames": COPY, "tiers": TIERS * (MERGE + 2 * COPY), "dual": 2 * COPY + FUSE}.get(mode, 0)
    )
    if mode in VIEW_MODES:
        passes += views * (VIEW + FUSE * (mode == "views_global"))
    inside = layout.batch * share.queries * share.heads * layout.spec.head_dim
    return layout.spec.layers * (count_forward(layout).block_traffic + inside * passes * layout.itemsize / 2)


def communication_seconds(layout: Layout, mode: Mode, gpu: GpuSpec, attention: float) -> float:
    """Seconds of one step that a rank waits for messages; `attention` are the seconds that hide the ring."""
    num_bytes = layout.step_bytes(mode)
    seconds = {kind: num_bytes[kind] / _rate(layout, kind, mode, gpu) for kind in num_bytes}
    return waiting_seconds(seconds, attention, blocks=layout.attention_plan(mode).ring)


def waiting_seconds(seconds: Mapping[str, float], attention: float, *, blocks: int) -> float:
    """Seconds that a rank waits, given the `seconds` that its messages of each kind take.

    The ring has so many blocks, and each of its transfers runs beside the attention of one of them.
    """
    ring = max(0.0, seconds["ring"] - attention * (blocks - 1) / blocks)
    return sum(seconds[kind] for kind in EXPOSED) + ring


def weight_seconds(layout: Layout, mode: Mode, gpu: GpuSpec, computing: float) -> float:
    """Seconds of one step that a rank waits for sharded layers: each is gathered while the one before it runs."""
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
