"""xfuser's attention gives what our scatter, global branch and gather give, and what it cannot do is refused in one line.

On a recorded interface: xfuser itself does not import without an accelerator.
"""

import ast
import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from parallel.attention import TORCH_EXCHANGE, SequenceLayout
from parallel.shards import LayerShape, SequencePlan, layer_bytes
from parallel.xfuser import TYPES, check_xfuser, xfuser_attention
from tests.parallel import xfuser_stand_in
from tests.parallel.masked import MaskedKernels
from tests.parallel.worlds import ByteCount, seeded, small_mesh
from tests.ranks import run_ranks

HEAD_DIM = 6


class Case(NamedTuple):
    cfg: int
    ring: int
    ulysses: int
    fault: str = ""


def compare(rank: int, case: Case) -> float:
    """Largest difference between the two on this rank, as a share of the largest entry."""
    mesh = small_mesh(cfg=case.cfg, ring=case.ring, ulysses=case.ulysses)
    plan = SequencePlan(tokens=24, heads=4, ring=case.ring, ulysses=case.ulysses)
    ours, theirs = ByteCount(), ByteCount()
    layout = SequenceLayout(mesh=mesh, plan=plan, exchange=TORCH_EXCHANGE, trace=ours.trace())
    # The halves of a cfg axis have other tensors: a layer that talked to the other half would see the wrong keys.
    whole = seeded(3, 2, plan.tokens, plan.heads, HEAD_DIM, seed=mesh.cfg.rank)
    q, k, v = (layout.shard_tokens(x, dim=1) for x in whole)
    inner = layout.branches(*layout.scatter(q, k, v), "global", MaskedKernels(frames=8, frame_tokens=3, window=3))[1]
    expected = layout.gather(inner)
    with xfuser_stand_in.installed():
        attention = xfuser_attention(mesh, kernel="cuda_flash")
    assert attention.layer.attn_type is xfuser_stand_in.AttnType.TORCH_FLASH
    if case.fault == "no ring":
        attention.layer.ring_pg = mesh.alone.group
    if case.fault == "the other half's groups":
        attention.layer.ulysses_pg = mesh.cfg.group
    actual = attention(q, k, v, layout=replace(layout, trace=theirs.trace()))
    shape = LayerShape(batch=2, head_dim=HEAD_DIM, itemsize=8)
    planned = layer_bytes(plan, mesh.sequence.rank, "global", shape=shape, halo=lambda start, stop: (0, plan.tokens))
    assert +theirs.sent == +ours.sent == {kind: count for kind, count in planned.items() if count}
    return float((actual - expected).abs().max() / expected.abs().max())


CASES = {
    2: [Case(1, 2, 1), Case(1, 1, 2), Case(2, 1, 1)],
    4: [Case(1, 2, 2), Case(1, 4, 1), Case(1, 1, 4), Case(2, 2, 1), Case(2, 1, 2)],
}
BROKEN = [Case(1, 2, 2, "no ring"), Case(2, 1, 2, "the other half's groups")]


@pytest.mark.parametrize("ranks", CASES)
def test_it_is_our_global_branch_over_any_mesh(ranks: int, tmp_path: Path) -> None:
    faults = BROKEN if ranks == 4 else []
    errors = run_ranks(ranks, compare, [*CASES[ranks], *faults], tmp_path)
    for case, of_ranks in zip([*CASES[ranks], *faults], errors, strict=True):
        if case.fault:  # negative controls
            assert max(of_ranks) > 1e-3, case
        else:
            assert max(of_ranks) < 1e-12, case


EVEN = SequencePlan(tokens=24, heads=4, ring=2, ulysses=2)


@pytest.mark.parametrize(
    ("plan", "device", "kernel", "without", "message"),
    [
        (EVEN, "cpu", "auto", (), "runs on CUDA only, and the device is cpu; use the torch provider"),
        (
            SequencePlan(tokens=25, heads=4, ring=2, ulysses=2),
            "cuda",
            "auto",
            (),
            r"25 tokens over 4 ranks are not: \[6, 6,",
        ),
        (
            SequencePlan(tokens=24, heads=3, ring=2, ulysses=2),
            "cuda",
            "auto",
            (),
            r"3 heads over 2 ranks are not: \[1, 2\]",
        ),
        (
            EVEN,
            "cuda",
            "plain",
            (),
            "attention.kernel plain has no counterpart in xfuser; choose one of auto, cuda_flash",
        ),
        (EVEN, "cuda", "cuda_cudnn", (), "no log-sum-exp to merge the parts of a ring of 2 by; use parallel.ring 1"),
        (EVEN, "cuda", "cuda_efficient", (), "no log-sum-exp to merge the parts of a ring of 2"),
        (EVEN, "cuda", "cuda_flash", ("xfuser",), r"needs the package xfuser, which is not installed: pip install"),
        (EVEN, "cuda", "cuda_flash", ("yunchang",), "needs the package yunchang"),
        (EVEN, "cuda", "auto", ("flash_attn",), "needs the package flash-attn; install it, or choose cuda_flash"),
    ],
)
def test_what_it_cannot_do_is_one_line(
    plan: SequencePlan, device: str, kernel: str, without: tuple[str, ...], message: str
) -> None:
    with xfuser_stand_in.installed(without=without), pytest.raises((ValueError, ImportError), match=message) as caught:
        check_xfuser(plan, device_type=device, kernel=kernel)
    assert "\n" not in str(caught.value)


def test_what_it_can_do_is_let_through() -> None:
    single = SequencePlan(tokens=24, heads=4, ring=1, ulysses=4)
    with xfuser_stand_in.installed():
        for kernel in TYPES:
            check_xfuser(single, device_type="cuda", kernel=kernel)
            assert hasattr(xfuser_stand_in.AttnType, TYPES[kernel])
        check_xfuser(EVEN, device_type="cuda", kernel="cuda_flash")


def uneven(rank: int, _case: None) -> str:
    mesh = small_mesh(ulysses=2)
    plan = SequencePlan(tokens=5, heads=2, ring=1, ulysses=2)
    layout = SequenceLayout(mesh=mesh, plan=plan, exchange=TORCH_EXCHANGE, trace=ByteCount().trace())
    with xfuser_stand_in.installed():
        attention = xfuser_attention(mesh, kernel="auto")
    with pytest.raises(ValueError, match=r"5 tokens over 2 ranks are not: \[2, 3\]") as caught:
        attention(*torch.zeros(3, 1, rank + 2, 2, 4), layout=layout)
    return str(caught.value)


def test_video_of_another_length_is_refused_on_all_ranks(tmp_path: Path) -> None:
    [messages] = run_ranks(2, uneven, [None], tmp_path)
    assert len(set(messages)) == 1


def recorded(function: ast.FunctionDef) -> list[tuple[str, str | None]]:
    """Names of arguments with their defaults, in order."""
    arguments = function.args
    places = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(places) - len(arguments.defaults))
    pairs = [*zip(places, missing + arguments.defaults, strict=True)]
    pairs += [*zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [(argument.arg, None if default is None else ast.unparse(default)) for argument, default in pairs]


def methods(source: str) -> dict[str, list[tuple[str, str | None]]]:
    tree = ast.parse(source)
    [kind] = [
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "xFuserLongContextAttention"
    ]
    return {node.name: recorded(node) for node in kind.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.skipif(importlib.util.find_spec("xfuser") is None, reason="the optional package xfuser is not installed")
def test_the_recorded_signatures_are_those_of_the_installed_package() -> None:
    """Read, not imported: that needs an accelerator."""
    spec = importlib.util.find_spec("xfuser")
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent / "core" / "long_ctx_attention" / "hybrid" / "attn_layer.py"
    theirs, ours = methods(file.read_text()), methods(inspect.getsource(xfuser_stand_in))
    assert {name: theirs[name] for name in ("__init__", "forward")} == ours
