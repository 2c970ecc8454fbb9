"""What the fusion costs: the Gram form against the SVD it replaces, by parts, and as a share of dual attention.

python -m benchmarks.fusion
python -m benchmarks.fusion --device cuda
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import (
    SHAPES,
    Shape,
    complete,
    environment,
    heads_of,
    parser,
    print_table,
    ratio,
    relative_error,
    round_robin,
    spread,
    write,
)
from freespec import spectrum
from freespec.attention import WindowedAttention
from freespec.kernels import select_kernel
from freespec.methods import Branches, FreeSpec, Grid, Layer, StepPlan
from freespec.methods.freespec import FusionWeights

# Progress at which the weights are taken: both branches matter there.
PROGRESS = 0.2


def svd_fp32(o_local: Tensor, o_global: Tensor, weights: FusionWeights) -> Tensor:
    """Eq. 4-13 as they are written, in fp32: both long SVDs, new singular values, residual."""
    local, o_global = (x.float().transpose(1, 2) for x in (o_local, o_global))
    u, sigma_l, vh = torch.linalg.svd(local, full_matrices=False)
    _, sigma_g, _ = torch.linalg.svd(o_global, full_matrices=False)
    g, lam = weights.rank.float(), weights.residual.float()
    rebuilt = (u * (g * sigma_g + (1 - g) * sigma_l)[..., None, :]) @ vh
    return ((1 - lam) * rebuilt + lam * o_global).transpose(1, 2).to(o_local.dtype)


def branches(shape: Shape, heads: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """O_l and O_g [1, S, N, D] whose singular values fall from 1 to 0.01, in the dtype of the run."""
    generator = torch.Generator().manual_seed(0)
    falling = 0.01 ** torch.linspace(0, 1, shape.head_dim)
    made = []
    for scale in (1.0, 0.8):
        o_global = torch.randn(1, shape.num_tokens, heads, shape.head_dim, generator=generator) * (scale * falling)
        turn = torch.linalg.qr(torch.randn(heads, shape.head_dim, shape.head_dim, generator=generator))[0]
        made.append(torch.einsum("bsnd,nde->bsne", o_global, turn).to(args.device, getattr(torch, args.dtype)))
    return made[0], made[1]


def fusion_calls(o_local: Tensor, o_global: Tensor, weights: FusionWeights, grid: Grid) -> dict[str, Callable[[], Any]]:
    """The fusion, its three parts, and the two forms of the SVD."""
    grams = spectrum.gram(o_local), spectrum.gram(o_global)
    matrix = spectrum.local_basis_matrix(*grams, weights.rank)
    branches = Branches(o_local=o_local, o_global=o_global)
    layer = Layer(grid=grid, sum_tokens=lambda total: total, sum_heads=lambda total: total)
    return {
        "fusion": lambda: FreeSpec().fuse(branches, weights, layer),
        "grams": lambda: (spectrum.gram(o_local), spectrum.gram(o_global)),
        "eigh": lambda: spectrum.local_basis_matrix(*grams, weights.rank),
        "apply": lambda: spectrum.reconstruct(o_local, matrix, o_global, weights.residual, "lerp"),
        "SVD in fp32": lambda: svd_fp32(o_local, o_global, weights),
        "SVD in fp64": lambda: spectrum.svd_fusion_ref(o_local, o_global, weights.rank, weights.residual.item()),
    }


def dual_call(shape: Shape, like: Tensor, kernel: str) -> Callable[[], Any]:
    """Both branches of one layer on normal q, k, v."""
    layer = WindowedAttention(
        num_frames=shape.num_frames,
        frame_tokens=shape.frame_tokens,
        window_frames=shape.window_frames,
        kernel=select_kernel(kernel, like.device, like.dtype),
    )
    q, k, v = (torch.randn_like(like) for _ in range(3))
    return lambda: layer.both(q, k, v)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one shape."""
    shape, device = SHAPES[name], torch.device(args.device)
    heads = heads_of(shape, args)
    o_local, o_global = branches(shape, heads, args)
    weights = FreeSpec().weights(StepPlan(mode="dual", progress=PROGRESS), shape.grid, shape.head_dim, device)
    calls = fusion_calls(o_local, o_global, weights, shape.grid)
    if name not in args.no_dual:
        calls["dual attention"] = dual_call(shape, o_local, args.kernel)
    first = {variant: call() for variant, call in calls.items()}  # also warms up
    errors = {form: relative_error(first[form], first["SVD in fp64"]) for form in ("fusion", "SVD in fp32")}
    del first
    times = round_robin(calls, device, args.repeats)
    pairs = [("fusion", under) for under in ("SVD in fp32", "SVD in fp64", "dual attention") if under in calls]
    return {
        "shape": name,
        "sizes": str(shape),
        "heads": heads,
        "head_dim": shape.head_dim,
        "variants": {
            variant: {unit: spread(seconds) for unit, seconds in row.items()} | {"error": errors.get(variant)}
            for variant, row in times.items()
        },
        "ratios": {
            f"{over} / {under}": {unit: ratio(times[over][unit], times[under][unit]) for unit in ("wall_s", "cpu_s")}
            for over, under in pairs
        },
    }


def show(result: dict[str, Any]) -> None:
    """One shape as a table."""
    print(f"\n{result['shape']}: {result['sizes']}, {result['heads']} heads x {result['head_dim']}")
    rows = []
    for name, row in result["variants"].items():
        wall, error = row["wall_s"], row["error"]
        times = [f"{wall['median'] * 1e3:.1f}", f"{wall['min'] * 1e3:.1f}-{wall['max'] * 1e3:.1f}"]
        rows.append([name, *times, f"{row['cpu_s']['median'] * 1e3:.1f}", f"{error:.1e}" if error is not None else ""])
    print_table(["variant", "ms", "min-max", "CPU ms", "error against fp64"], rows)
    for name, value in result["ratios"].items():
        wall, cpu = value["wall_s"], value["cpu_s"]
        print(f"{name}: {wall['median']:.4f} ({wall['min']:.4f}-{wall['max']:.4f}); in CPU time {cpu['median']:.4f}")


def main() -> None:
    """Measure the shapes and write the file."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--no-dual", nargs="*", default=[], choices=list(SHAPES), help="shapes without dual attention"
    )
    args = complete(arguments.parse_args())
    where = environment(torch.device(args.device), args.note)
    print(where)
    settings = {"dtype": args.dtype, "kernel": args.kernel, "repeats": args.repeats, "progress": PROGRESS}
    results: list[dict[str, Any]] = []
    for name in args.shapes:
        results.append(measure(name, args))
        show(results[-1])
        where["load_average_end"] = os.getloadavg()[0]
        path = write(args.results, "fusion", where, settings, results)  # after every shape: a long one may be stopped
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
