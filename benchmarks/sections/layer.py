"""One self-attention layer at full size: each kernel's global, local and dual call, Triton, FlexAttention, and the fusion.

Every variant runs once per round, so that each ratio compares calls of the same minute. The dense rate is set beside the
rate of a large matrix product of the same rounds.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.attention import CHECKED_QUERIES, exact_branches, peak_memory
from benchmarks.fusion import svd_fp32
from benchmarks.measure import Shape, ratio, relative_error, round_robin, spread
from benchmarks.sections.bench import Bench
from freespec import spectrum
from freespec.attention import WindowedAttention, merge_into
from freespec.kernels import DualKernel, Kernel, select_dual
from freespec.methods import Branches, FreeSpec, Layer, StepPlan

MATRIX = 8192  # rows and columns of the product that gives the device's rate
SVD_SECONDS = 20.0  # that the SVDs of one model may take
SVD_HEADS = 2  # the SVD of all heads takes seconds: it and ours are compared on this many
PROGRESS = 0.2
QKV = tuple[Tensor, Tensor, Tensor]
Calls = dict[str, Callable[[], Any]]


def run(bench: Bench) -> None:
    """Both models' layers, the one of the goals first; then, of both, the SVDs, the slowest and the least like the rest."""
    for name, shape in bench.shapes.items():
        bench.record(name, measure(bench, shape))
        bench.empty_cache()
    for name, shape in bench.shapes.items():
        svd, why = {}, f"less than {SVD_SECONDS:.0f} s are left"
        if bench.has_time(SVD_SECONDS):
            svd, why = bench.attempt(lambda shape=shape: svd_against_grams(bench, shape))
        found = bench.results[name]
        bench.record(name, found | ({"svd": svd} if svd else {"left_out": found["left_out"] | {"literal SVD": why}}))


def inputs(bench: Bench, shape: Shape, heads: int) -> QKV:
    """Normal q, k, v [1, S, N, D]."""
    torch.manual_seed(0)
    sizes = (3, 1, shape.num_tokens, heads, shape.head_dim)
    q, k, v = torch.randn(sizes, device=bench.device, dtype=bench.dtype).unbind(0)
    return q, k, v


def windowed(
    shape: Shape, kernel: Kernel, dual_kernel: DualKernel | None = None, rest_kernel: Kernel | None = None
) -> WindowedAttention:
    """The geometry of a shape around a kernel."""
    return WindowedAttention(
        num_frames=shape.num_frames,
        frame_tokens=shape.frame_tokens,
        window_frames=shape.window_frames,
        kernel=kernel,
        dual_kernel=dual_kernel,
        rest_kernel=rest_kernel,
    )


def measure(bench: Bench, shape: Shape) -> dict[str, Any]:
    """All variants that this device can do: time, rate, peak memory, error, and the ratios of the goals."""
    qkv = inputs(bench, shape, shape.heads)
    kernels, refused = bench.kernels()
    kernels = {name: kernel for name, kernel in kernels.items() if name != "cuda_efficient" or len(kernels) == 1}
    calls = dense_calls(shape, qkv, kernels) | triton_calls(bench, shape, qkv, refused)
    calls |= other_calls(bench, shape, qkv, refused)
    checked = check(bench, shape, qkv, calls, refused)
    calls = {name: call for name, call in calls.items() if name in checked}
    fusion = fusion_calls(bench, shape, calls)
    fusion["matrix product"] = matrix_product(bench)
    for name, call in fusion.items():
        call()
        checked[name] = {"peak_extra_mib": peak_memory(call, bench.device)[0]}
    times = {name: row["wall_s"] for name, row in round_robin(calls | fusion, bench.device, bench.repeats).items()}
    fastest = {branch: quickest(times, f"{branch} ") for branch in ("global", "local", "dual")}
    work = operations(bench, shape)
    return {
        "sizes": str(shape),
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "fastest": {branch: name.removeprefix(f"{branch} ") for branch, name in fastest.items()},
        "variants": {
            name: {"wall_s": spread(seconds), "tflops": rate(work, name, seconds)} | checked.get(name, {})
            for name, seconds in times.items()
        },
        "ratios": ratios(times, fastest, work),
        "left_out": refused,
    }


def dense_calls(shape: Shape, qkv: QKV, kernels: dict[str, Kernel]) -> Calls:
    """Global, local, dual and two calls by dense kernels on strided views."""
    calls: Calls = {}
    for name, kernel in kernels.items():
        layer = windowed(shape, kernel)
        calls[f"global {name}"] = lambda layer=layer: (None, layer.dense(*qkv)[0])
        calls[f"local {name}"] = lambda layer=layer: (layer.local(*qkv, 0, 0)[0], None)
        calls[f"two calls {name}"] = lambda layer=layer: (layer.local(*qkv, 0, 0)[0], layer.dense(*qkv)[0])
        calls[f"dual {name}"] = lambda layer=layer: layer.both(*qkv)
    return calls


def triton_calls(bench: Bench, shape: Shape, qkv: QKV, refused: dict[str, str]) -> Calls:
    """The Triton kernel with its own tiles, with others, and with Gram matrices on the way."""
    dual, why = bench.attempt(lambda: select_dual("triton", bench.device, bench.dtype))
    if dual is None:
        refused["dual triton"] = why
        return {}
    tiles = importlib.import_module("freespec.triton_dual").Tiles
    others = []
    if not bench.small:  # interpreted, a call takes a second
        others = [
            tiles(queries=128, keys=128, warps=8, stages=2 if shape.head_dim > 64 else 3),
            tiles(queries=64, keys=64, warps=4, stages=3),
        ]
    calls: Calls = {"dual triton": lambda: windowed(shape, dual, dual).both(*qkv)}
    for tile in others:
        other = partial(dual, tiles=tile)
        name = f"dual triton {tile.queries}x{tile.keys}, {tile.warps} warps, {tile.stages} stages"
        calls[name] = lambda other=other: windowed(shape, dual, other).both(*qkv)
    with_grams = partial(dual, grams=True)
    calls["dual triton with Grams"] = lambda: windowed(shape, dual, with_grams).both(*qkv)
    return calls


def other_calls(bench: Bench, shape: Shape, qkv: QKV, refused: dict[str, str]) -> Calls:
    """FlexAttention with the window as a block mask: what the local branch would be without strided views."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    frame, window, last = shape.frame_tokens, shape.window_frames, shape.num_frames - shape.window_frames

    def in_window(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        first = (query // frame - window // 2).clamp(0, last)
        return (key // frame >= first) & (key // frame < first + window)

    def flex() -> tuple[Tensor, None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # uncompiled, on a CPU, it says that it is slow
            return attend(q, k, v, block_mask=mask).transpose(1, 2), None

    attend = flex_attention if bench.small else torch.compile(flex_attention, dynamic=False)
    size = shape.num_tokens
    # Uncompiled, making the block mask writes out S x S numbers.
    mask, why = bench.attempt(
        lambda: create_block_mask(in_window, None, None, size, size, device=bench.device, _compile=not bench.small)
    )
    calls: Calls = {}
    if mask is None:
        refused["local FlexAttention, masked"] = why
    else:
        calls["local FlexAttention, masked"] = flex
    return calls


def check(bench: Bench, shape: Shape, qkv: QKV, calls: Calls, refused: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Peak memory and errors against fp64 of every variant that runs; what does not run is written down and left out."""
    queries = torch.linspace(
        0, shape.num_tokens - 1, min(CHECKED_QUERIES, shape.num_tokens), device=bench.device
    ).long()
    exact = exact_branches(shape, qkv, queries)
    checked = {}
    for name, call in calls.items():
        first, why = bench.attempt(call)  # compiles, and picks algorithms
        if first is None:
            refused[name] = why
            continue
        peak, out = peak_memory(call, bench.device)
        pairs = [(branch, *x) for branch, *x in zip(("local", "global"), out, exact, strict=True) if x[0] is not None]
        error = {branch: relative_error(actual[:, queries], right) for branch, actual, right in pairs}
        checked[name] = {"peak_extra_mib": peak, "error": error}
        del first, out
    return checked


def fusion_calls(bench: Bench, shape: Shape, calls: Calls) -> Calls:
    """The fusion and its parts on the branches of a dual call, and the merge of two of them."""
    o_local, o_global = next(call for name, call in calls.items() if name.startswith("dual "))()
    method = FreeSpec()
    weights = method.weights(StepPlan(mode="dual", progress=PROGRESS), shape.grid, shape.head_dim, bench.device)
    layer = Layer(grid=shape.grid, sum_tokens=lambda total: total, sum_heads=lambda total: total)
    grams = spectrum.gram(o_local), spectrum.gram(o_global)
    matrix = spectrum.local_basis_matrix(*grams, weights.rank)
    lse = torch.zeros(o_local.shape[:3], device=bench.device)
    target, target_lse = o_local.clone(), lse.clone()
    return {
        "fusion": lambda: method.fuse(Branches(local=o_local, wide=o_global), weights, layer),
        "grams": lambda: (spectrum.gram(o_local), spectrum.gram(o_global)),
        "eigh": lambda: spectrum.local_basis_matrix(*grams, weights.rank),
        "apply": lambda: spectrum.reconstruct(o_local, matrix, o_global, weights.residual, "lerp"),
        "merge": lambda: merge_into(target, target_lse, o_global, lse),
    }


def matrix_product(bench: Bench) -> Callable[[], Tensor]:
    """The product of two large matrices in the dtype of the run: the most that this device reaches."""
    size = 256 if bench.small else MATRIX
    a, b = torch.randn(2, size, size, device=bench.device, dtype=bench.dtype).unbind(0)
    return lambda: a @ b


def operations(bench: Bench, shape: Shape) -> dict[str, float]:
    """Multiply-adds x 2 of each kind of call, in 10^12: 4 S K D per head."""
    whole = 4 * shape.num_tokens**2 * shape.head_dim * shape.heads / 1e12
    window = whole * shape.window_frames / shape.num_frames
    size = 256 if bench.small else MATRIX
    return {
        "global": whole,
        "local": window,
        "two calls": whole + window,
        "dual": whole,
        "matrix product": 2 * size**3 / 1e12,
    }


def rate(work: dict[str, float], name: str, seconds: list[float]) -> float | None:
    """TFLOP/s of a variant, None for what is not counted."""
    kind = next((kind for kind in work if name.startswith(kind)), None)
    return work[kind] / spread(seconds)["median"] if kind else None


def quickest(times: dict[str, list[float]], prefix: str) -> str:
    """The variant with the smallest median among those whose name starts so."""
    found = {name: spread(seconds)["median"] for name, seconds in times.items() if name.startswith(prefix)}
    return min(found, key=lambda name: found[name])


def ratios(times: dict[str, list[float]], fastest: dict[str, str], work: dict[str, float]) -> dict[str, Any]:
    """The ratios that the goals are stated in, each within the same rounds."""
    wide, near, dual = (times[fastest[branch]] for branch in ("global", "local", "dual"))
    found = {
        "dual / global": ratio(dual, wide),
        "local / global": ratio(near, wide),
        "fusion / dual": ratio(times["fusion"], dual),
        "merge / dual": ratio(times["merge"], dual),
        "dual / two calls": ratio(dual, [a + b for a, b in zip(wide, near, strict=True)]),
        "dense rate / matrix rate": ratio(
            [work["global"] / s for s in wide], [work["matrix product"] / s for s in times["matrix product"]]
        ),
    }
    for name in [name.removeprefix("dual ") for name in times if name.startswith("dual ") and "triton" not in name]:
        found[f"dual / global, {name}"] = ratio(times[f"dual {name}"], times[f"global {name}"])
    strided = [name for name in times if name.startswith("dual ") and "triton" not in name]
    tritons = [name for name in times if name.startswith("dual triton")]
    if tritons and strided:
        best = min(strided, key=lambda name: spread(times[name])["median"])
        quick = min(tritons, key=lambda name: spread(times[name])["median"])
        found["dual triton / dual strided"] = ratio(times[quick], times[best])
    return found


def svd_against_grams(bench: Bench, shape: Shape) -> dict[str, Any]:
    """The paper's fusion as it is written, by two long SVDs, against ours, on the same few heads."""
    torch.manual_seed(0)
    falling = 0.01 ** torch.linspace(0, 1, shape.head_dim, device=bench.device)
    sizes = (2, 1, shape.num_tokens, SVD_HEADS, shape.head_dim)
    o_local, o_global = (torch.randn(sizes, device=bench.device) * falling).to(bench.dtype).unbind(0)
    method = FreeSpec()
    weights = method.weights(StepPlan(mode="dual", progress=PROGRESS), shape.grid, shape.head_dim, bench.device)
    layer = Layer(grid=shape.grid, sum_tokens=lambda total: total, sum_heads=lambda total: total)
    calls: Calls = {
        "literal SVD": lambda: svd_fp32(o_local, o_global, weights),
        "ours": lambda: method.fuse(Branches(local=o_local, wide=o_global), weights, layer),
    }
    for call in calls.values():
        call()
    times = round_robin(calls, bench.device, 2)
    return {
        "heads": SVD_HEADS,
        **{name: spread(row["wall_s"]) for name, row in times.items()},
        "literal SVD / ours": ratio(times["literal SVD"]["wall_s"], times["ours"]["wall_s"]),
    }
