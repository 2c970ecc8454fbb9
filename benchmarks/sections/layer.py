"""One self-attention layer at full size: each kernel's global, local and dual call, the fusion, Triton and FlexAttention.

Every variant runs once per round, and is recorded at once. The dense rate is compared with that of a large matrix product in the same rounds.
Triton and FlexAttention, which compile first, come last, in separate rounds with the strided call that each is compared with.
"""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.attention import (
    exact_branches,
    memory_and_error,
    peak_memory,
    spread_queries,
    strided_calls,
    tera_operations,
)
from benchmarks.far import dual_call, exact_rows, kept_of, share_of_operations
from benchmarks.fusion import falling_branches, fuse_call, part_calls, svd_fp32, weights_of
from benchmarks.measure import QKV, Shape, ratio, relative_error, round_robin, spread
from benchmarks.sections.bench import Bench, ShapeRun
from freespec.attention import merge_into
from freespec.kernels import Kernel, select_dual
from freespec.methods import Branches

MATRIX = 8192  # rows and columns of the product that gives the device's rate
SVD_SECONDS = 20.0  # that the SVDs of one model may take
SVD_HEADS = 2  # the SVD of all heads takes seconds: it and ours are compared on this many
FLEX = "local FlexAttention, masked"
FAR = "1/8"  # far keys of the variants `far`, dual calls that gather and attend to them
Calls = dict[str, Callable[[], Any]]


def run(bench: Bench) -> None:
    """Kernels and fusion of both models' layers, then their SVDs, then Triton and FlexAttention."""
    layers = [LayerRun(bench=bench, name=name, shape=shape) for name, shape in bench.shapes.items()]
    for measure in (dense_and_fusion, long_svd, triton_and_flex):
        for layer in layers:
            measure(layer)
            bench.empty_cache()


@dataclass(kw_only=True)
class LayerRun(ShapeRun):
    """Results of one model's layer so far.

    Attributes:
        beside: seconds of the strided call in the rounds of a variant that has rounds of its own.
        svd: the long SVDs against ours.
    """

    beside: dict[str, list[float]] = field(default_factory=dict)
    svd: dict[str, Any] = field(default_factory=dict)

    def found(self) -> dict[str, Any]:
        """Variants, the fastest of each branch, and the ratios of the goals."""
        work = operations(self.bench, self.shape)
        variants = {}
        for name in dict.fromkeys((*self.checked, *self.times)):
            seconds = self.times.get(name, [])
            timed = {"wall_s": spread(seconds), "tflops": rate(work, name, seconds)} if seconds else {}
            variants[name] = timed | self.checked.get(name, {})
        branches = {branch: quickest(self.times, f"{branch} ") for branch in ("global", "local", "dual", "far")}
        strided = {branch: name for branch, name in branches.items() if name}
        found = {
            "sizes": str(self.shape),
            "heads": self.shape.heads,
            "head_dim": self.shape.head_dim,
            "fastest": {branch: name.removeprefix(f"{branch} ") for branch, name in strided.items()},
            "variants": variants,
            "ratios": ratios(self, strided, work),
        }
        return found | ({"svd": self.svd} if self.svd else {})


def dense_and_fusion(layer: LayerRun) -> None:
    """Each dense kernel's calls and the parts of the fusion, in the same rounds."""
    bench, shape = layer.bench, layer.shape
    qkv = shape.draw(bench.device, bench.dtype)
    kernels, refused = bench.kernels()
    layer.left_out |= refused
    kernels = {name: kernel for name, kernel in kernels.items() if name != "cuda_efficient" or len(kernels) == 1}
    calls = dense_calls(shape, qkv, kernels)
    errors = errors_against_exact(bench, shape, qkv)
    calls = {name: call for name, call in calls.items() if layer.check(name, call, errors)}
    far, errors = far_calls(shape, qkv, kernels), errors_of_far(bench, shape, qkv)
    calls |= {name: call for name, call in far.items() if layer.check(name, call, errors)}
    bench.choose_solver(shape)
    parts, why = bench.attempt(lambda: fusion_calls(bench, shape, calls))
    if parts is None:
        layer.left_out["fusion"], parts = why, {}
    for name, call in (parts | {"matrix product": matrix_product(bench)}).items():
        if layer.check(name, call, layer.peak):
            calls[name] = call
    bench.rounds(calls, layer.add_time)


def long_svd(layer: LayerRun) -> None:
    """The paper's fusion by SVD, if there is time."""
    svd, why = None, f"less than {SVD_SECONDS:.0f} s are left"
    if layer.bench.has_time(SVD_SECONDS):
        svd, why = layer.bench.attempt(lambda: svd_against_grams(layer.bench, layer.shape))
    if svd is None:
        layer.left_out["literal SVD"] = why
    else:
        layer.svd = svd
    layer.write()


def triton_and_flex(layer: LayerRun) -> None:
    """The variants that compile first, each in rounds with the strided call that it is compared with."""
    bench, shape = layer.bench, layer.shape
    qkv = shape.draw(bench.device, bench.dtype)
    errors, of_far = errors_against_exact(bench, shape, qkv), errors_of_far(bench, shape, qkv)
    kernels, _ = bench.kernels()
    strided = dense_calls(shape, qkv, kernels) | far_calls(shape, qkv, kernels)
    for name, make in (triton_calls(bench, shape, qkv, layer.left_out) | {FLEX: flex_call(bench, shape, qkv)}).items():
        other = quickest(layer.times, f"{name.split()[0]} ")
        if other is None or not layer.check(name, make, of_far if name.startswith("far ") else errors):
            continue

        def add_time(which: str, seconds: float, name: str = name) -> None:
            if which == name:
                layer.add_time(name, seconds)
            else:
                layer.beside.setdefault(name, []).append(seconds)

        bench.rounds({other: strided[other], name: make}, add_time)
    layer.write()


def errors_against_exact(bench: Bench, shape: Shape, qkv: QKV) -> Callable[[Callable[[], Any]], dict[str, Any]]:
    """A function that measures a call's memory, and its errors against fp64 at some queries."""
    queries = spread_queries(shape, bench.device)
    exact = exact_branches(shape, qkv, queries)
    return lambda call: memory_and_error(call, exact, queries, bench.device)


def errors_of_far(bench: Bench, shape: Shape, qkv: QKV) -> Callable[[Callable[[], Any]], dict[str, Any]]:
    """`errors_against_exact` of calls of `far_calls`, whose reference weighs each key."""
    queries = spread_queries(shape, bench.device)
    exact = exact_rows(shape, qkv, queries, kept_of(shape, FAR, bench.device))

    def look(call: Callable[[], Any]) -> dict[str, Any]:
        peak, out = peak_memory(call, bench.device)
        return {"peak_extra_mib": peak, "error": {"global": relative_error(out[:, queries], exact)}}

    return look


def far_calls(shape: Shape, qkv: QKV, kernels: dict[str, Kernel]) -> Calls:
    """Dual calls with some of the far keys, by dense kernels."""
    kept = kept_of(shape, FAR, qkv[0].device)
    return {f"far {name}": dual_call(shape.windowed(kernel), qkv, kept) for name, kernel in kernels.items()}


def dense_calls(shape: Shape, qkv: QKV, kernels: dict[str, Kernel]) -> Calls:
    """Global, local, dual and two calls by dense kernels on strided views."""
    return {
        f"{kind} {name}": call
        for name, kernel in kernels.items()
        for kind, call in strided_calls(shape, qkv, kernel).items()
    }


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
    calls: Calls = {"dual triton": lambda: shape.windowed(dual, dual_kernel=dual).both(*qkv)}
    for tile in others:
        other = partial(dual, tiles=tile)
        name = f"dual triton {tile.queries}x{tile.keys}, {tile.warps} warps, {tile.stages} stages"
        calls[name] = lambda other=other: shape.windowed(dual, dual_kernel=other).both(*qkv)
    with_grams = partial(dual, grams=True)
    calls["dual triton with Grams"] = lambda: shape.windowed(dual, dual_kernel=with_grams).both(*qkv)
    kept = kept_of(shape, FAR, qkv[0].device)
    calls["far triton"] = dual_call(shape.windowed(dual, dual_kernel=dual), qkv, kept)
    return calls


def flex_call(bench: Bench, shape: Shape, qkv: QKV) -> Callable[[], tuple[Tensor, None]]:
    """FlexAttention with the window as a block mask: what the local branch would be without strided views."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    frame, window, last = shape.frame_tokens, shape.window_frames, shape.num_frames - shape.window_frames
    attend = flex_attention if bench.small else torch.compile(flex_attention, dynamic=False)
    masks: list[Any] = []

    def in_window(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        first = (query // frame - window // 2).clamp(0, last)
        return (key // frame >= first) & (key // frame < first + window)

    def flex() -> tuple[Tensor, None]:
        if not masks:  # in the first call, which is not timed; uncompiled it writes out S x S numbers
            size = shape.num_tokens
            masks.append(
                create_block_mask(in_window, None, None, size, size, device=bench.device, _compile=not bench.small)
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # uncompiled on a CPU it warns that it is slow
            return attend(q, k, v, block_mask=masks[0]).transpose(1, 2), None

    return flex


def fusion_calls(bench: Bench, shape: Shape, calls: Calls) -> Calls:
    """The fusion and its parts on the branches of a dual call, and the merge of two of them."""
    o_local, o_global = next(call for name, call in calls.items() if name.startswith("dual "))()
    branches = Branches(o_local=o_local, o_global=o_global)
    lse = torch.zeros(o_local.shape[:3], device=bench.device)
    target, target_lse = o_local.clone(), lse.clone()
    parts = part_calls(shape, branches, weights_of(shape, bench.device))
    return parts | {"merge": lambda: merge_into(target, target_lse, o_global, lse)}


def matrix_product(bench: Bench) -> Callable[[], Tensor]:
    """The product of two large matrices in the dtype of the run: the highest rate of this device."""
    size = 256 if bench.small else MATRIX
    a, b = torch.randn(2, size, size, device=bench.device, dtype=bench.dtype).unbind(0)
    return lambda: a @ b


def operations(bench: Bench, shape: Shape) -> dict[str, float]:
    """Multiply-adds x 2 of each kind of call, in 10^12."""
    size = 256 if bench.small else MATRIX
    work = tera_operations(shape, shape.heads)
    far = work["global"] * share_of_operations(shape, kept_of(shape, FAR))
    return work | {"far": far, "matrix product": 2 * size**3 / 1e12}


def rate(work: dict[str, float], name: str, seconds: list[float]) -> float | None:
    """TFLOP/s of a variant, None for what is not counted."""
    kind = next((kind for kind in work if name.startswith(kind)), None)
    return work[kind] / spread(seconds)["median"] if kind else None


def quickest(times: dict[str, list[float]], prefix: str) -> str | None:
    """The strided variant with this prefix and the smallest median; None before one is timed."""
    aside = ("triton", "FlexAttention")
    found = {
        name: spread(seconds)["median"]
        for name, seconds in times.items()
        if name.startswith(prefix) and not any(word in name for word in aside)
    }
    return min(found, key=lambda name: found[name]) if found else None


def ratios(layer: LayerRun, strided: dict[str, str], work: dict[str, float]) -> dict[str, Any]:
    """The ratios of the goals, each within the same rounds, of what is timed so far."""
    times = layer.times
    none: list[float] = []
    o_global, near, dual, far = (
        times.get(strided.get(branch, ""), none) for branch in ("global", "local", "dual", "far")
    )
    pairs = {
        "dual / global": (dual, o_global),
        "local / global": (near, o_global),
        "far / global": (far, o_global),
        "fusion / dual": (times.get("fusion", none), dual),
        "merge / dual": (times.get("merge", none), dual),
        "dual / two calls": (dual, [a + b for a, b in zip(o_global, near, strict=False)]),
        "dense rate / matrix rate": (
            [work["global"] / s for s in o_global],
            [work["matrix product"] / s for s in times.get("matrix product", none)],
        ),
    }
    for name in [name.removeprefix("dual ") for name in times if name.startswith("dual ") and "triton" not in name]:
        pairs[f"dual / global, {name}"] = (times[f"dual {name}"], times.get(f"global {name}", none))
    for kind in ("dual", "far"):
        tritons = [name for name in layer.beside if name.startswith(f"{kind} triton")]
        if tritons:
            quick = min(tritons, key=lambda name: spread(times.get(name) or layer.beside[name])["median"])
            pairs[f"{kind} triton / {kind} strided"] = (times.get(quick, none), layer.beside[quick])
    if FLEX in layer.beside:
        pairs["local FlexAttention / local strided"] = (times.get(FLEX, none), layer.beside[FLEX])
    whole = {name: [side[: min(map(len, sides))] for side in sides] for name, sides in pairs.items()}
    return {name: ratio(*sides) for name, sides in whole.items() if sides[0]}


def svd_against_grams(bench: Bench, shape: Shape) -> dict[str, Any]:
    """The paper's fusion by two long SVDs against the Gram form, on the same few heads."""
    branches = falling_branches(shape, bench.device, bench.dtype, heads=SVD_HEADS)
    weights = weights_of(shape, bench.device)
    calls: Calls = {
        "literal SVD": lambda: svd_fp32(branches.o_local, branches.o_global, weights),
        "ours": fuse_call(shape, branches, weights),
    }
    for call in calls.values():
        call()
    times = round_robin(calls, bench.device, 2)
    return {
        "heads": SVD_HEADS,
        **{name: spread(row["wall_s"]) for name, row in times.items()},
        "literal SVD / ours": ratio(times["literal SVD"]["wall_s"], times["ours"]["wall_s"]),
    }
