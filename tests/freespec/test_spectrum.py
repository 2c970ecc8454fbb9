"""The fusion by one D x D matrix per head against the explicit SVD, and what must hold of it whatever the numbers."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from freespec import spectrum
from freespec.methods import FreeSpec
from freespec.methods.freespec import FusionWeights
from freespec.spectrum import (
    chunk_tokens,
    effective_rank,
    global_basis_matrix,
    gram,
    local_basis_matrix,
    reconstruct,
    svd_fusion_ref,
)
from tests.freespec.cases import assert_low_precision, assert_same_math, drawn, features, rotation, seeds
from tests.freespec.layers import fuse_spectra

Basis = Literal["local", "global"]
Sizes = tuple[int, int, int, int]
ROWS = [(basis, form) for basis in ("local", "global") for form in ("lerp", "add")]
TALL = (2, 23, 3, 8)


@st.composite
def sizes(draw: st.DrawFn, *, full_rank: bool = False) -> Sizes:
    """B, S, N, D with S < D, S = D and S > D."""
    dim = draw(st.sampled_from([2, 4, 8]))
    tokens = draw(st.integers(dim if full_rank else 1, 3 * dim))
    return draw(st.integers(1, 2)), tokens, draw(st.integers(1, 3)), dim


def rank_weights(dim: int, strength: float = 0.8) -> Tensor:
    """g [D] fp64, falling and with no round numbers."""
    return strength * torch.exp(-torch.arange(dim, dtype=torch.float64) / 3)


def fuse(
    o_local: Tensor, o_global: Tensor, weight: Tensor, lam: float, *, basis: str = "local", form: str = "lerp"
) -> Tensor:
    """The fast form on one device."""
    method = FreeSpec(basis=basis, residual_form=form)
    weights = FusionWeights(rank=weight, residual=torch.tensor(lam, dtype=torch.float64))
    return fuse_spectra(method, o_local, o_global, weights)


def pair(seed: int, sizes: Sizes, *, rank: int | None = None, deficient: str = "local") -> tuple[Tensor, Tensor]:
    """O_l and O_g; the `deficient` one is zero from singular value `rank` on."""
    return (
        features(seed, sizes, rank=rank if deficient == "local" else None),
        1.7 * features(seed + 1, sizes, rank=rank if deficient == "global" else None),
    )


# The Gram form and the SVD (property 9).


def check_svd(branches: tuple[Tensor, Tensor], basis: str, form: str, ref: Callable[..., Tensor]) -> None:
    g = rank_weights(branches[0].shape[-1])
    assert_same_math(fuse(*branches, g, 0.15, basis=basis, form=form), ref(*branches, g, 0.15, basis=basis, form=form))


@drawn
@given(seed=seeds, sizes=sizes(), rank=st.none() | st.integers(0, 7))
@pytest.mark.parametrize(("basis", "form"), ROWS)
def test_gram_form_equals_svd(basis: str, form: str, seed: int, sizes: Sizes, rank: int | None) -> None:
    """Any rank of the branch whose basis is kept: fewer tokens than dimensions, deficient, zero."""
    check_svd(pair(seed, sizes, rank=rank, deficient=basis), basis, form, svd_fusion_ref)


@pytest.mark.parametrize(("basis", "form"), ROWS)
def test_zero_features(basis: str, form: str) -> None:
    zero = torch.zeros(TALL, dtype=torch.float64)
    some = features(0, TALL)
    for branches in ((zero, some), (some, zero), (zero, zero)):
        check_svd(branches, basis, form, svd_fusion_ref)


@pytest.mark.parametrize(("basis", "form"), ROWS)
def test_negative_controls_of_the_svd(basis: str, form: str) -> None:
    branches = pair(0, TALL)

    def no_residual(o_local: Tensor, o_global: Tensor, weight: Tensor, lam: float, **row: str) -> Tensor:
        return svd_fusion_ref(o_local, o_global, weight, 0.0, **row)

    def ascending(o_local: Tensor, o_global: Tensor, weight: Tensor, lam: float, **row: str) -> Tensor:
        return svd_fusion_ref(o_local, o_global, weight.flip(0), lam, **row)

    def other_basis(o_local: Tensor, o_global: Tensor, weight: Tensor, lam: float, **row: str) -> Tensor:
        row["basis"] = "global" if basis == "local" else "local"
        return svd_fusion_ref(o_local, o_global, weight, lam, **row)

    def other_form(o_local: Tensor, o_global: Tensor, weight: Tensor, lam: float, **row: str) -> Tensor:
        row["form"] = "add" if form == "lerp" else "lerp"
        return svd_fusion_ref(o_local, o_global, weight, lam, **row)

    check_svd(branches, basis, form, svd_fusion_ref)
    for broken in (no_residual, ascending, other_basis, other_form):
        with pytest.raises(AssertionError):
            check_svd(branches, basis, form, broken)


def check_guard(basis: Basis, eps: float) -> None:
    """Directions of rounding noise, a millionth of the strongest, stay as they are, as in the SVD."""
    branches = tuple(o + 1e-6 * features(5, TALL) for o in pair(0, TALL, rank=3, deficient=basis))
    g = rank_weights(8)
    matrix, base = {"local": (local_basis_matrix, branches[0]), "global": (global_basis_matrix, branches[1])}[basis]
    grams = [gram(o) for o in branches]
    fused = reconstruct(base, matrix(*grams, g, eps), branches[1], torch.zeros((), dtype=torch.float64), "lerp")
    assert_same_math(fused, svd_fusion_ref(*branches, g, 0.0, basis=basis))


@pytest.mark.parametrize("basis", ["local", "global"])
def test_guard(basis: Basis) -> None:
    check_guard(basis, spectrum.EPS)
    with pytest.raises(AssertionError):  # the control: without it, noise grows to the other branch's singular value
        check_guard(basis, 0.0)


def near_the_guard(second: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Branches of two directions, the local one's second `second` times its first, the global one's half of it."""
    local, o_global = torch.zeros(2, 20, 2, dtype=torch.float64)
    local[0, 0], o_global[0, 0], local[1, 1], o_global[1, 1] = 1.0, 1.0, second, 0.5
    return local.to(dtype)[None, :, None], o_global.to(dtype)[None, :, None]


def second_of(fused: Tensor) -> float:
    return torch.linalg.svdvals(fused[0, :, 0].double())[1].item()


@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.float64, 1e-4), (torch.float32, 1e-4), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)]
)
def test_the_guard_is_the_definition_s_in_the_gram_form_and_in_the_twin(dtype: torch.dtype, eps: float) -> None:
    """A second singular value above eps becomes that of the other branch, and one of 0.89 eps stays as it is."""
    g = torch.ones(2, dtype=torch.float64)
    for second, expected in ((1.02 * eps, 0.5), (0.89 * eps, 0.89 * eps)):
        branches = near_the_guard(second, dtype)
        for made in (fuse(*branches, g, 0.0), svd_fusion_ref(*branches, g, 0.0)):
            assert second_of(made) == pytest.approx(expected, rel=1e-2)


def test_the_guard_has_no_step() -> None:
    """Between 0.9 eps and eps the change fades in, in both forms; rounding of 1e-7 sigma_1 moves the result 1e3 times that at most."""
    g = torch.full((2,), 0.5, dtype=torch.float64)
    shares = []
    for second in (0.9e-4, 0.925e-4, 0.95e-4, 1e-4, 1.0001e-4):
        branches = near_the_guard(second)
        fused, twin = fuse(*branches, g, 0.0), svd_fusion_ref(*branches, g, 0.0)
        assert_same_math(fused, twin)
        shares.append((second_of(fused) - second) / (0.5 * (0.5 - second)))
    assert shares == pytest.approx([0, 0.25, 0.5, 1, 1], abs=1e-6)
    sigma = torch.tensor([1.0, 1e-4], dtype=torch.float64)
    moved = spectrum.resolved(sigma, 1e-4) - spectrum.resolved(sigma - torch.tensor([0.0, 1e-7]), 1e-4)
    assert moved[1].item() == pytest.approx(1e-2)  # a step moves it by 1
    assert spectrum.resolved(torch.zeros(3), 1e-4).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("basis", ["local", "global"])
def test_low_precision(basis: Basis, dtype: torch.dtype) -> None:
    branches = tuple(x.to(dtype) for x in pair(0, (2, 300, 3, 16)))
    g = rank_weights(16)
    exact = svd_fusion_ref(*branches, g, 0.15, basis=basis)
    actual = fuse(*branches, g, 0.15, basis=basis)
    assert actual.dtype == dtype
    twin = svd_fp32(*branches, g, 0.15, basis=basis).to(dtype)
    assert_low_precision(actual, twin, exact)
    with pytest.raises(AssertionError):
        assert_low_precision(fuse(*branches, g, 0.0, basis=basis), twin, exact)


def svd_fp32(o_local: Tensor, o_global: Tensor, weight: Tensor, lam: float, *, basis: str) -> Tensor:
    """Plain torch in fp32: eq. 4-13 as they are written."""
    local, o_global = (x.float().transpose(1, 2) for x in (o_local, o_global))
    u_l, s_l, vh_l = torch.linalg.svd(local, full_matrices=False)
    u_g, s_g, vh_g = torch.linalg.svd(o_global, full_matrices=False)
    u, vh = (u_l, vh_l) if basis == "local" else (u_g, vh_g)
    g = weight.float()
    fused = (1 - lam) * (u * (g * s_g + (1 - g) * s_l)[..., None, :]) @ vh + lam * o_global
    return fused.transpose(1, 2)


# Properties 1 to 4.


@drawn
@given(seed=seeds, sizes=sizes())
def test_weight_zero_keeps_the_local_branch(seed: int, sizes: Sizes) -> None:
    o_local, o_global = pair(seed, sizes)
    assert torch.equal(fuse(o_local, o_global, torch.zeros(sizes[3]).double(), 0.0), o_local)
    with pytest.raises(AssertionError):
        assert_same_math(fuse(o_local, o_global, torch.full((sizes[3],), 0.5).double(), 0.0), o_local)


@drawn
@given(seed=seeds, sizes=sizes())
def test_weight_one_keeps_the_global_branch_in_its_own_basis(seed: int, sizes: Sizes) -> None:
    o_local, o_global = pair(seed, sizes)
    assert torch.equal(fuse(o_local, o_global, torch.ones(sizes[3]).double(), 0.0, basis="global"), o_global)
    with pytest.raises(AssertionError):
        half = torch.full((sizes[3],), 0.5, dtype=torch.float64)
        assert_same_math(fuse(o_local, o_global, half, 0.0, basis="global"), o_global)


def check_spectrum(seed: int, sizes: Sizes, weight: Tensor) -> None:
    """Singular values are those of O_g; V_lᵀ OᵀO V_l is diagonal, so the right singular vectors are those of O_l."""
    o_local, o_global = pair(seed, sizes)
    fused = fuse(o_local, o_global, weight, 0.0).transpose(1, 2)
    sigma_g = torch.linalg.svdvals(o_global.transpose(1, 2))
    assert_same_math(torch.linalg.svdvals(fused), sigma_g)
    vectors = torch.linalg.svd(o_local.transpose(1, 2), full_matrices=False).Vh.transpose(-1, -2)
    rotated = fused @ vectors
    assert_same_math(rotated.transpose(-1, -2) @ rotated, torch.diag_embed(sigma_g**2))


@drawn
@given(seed=seeds, sizes=sizes(full_rank=True))
def test_weight_one_takes_the_global_spectrum_in_the_local_basis(seed: int, sizes: Sizes) -> None:
    check_spectrum(seed, sizes, torch.ones(sizes[3], dtype=torch.float64))


def test_negative_control_of_the_spectrum() -> None:
    with pytest.raises(AssertionError):
        check_spectrum(0, TALL, torch.full((8,), 0.99, dtype=torch.float64))


@drawn
@given(seed=seeds, sizes=sizes(), lam=st.floats(0, 1), rank=st.none() | st.integers(0, 7))
@pytest.mark.parametrize("basis", ["local", "global"])
def test_equal_branches_come_back(basis: Basis, seed: int, sizes: Sizes, lam: float, rank: int | None) -> None:
    o = features(seed, sizes, rank=rank)
    assert_same_math(fuse(o, o.clone(), rank_weights(sizes[3]), lam, basis=basis), o)


def test_negative_control_of_equal_branches() -> None:
    o = features(0, TALL)
    with pytest.raises(AssertionError):
        assert_same_math(fuse(o, o, rank_weights(8), 0.15, form="add"), o)


# Property 8: rotations and permutations.


@drawn
@given(seed=seeds, sizes=sizes(full_rank=True))
@pytest.mark.parametrize(("basis", "form"), ROWS)
def test_rotating_both_branches_rotates_the_result(basis: str, form: str, seed: int, sizes: Sizes) -> None:
    o_local, o_global = pair(seed, sizes)
    turn = rotation(seed, *sizes[2:])
    args = rank_weights(sizes[3]), 0.15
    row = {"basis": basis, "form": form}
    turned = fuse(*(torch.einsum("bsnd,nde->bsne", o, turn) for o in (o_local, o_global)), *args, **row)
    assert_same_math(turned, torch.einsum("bsnd,nde->bsne", fuse(o_local, o_global, *args, **row), turn))


@drawn
@given(seed=seeds, sizes=sizes())
@pytest.mark.parametrize("basis", ["local", "global"])
def test_permuting_the_tokens_permutes_the_result(basis: Basis, seed: int, sizes: Sizes) -> None:
    o_local, o_global = pair(seed, sizes)
    order = torch.randperm(sizes[1], generator=torch.Generator().manual_seed(seed))
    args = rank_weights(sizes[3]), 0.15
    permuted = fuse(o_local[:, order], o_global[:, order], *args, basis=basis)
    assert_same_math(permuted, fuse(o_local, o_global, *args, basis=basis)[:, order])


def test_negative_control_one_branch_alone_rotated_or_permuted() -> None:
    o_local, o_global = pair(0, TALL)
    turn = rotation(0, 3, 8)
    args = rank_weights(8), 0.15
    fused = fuse(o_local, o_global, *args)
    with pytest.raises(AssertionError):
        turned = fuse(torch.einsum("bsnd,nde->bsne", o_local, turn), o_global, *args)
        assert_same_math(turned, torch.einsum("bsnd,nde->bsne", fused, turn))
    with pytest.raises(AssertionError):
        assert_same_math(fuse(o_local.flip(1), o_global, *args), fused.flip(1))


# Property 10: Grams summed over any split of the tokens.


@drawn
@given(seed=seeds, sizes=sizes(full_rank=True), cuts=st.lists(st.floats(0, 1), max_size=4))
@pytest.mark.parametrize("basis", ["local", "global"])
def test_any_split_of_the_tokens_gives_the_same_result(
    basis: Basis, seed: int, sizes: Sizes, cuts: list[float]
) -> None:
    branches, g = pair(seed, sizes), rank_weights(sizes[3])
    edges = [0, *sorted(round(x * sizes[1]) for x in cuts), sizes[1]]
    shards = [tuple(o[:, a:b] for o in branches) for a, b in itertools.pairwise(edges)]
    grams = [torch.stack((gram(a), gram(b))) for a, b in shards]
    summed = sum(grams[1:], grams[0])
    assert_same_math(summed, torch.stack([gram(o) for o in branches]))
    matrix = {"local": local_basis_matrix, "global": global_basis_matrix}[basis]
    assert_same_math(matrix(*summed, g), matrix(*(gram(o) for o in branches), g))

    method = FreeSpec(basis=basis)
    weights = FusionWeights(rank=g, residual=torch.tensor(0.15, dtype=torch.float64))
    parts = [fuse_spectra(method, *shard, weights, lambda _: summed) for shard in shards]
    assert_same_math(torch.cat(parts, dim=1), fuse(*branches, g, 0.15, basis=basis))


def test_negative_control_a_shard_that_is_not_summed() -> None:
    branches = pair(0, TALL)
    weights = FusionWeights(rank=rank_weights(8), residual=torch.tensor(0.15, dtype=torch.float64))
    short = torch.stack([gram(o[:, :20]) for o in branches])
    with pytest.raises(AssertionError):
        assert_same_math(
            fuse_spectra(FreeSpec(), *branches, weights, lambda _: short), fuse(*branches, weights.rank, 0.15)
        )


def test_chunks_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    branches = pair(0, TALL)
    whole = fuse(*branches, rank_weights(8), 0.15)
    monkeypatch.setattr(spectrum, "CHUNK_TOKENS", 5)
    assert_same_math(fuse(*branches, rank_weights(8), 0.15), whole)


@pytest.mark.parametrize(
    ("heads", "head_dim", "tokens"), [(12, 128, 8192), (1, 128, 32768), (32, 64, 6144), (10**9, 1, 1), (0, 128, 32768)]
)
def test_a_chunk_is_bounded_in_bytes_and_in_what_is_summed(heads: int, head_dim: int, tokens: int) -> None:
    assert chunk_tokens(heads, head_dim) == tokens


def test_the_branches_are_reduced_in_one_call_and_not_changed() -> None:
    branches = pair(0, TALL)
    copies = tuple(o.clone() for o in branches)
    calls = []

    def reduce(grams: Tensor) -> Tensor:
        calls.append((grams.shape, grams.dtype))
        return grams

    weights = FusionWeights(rank=rank_weights(8), residual=torch.tensor(0.15, dtype=torch.float64))
    fuse_spectra(FreeSpec(), *branches, weights, reduce)
    assert calls == [((2, 2, 3, 8, 8), torch.float64)]
    assert all(torch.equal(a, b) for a, b in zip(branches, copies, strict=True))


def gram_of_shards(o: Tensor, cuts: list[tuple[int, int]]) -> Tensor:
    """The Gram matrices of fp32 tokens that lie on several ranks."""
    bits, shards = spectrum.part_bits(o.shape[1]), [o[:, start:stop] for start, stop in cuts]
    largest = torch.stack([spectrum.largest_of_heads(shard) for shard in shards]).amax(0)
    parts = [spectrum.gram_of_parts(shard, largest, bits) for shard in shards]
    return spectrum.join_parts(functools.reduce(torch.add, parts), largest, bits)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18])
def test_grams_of_fp32_have_the_same_bits_for_any_split(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -6, 8)  # directions as weak as the guard, and weaker
    o = scale * spread * torch.randn(2, 301, 3, 8, generator=generator)
    whole, other = spectrum.summed_grams(o, 2 * o, num_tokens=301, sum_tokens=lambda x: x, max_tokens=lambda x: x)
    assert torch.equal(other, 4 * whole)
    exact = gram(o)
    largest = exact.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    assert float(((whole - exact).abs() / largest).max()) < 1e-12
    rounded = []
    for edges in ([0, 100, 200, 301], [0, 0, 1, 300, 301], [0, 37, 150, 301]):
        cuts = list(itertools.pairwise(edges))
        assert torch.equal(gram_of_shards(o, cuts), whole)
        rounded.append(functools.reduce(torch.add, [gram(o[:, start:stop]) for start, stop in cuts]))
    assert not all(torch.equal(each, rounded[0]) for each in rounded)  # the negative control


def test_parts_are_exact_for_as_many_tokens_as_are_summed() -> None:
    for tokens in (1, 1000, 8192, 126_360, 10**7):
        bits = spectrum.part_bits(tokens)
        assert tokens * 4**bits <= 2**53 < tokens * 4 ** (bits + 2)


# How a CPU and a GPU compute it.


def halves(o_SND: Tensor) -> Tensor:
    return spectrum.product_of_halves(o_SND.transpose(0, 1))


def pieces(o_SND: Tensor) -> Tensor:
    return spectrum.product_in_pieces(o_SND, torch.bmm)


@pytest.mark.parametrize("product", [halves, pieces])
@pytest.mark.parametrize("sizes", [(3, 0, 8), (1, 7, 33), (2, 1029, 40), (3, 512, 128)])
def test_both_ways_of_a_product_with_itself(product: Callable[[Tensor], Tensor], sizes: tuple[int, int, int]) -> None:
    o_SND = features(0, (1, sizes[1], sizes[0], sizes[2]))[0]
    exact = torch.einsum("snd,sne->nde", o_SND, o_SND)
    assert_same_math(product(o_SND), exact)
    if sizes[1]:
        with pytest.raises(AssertionError):  # the control: a token that is left out
            assert_same_math(product(o_SND[1:]), exact)


def test_a_cpu_computes_little_more_than_half_of_a_gram_matrix() -> None:
    o = torch.randn(1, 300, 2, 128)
    with FlopCounterMode(display=False) as counted:
        gram(o)
    assert counted.get_total_flops() == 2 * 300 * 2 * 128**2 * 5 / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_fp32_outputs_resolve_what_the_guard_keeps(dtype: torch.dtype) -> None:
    """Singular values down to the guard are those of the SVD; products in fp32 miss the smallest by more than themselves."""
    eps = spectrum.guard(dtype)
    turn = rotation(0, 1, 16)[0]
    o = (
        torch.randn(4096, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        * torch.logspace(0, -6, 16)
    ) @ turn
    o = o.to(dtype)[None, :, None]
    exact = torch.linalg.svdvals(o[0, :, 0].double())
    kept = exact > eps * exact[0]
    found = spectrum.spectrum(gram(o))[0][0, 0]
    torch.testing.assert_close(found[kept], exact[kept], rtol=1e-6, atol=0.0)
    if dtype == torch.float32:  # the control
        short = torch.linalg.eigvalsh((o[0, :, 0].mT @ o[0, :, 0]).double()).clamp_min(0).sqrt().flip(0)
        assert ((short - exact).abs() > 1e-2 * exact)[kept].any()


# What a GPU does with half precision, on a CPU by a product that is exact as well and sums in fp32.


def half_product(a: Tensor, b: Tensor) -> Tensor:
    assert a.dtype == b.dtype
    assert a.dtype in spectrum.HALF
    return a.float() @ b.float()


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "multiply_half", half_product)


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores_resolve_the_guard_of_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At uneven sizes; the root mean square, as the largest of a few errors is chance."""
    turn = rotation(0, 3, 16)
    drawn = torch.randn(2, 20000, 3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    o = torch.einsum("bsnd,nde->bsne", drawn * torch.logspace(0, -3, 16), turn).to(dtype)
    exact = spectrum.spectrum(torch.einsum("bsnd,bsne->bnde", o.double(), o.double()))[0]
    kept = exact > spectrum.guard(dtype) * exact[..., :1]
    assert kept.sum() > 60

    def error() -> float:
        found = spectrum.spectrum(spectrum.gram_of_half(o))[0]
        return ((found - exact) / exact)[kept].square().mean().sqrt().item()

    assert error() < 1e-2
    monkeypatch.setattr(spectrum, "PIECE_TOKENS", 4)  # fp64 sums of fp32 products, nearly
    assert error() < 1e-3


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("exponent", [-125, -70, 66, 120])
def test_the_range_of_bf16_is_no_limit(exponent: int) -> None:
    """Outputs times a power of two have the Gram matrix times its square: to the bit, as powers of two are exact."""
    o = features(0, TALL).bfloat16()
    o[..., 1, :] *= 2.0**-40  # heads are scaled one by one
    moved = (o.double() * 2.0**exponent).bfloat16()
    assert torch.equal(spectrum.gram_of_half(moved), gram_of_moved(moved, exponent))
    with pytest.raises(AssertionError):  # the control: fp32 products as they are
        short = moved.float().transpose(1, 2)
        torch.testing.assert_close((short.mT @ short).double(), spectrum.gram_of_half(moved), rtol=1e-4, atol=0.0)


def gram_of_moved(moved: Tensor, exponent: int) -> Tensor:
    return spectrum.gram_of_half((moved.double() * 2.0**-exponent).bfloat16()) * 4.0**exponent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_multiplied_where_it_lies(dtype: torch.dtype) -> None:
    """On a GPU: 12 heads of 8,192 tokens are 192 products with fp32 results; nothing of the outputs' size but bf16's scaling."""
    for tokens, left in ((8192, 0), (8190, 14)):
        with Calls() as calls:
            total = gram(torch.empty(1, tokens, 12, 128, dtype=dtype, device="meta"))
        assert total.dtype == torch.float64
        assert [out for name, out in calls if name == "bmm"] == [(12 * 16, 128, 128)] + [(12, 128, 128)] * (left > 0)
        large = [name for name, out in calls if math.prod(out) >= 8000 * 12 * 128 and name not in VIEWS]
        assert large == ["empty", *["mul"] * (dtype == torch.bfloat16)]


VIEWS = (
    "view",
    "transpose",
    "split",
    "select",
    "slice",
    "unsafe_split",
    "_unsafe_view",
    "detach",
    "expand",
    "unsqueeze",
    "squeeze",
    "permute",
    "alias",
    "as_strided",
)


def test_a_rank_without_tokens_or_heads_has_sums_of_zero() -> None:
    for shape in ((1, 0, 2, 8), (1, 5, 0, 8)):
        o = torch.zeros(shape, dtype=torch.bfloat16)
        for made in (gram(o), spectrum.gram_of_half(o) if shape[1] == 0 else gram(o)):
            assert made.shape == (1, shape[2], 8, 8)
            assert not made.any()


def test_sums_over_pieces_are_fp64() -> None:
    right = (
        4097 * 127**2
    )  # squares of 512 tokens have an exact sum in fp32, in any order; that of all tokens fp32 cannot hold
    assert torch.tensor(right, dtype=torch.float32).item() != right
    assert spectrum.product_in_pieces(torch.full((4097, 1, 1), 127.0), torch.bmm).item() == right


# The range of values.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("basis", ["local", "global"])
def test_scaled_branches_give_the_scaled_result(basis: Basis, dtype: torch.dtype) -> None:
    """Times 2**±100, beyond what squares in fp32 can hold, to the bit."""
    branches = tuple(o.to(dtype) for o in pair(0, TALL))
    whole = fuse(*branches, rank_weights(8), 0.15, basis=basis)
    for factor in (2.0**100, 2.0**-100):
        scaled = fuse(*(o * factor for o in branches), rank_weights(8), 0.15, basis=basis)
        assert torch.equal(scaled, whole * factor)


@pytest.mark.parametrize("basis", ["local", "global"])
def test_a_gpu_waits_once_for_eigenvalues(basis: Basis) -> None:
    """The numbers are those of two calls; on a device with shapes alone the calls are counted."""
    grams = tuple(gram(o) for o in pair(0, TALL))
    for at_once, apart in zip(spectrum.spectra_at_once(*grams), spectrum.spectra(*grams), strict=True):
        assert_same_math(at_once.abs(), apart.abs())
    matrix = {"local": local_basis_matrix, "global": global_basis_matrix}[basis]
    with Calls() as calls:
        matrix(*(x.to("meta") for x in grams), rank_weights(8).to("meta"))
    assert [name for name, _ in calls if "eig" in name] == ["eigh"]  # freespec::eigh


def test_a_cpu_decomposes_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    grams, seen, eigh = [gram(o) for o in pair(0, TALL)], [], torch.linalg.eigh

    def count_threads(matrix: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(torch.get_num_threads())
        return eigh(matrix)

    def refuse(matrix: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.linalg.LinAlgError

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(torch.linalg, "eigh", count_threads)
        spectrum.spectra(*grams)
        assert (seen, torch.get_num_threads()) == ([1], 2)
        monkeypatch.setattr(torch.linalg, "eigh", refuse)
        with pytest.raises(torch.linalg.LinAlgError):
            spectrum.spectra(*grams)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float64, 0), (torch.bfloat16, 2)])
def test_product_and_residual_are_one_kernel(dtype: torch.dtype, copies: int) -> None:
    o_local, o_global = (x.to(dtype) for x in pair(0, (1, 23, 3, 8)))
    lam = torch.tensor(0.15, dtype=torch.float64)
    with Calls() as calls:
        reconstruct(o_local, torch.eye(8).double().expand(1, 3, 8, 8), o_global, lam, "lerp")
    sized = [name for name, out in calls if out in ((1, 23, 3, 8), (23, 3, 8), (3, 23, 8))]
    work = [name for name in sized if name in ("mul", "add", "add_", "bmm", "baddbmm_", "_to_copy", "copy_")]
    assert sorted(work) == sorted(["mul", "baddbmm_", *["_to_copy", "copy_"][:copies]])


class Calls(TorchDispatchMode):
    """The operators that are called, and the shapes of what they return."""

    def __enter__(self) -> list[tuple[str, tuple[int, ...]]]:
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        super().__enter__()
        return self.calls

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        self.calls.append((function.overloadpacket.__name__, tuple(getattr(first, "shape", ()))))
        return out


# Spectra and effective rank.


@drawn
@given(seed=seeds, sizes=sizes(full_rank=True))
def test_spectrum_of_the_gram_matrix(seed: int, sizes: Sizes) -> None:
    o = features(seed, sizes)
    sigma, vectors = spectrum.spectrum(gram(o))
    assert_same_math(sigma, torch.linalg.svdvals(o.transpose(1, 2)))
    assert_same_math((vectors * sigma[..., None, :] ** 2) @ vectors.transpose(-1, -2), gram(o))
    with pytest.raises(AssertionError):  # the control: ascending order
        assert_same_math(sigma.flip(-1), torch.linalg.svdvals(o.transpose(1, 2)))


def test_effective_rank() -> None:
    flat = torch.tensor([[2.0, 2.0, 2.0, 2.0], [5.0, 0.0, 0.0, 0.0], [3.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert_same_math(effective_rank(flat.double()), torch.tensor([4.0, 1.0, 2.0, 0.0], dtype=torch.float64))
    sigma = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    entropy = -(0.6 * sigma[0].log() + 0.3 * sigma[1].log() + 0.1 * sigma[2].log())
    assert_same_math(effective_rank(7 * sigma), entropy.exp())
