"""Every kernel path at full size against fp64: overlapping views, log-sum-exp, merge, Grams, eigh, fusion; Triton last."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.attention import exact_parts, spread_queries
from benchmarks.fusion import falling_branches, fuse_call, weights_of
from benchmarks.measure import QKV, Shape, relative_error
from benchmarks.sections.bench import Bench
from freespec import spectrum
from freespec.attention import WindowedAttention, merge
from freespec.kernels import select_dual

HEADS = 2  # of a layer: fp64 on a GPU is slow
QUERIES = 96  # spread over the video, to cover every query group
# Rounding units: an output may be off by a few of them; another branch differs by far more.
UNIT = {torch.bfloat16: 2**-8, torch.float32: 2**-23}
LIMIT = {"out": 4.0, "lse": 4.0}  # roundings; lse is fp32 everywhere, and counted in those
# Of the fusion, whose singular values fall to a hundredth: fp32 Grams lose no more than SUMS, and eigenvectors are fp64.
SUMS, VECTORS = 1e-5, 1e-10


def run(bench: Bench) -> None:
    """Both models' layers with every kernel, the parts of the fusion, Triton; ValueError at the end if anything is wrong."""
    for name, shape in bench.shapes.items():
        attention(bench, f"attention, {name}", shape)
    for name, shape in bench.shapes.items():
        bench.record(f"fusion, {name}", fusion(bench, shape))
    for name, shape in bench.shapes.items():
        triton(bench, f"attention, {name}", shape)
    refuse_wrong(bench.results)


def refuse_wrong(results: dict[str, Any]) -> None:
    """Raise ValueError with the names of what is further from fp64 than rounding."""
    rows = {name: found for name, found in results.items() if name.startswith("fusion")}
    for name, found in results.items():
        rows |= {} if name in rows else {f"{name}, {kernel}": row for kernel, row in found.items()}
    wrong = [name for name, row in rows.items() if row.get("within rounding") is False]
    if wrong:
        raise ValueError(f"not within rounding of fp64: {'; '.join(wrong)}")


def attention(bench: Bench, name: str, shape: Shape) -> None:
    """Errors of each kernel's branches, their log-sum-exps and a merge, and whether they are within rounding."""
    kernels, refused = bench.kernels()
    bench.record(name, {"left_out": refused})
    compare(bench, name, shape, {each: shape.windowed(kernel) for each, kernel in kernels.items()})


def triton(bench: Bench, name: str, shape: Shape) -> None:
    """The same of the Triton kernel."""
    dual, why = bench.attempt(lambda: select_dual("triton", bench.device, bench.dtype))
    if dual is None:
        bench.results[name]["left_out"]["triton"] = why
        bench.record(name, bench.results[name])
    else:
        compare(bench, name, shape, {"triton": shape.windowed(dual, dual_kernel=dual)})


def compare(bench: Bench, name: str, shape: Shape, layers: dict[str, WindowedAttention]) -> None:
    """Add the errors of each layer to the figures called `name`, as soon as they are known."""
    qkv = shape.draw(bench.device, bench.dtype, HEADS)
    queries = spread_queries(shape, bench.device, QUERIES)
    exact = exact_parts(shape, qkv, queries)
    for each, layer in layers.items():
        found, why = bench.attempt(lambda layer=layer: errors(layer, qkv, queries, exact))
        bench.record(name, bench.results[name] | {each: found if found is not None else {"does not run": why}})


def errors(layer: WindowedAttention, qkv: QKV, queries: Tensor, exact: dict[str, Tensor]) -> dict[str, Any]:
    """Relative errors at the queries; `control` compares the local branch with the global one, which must be far off."""
    (local, local_lse), (o_global, global_lse) = layer.dual(*qkv, 0, 0, dtype=qkv[0].dtype)
    actual = {"local out": local, "local lse": local_lse, "global out": o_global, "global lse": global_lse}
    if layer.dual_kernel is None:
        dense, dense_lse = layer.dense(*qkv)
        half = qkv[1].shape[1] // 2
        parts = [layer.dense(qkv[0], *(x[:, rows] for x in qkv[1:])) for rows in (slice(half), slice(half, None))]
        merged, merged_lse = merge(*parts[0], *parts[1])
        actual |= {"dense out": dense, "dense lse": dense_lse, "merged out": merged, "merged lse": merged_lse}
    result: dict[str, Any] = {}
    unit = UNIT[qkv[0].dtype]
    within = True
    for what, tensor in actual.items():
        branch, kind = what.split()
        right = exact[f"{'local' if branch == 'local' else 'global'} {kind}"]
        result[what] = relative_error(tensor[:, queries], right)
        # The logits are products of rounded q and k summed in fp32: their error does not shrink with the dtype's unit.
        allowed = LIMIT[kind] * (unit if kind == "out" else max(unit * 2**-6, 2**-22))
        within &= result[what] <= allowed
    control = relative_error(local[:, queries], exact["global out"])
    return result | {"control": control, "within rounding": within and control > 16 * LIMIT["out"] * unit}


def fusion(bench: Bench, shape: Shape) -> dict[str, Any]:
    """Grams against fp64, eigenvectors, and the fused output against the long SVD in fp64."""
    branches = falling_branches(shape, bench.device, bench.dtype, heads=HEADS)
    o_local, o_global, weights = branches.o_local, branches.o_global, weights_of(shape, bench.device)
    gram = spectrum.gram(o_local)
    exact = o_local.double().transpose(1, 2)
    sigma, vectors = spectrum.spectrum(gram)
    identity = torch.eye(shape.head_dim, dtype=torch.float64, device=bench.device)
    fused = fuse_call(shape, branches, weights)()
    right = spectrum.svd_fusion_ref(o_local, o_global, weights.rank, weights.residual.item())
    found = {
        "gram": relative_error(gram, exact.transpose(-1, -2) @ exact),
        "eigenvectors": (vectors.transpose(-1, -2) @ vectors - identity).abs().max().item(),
        "singular values": relative_error(sigma, torch.linalg.svdvals(exact)),
        "fused": relative_error(fused, right),
        "control": relative_error(o_local, right),
    }
    limits = {"gram": SUMS, "eigenvectors": VECTORS, "singular values": SUMS}
    limits["fused"] = max(SUMS, LIMIT["out"] * UNIT[bench.dtype])
    within = all(found[what] <= limit for what, limit in limits.items())
    return found | {"within rounding": within and found["control"] > 2 * limits["fused"]}
