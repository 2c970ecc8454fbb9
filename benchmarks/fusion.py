"""What the fusion costs: the Gram form against the SVD it replaces, by parts, and as a share of dual attention.

python -m benchmarks.fusion
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import tables
from benchmarks.measure import (
    CPU,
    SHAPES,
    Shape,
    layer_parser,
    layer_result,
    relative_error,
    round_robin,
    run,
)
from freespec import spectrum
from freespec.kernels import select_kernel
from freespec.methods import Branches, FreeSpec, Layer, StepPlan
from freespec.methods.freespec import FusionWeights

# Progress at which the weights are taken: both branches matter there.
PROGRESS = 0.2


def svd_fp32(o_local: Tensor, o_global: Tensor, weights: FusionWeights) -> Tensor:
    """Eq. 4-13 as written, in fp32: both long SVDs, new singular values, residual."""
    local, o_global = (x.float().transpose(1, 2) for x in (o_local, o_global))
    u, sigma_l, vh = torch.linalg.svd(local, full_matrices=False)
    _, sigma_g, _ = torch.linalg.svd(o_global, full_matrices=False)
    g, lam = weights.rank.float(), weights.residual.float()
    rebuilt = (u * (g * sigma_g + (1 - g) * sigma_l)[..., None, :]) @ vh
    return ((1 - lam) * rebuilt + lam * o_global).transpose(1, 2).to(o_local.dtype)


def falling_branches(
    shape: Shape, device: torch.device, dtype: torch.dtype, *, heads: int, tokens: int | None = None
) -> Branches:
    """O_l and O_g [1, S, N, D] with singular values from 1 to 0.01, each in its own basis."""
    draw = torch.Generator(device).manual_seed(0)
    falling = 0.01 ** torch.linspace(0, 1, shape.head_dim, device=device)
    made = []
    for scale in (1.0, 0.8):
        sizes = (1, tokens or shape.num_tokens, heads, shape.head_dim)
        out = torch.randn(sizes, generator=draw, device=device) * (scale * falling)
        turn = torch.linalg.qr(torch.randn(heads, shape.head_dim, shape.head_dim, generator=draw, device=device))[0]
        made.append(torch.einsum("bsnd,nde->bsne", out, turn).to(dtype))
    return Branches(o_local=made[0], o_global=made[1])


def weights_of(shape: Shape, device: torch.device) -> FusionWeights:
    """FreeSpec's weights of a dual step."""
    return FreeSpec().weights(StepPlan(mode="dual", progress=PROGRESS), shape.grid, shape.head_dim, device)


def fuse_call(
    shape: Shape,
    branches: Branches,
    weights: FusionWeights | None = None,
    sum_tokens: Callable[[Tensor], Tensor] = lambda total: total,
    **of_ranks: Callable[..., Tensor],
) -> Callable[[], Tensor]:
    """FreeSpec's fusion of both branches; `sum_tokens` adds the Grams of all ranks, `of_ranks` are other fields of Layer."""
    layer = Layer(grid=shape.grid, sum_tokens=sum_tokens, sum_heads=lambda total: total, **of_ranks)
    found = weights_of(shape, branches.o_local.device) if weights is None else weights
    return lambda: FreeSpec().fuse(branches, found, layer)


def part_calls(shape: Shape, branches: Branches, weights: FusionWeights) -> dict[str, Callable[[], Any]]:
    """The fusion and its three parts."""
    o_local, o_global = branches.o_local, branches.o_global
    grams = spectrum.gram(o_local), spectrum.gram(o_global)
    matrix = spectrum.local_basis_matrix(*grams, weights.rank)
    return {
        "fusion": fuse_call(shape, branches, weights),
        "grams": lambda: (spectrum.gram(o_local), spectrum.gram(o_global)),
        "eigh": lambda: spectrum.local_basis_matrix(*grams, weights.rank),
        "apply": lambda: spectrum.reconstruct(o_local, matrix, o_global, weights.residual, "lerp"),
    }


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape."""
    shape = SHAPES[name]
    heads = args.heads or shape.cpu_heads
    branches, weights = falling_branches(shape, CPU, torch.float32, heads=heads), weights_of(shape, CPU)
    o_local, o_global = branches.o_local, branches.o_global
    calls = part_calls(shape, branches, weights) | {
        "SVD in fp32": lambda: svd_fp32(o_local, o_global, weights),
        "SVD in fp64": lambda: spectrum.svd_fusion_ref(o_local, o_global, weights.rank, weights.residual.item()),
    }
    if name not in args.no_dual:
        attention = shape.windowed(select_kernel(args.kernel, CPU, torch.float32))
        qkv = shape.draw(CPU, torch.float32, heads)
        calls["dual attention"] = lambda: attention.both(*qkv)
    first = {variant: call() for variant, call in calls.items()}  # also warms up
    errors = {form: relative_error(first[form], first["SVD in fp64"]) for form in ("fusion", "SVD in fp32")}
    del first
    times = round_robin(calls, CPU, args.repeats)
    found = {variant: {"error": errors.get(variant)} for variant in times}
    unders = [under for under in ("SVD in fp32", "SVD in fp64", "dual attention") if under in calls]
    return layer_result(name, heads, times, variants=found, pairs=[("fusion", under) for under in unders])


def main() -> None:
    """Measure the shapes, print and write."""
    arguments = layer_parser(__doc__)
    arguments.add_argument(
        "--no-dual", nargs="*", default=[], choices=list(SHAPES), help="shapes without dual attention"
    )
    args = arguments.parse_args()
    run("fusion", args, (measure(name, args) for name in args.shapes), tables.fusion, {"progress": PROGRESS})


if __name__ == "__main__":
    main()
