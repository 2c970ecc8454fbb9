"""Singular spectra of attention outputs and their fusion in one D x D matrix per head (method.md, eq. 4-13).

With O = U S Vᵀ, U = O V S⁻¹: a reconstruction that keeps a branch's singular vectors and changes its singular values is
O M with M = V diag(new / old) Vᵀ. Only the Gram matrices OᵀO sum over tokens, so the long U is never computed.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from freespec import eigen
from freespec.operators import like_first, one_operator

# Singular values up to this share of the largest are noise: such directions are left unchanged. Grams whose products are fp64
# resolve far smaller ones; those of half-precision outputs on a GPU are summed in fp32, which resolves the square root of 1e-6.
EPS = 1e-4
EPS_HALF = 1e-3
# The last tenth below is faded in, so that a rounding error that moves a singular value past EPS moves the result no further.
FADE = 0.9
HALF = (torch.bfloat16, torch.float16)
# Bytes of the fp32 copy of a chunk of half-precision outputs. Few heads take longer chunks: on a CPU a short product ends before
# its threads have started.
CHUNK_BYTES = 48 * 2**20
CHUNK_TOKENS = 32768
# Tokens that are copied to fp64 at a time: as many for any share of the heads, so that each head's sum has the same bits in all.
FP64_TOKENS = 2048
FP64_BITS = 53  # integers up to 2⁵³ are exact in fp64
# Tokens whose products are summed in fp32 at most. A GPU also needs the pieces to be busy: the product of a whole chunk is one
# tile for each of 12 heads, and an H200 has 132 multiprocessors.
PIECE_TOKENS = 512
# Rows of a symmetric product that a CPU computes at a time, from the diagonal on.
BLOCK_ROWS = 32

Reduce = Callable[[Tensor], Tensor]


def guard(dtype: torch.dtype) -> float:
    """eps of the definition for outputs in `dtype`: sigma up to eps sigma_1 is noise."""
    return EPS_HALF if dtype in HALF else EPS


def chunk_tokens(heads: int, head_dim: int) -> int:
    """Tokens per chunk for so many heads; a rank may have none."""
    return min(CHUNK_TOKENS, max(1, CHUNK_BYTES // max(1, 4 * heads * head_dim)))


def _gram_shape(o_BSND: Tensor) -> Tensor:
    batch, _, heads, dim = o_BSND.shape
    return o_BSND.new_empty(batch, heads, dim, dim, dtype=torch.float64)


@one_operator("(Tensor o_BSND) -> Tensor", _gram_shape)
def gram(o_BSND: Tensor) -> Tensor:
    """OᵀO per batch item and head: [B, S, N, D] -> [B, N, D, D] fp64."""
    on_gpu = o_BSND.device.type != "cpu"
    return gram_of_half(o_BSND) if on_gpu and o_BSND.dtype in HALF else gram_in_fp64(o_BSND)


def summed_grams(
    o_local: Tensor, o_global: Tensor, *, num_tokens: int, sum_tokens: Reduce, max_tokens: Reduce | None = None
) -> tuple[Tensor, Tensor]:
    """Gram matrices of both branches over all `num_tokens` tokens of the video, [B, N, D, D] fp64; one message sums both.

    With `max_tokens` those of fp32 outputs have the same bits in any layout (`gram_of_parts`). Rounded sums differ by 1e-16 of
    sigma_1², which is 1e-8 of the weakest singular value that is changed, squared.
    """
    branches = (o_local, o_global)
    if max_tokens is None or o_local.dtype != torch.float32:
        total = sum_tokens(torch.stack([gram(o) for o in branches]))
    else:
        bits = part_bits(num_tokens)
        largest = max_tokens(torch.stack([largest_of_heads(o) for o in branches]))
        parts = [gram_of_parts(o, of_heads, bits) for o, of_heads in zip(branches, largest, strict=True)]
        total = join_parts(sum_tokens(torch.stack(parts)), largest, bits)
    gram_local, gram_global = total.unbind(0)
    return gram_local, gram_global


def part_bits(num_tokens: int) -> int:
    """Bits b of each of two parts of a number, for which num_tokens products of two of them are exact in fp64: S 4ᵇ <= 2⁵³."""
    return (FP64_BITS - num_tokens.bit_length()) // 2


def largest_of_heads(o_BSND: Tensor) -> Tensor:
    """Largest magnitude of each item and head, [B, N] in the dtype of o; 0 where a rank has no tokens."""
    if o_BSND.shape[1] == 0:
        return o_BSND.new_zeros(o_BSND.shape[0], o_BSND.shape[2])
    return torch.maximum(o_BSND.amax((1, 3)), -o_BSND.amin((1, 3)))


def gram_in_fp64(o_BSND: Tensor) -> Tensor:
    """`gram` with products and sums in fp64, which holds the square of any fp32 or half-precision number."""
    batch, _, heads, dim = o_BSND.shape
    total = torch.zeros(batch, heads, dim, dim, dtype=torch.float64, device=o_BSND.device)
    for item, chunk in itertools.product(range(batch), o_BSND.split(FP64_TOKENS, dim=1)):
        o_SND = chunk[item]
        if o_SND.device.type == "cpu":
            total[item] += product_of_halves(
                o_SND.transpose(0, 1).to(torch.float64, memory_format=torch.contiguous_format)
            )
        else:
            total[item] += product_in_pieces(o_SND.double(), torch.bmm)
    return total


def _parts_shape(o_BSND: Tensor, _largest_BN: Tensor, _bits: int) -> Tensor:
    batch, _, heads, dim = o_BSND.shape
    return o_BSND.new_empty(batch, heads, 2 * dim, 2 * dim, dtype=torch.float64)


@one_operator("(Tensor o_BSND, Tensor largest_BN, int bits) -> Tensor", _parts_shape)
def gram_of_parts(o_BSND: Tensor, largest_BN: Tensor, bits: int) -> Tensor:
    """[H L]ᵀ[H L] per item and head, [B, N, 2 D, 2 D] fp64, of integers H and L with O ≈ unit (H + 2⁻ᵇ L): sums without rounding.

    unit = 2ᵉ⁻ᵇ, where 2ᵉ is the power of two above the head's largest value in all of the video, [B, N]. What is below
    2⁻ᵇ unit is rounded, number by number: with b = 20, values of fp32 down to 2⁻¹⁶ of the largest are whole.
    """
    batch, _, heads, dim = o_BSND.shape
    total = torch.zeros(batch, heads, 2 * dim, 2 * dim, dtype=torch.float64, device=o_BSND.device)
    per_unit = 1.0 / _unit(largest_BN, bits)
    for item, chunk in itertools.product(range(batch), o_BSND.split(PIECE_TOKENS, dim=1)):
        parts = total.new_empty(heads, chunk.shape[1], 2 * dim)
        high, low = parts.split(dim, dim=-1)
        low.copy_(chunk[item].transpose(0, 1)).mul_(per_unit[item, :, None, None])
        high.copy_(low).round_()
        low.sub_(high).mul_(2.0**bits).round_()
        for first in range(0, 2 * dim, 2 * BLOCK_ROWS):
            rows = slice(first, first + 2 * BLOCK_ROWS)
            total[item, :, rows, first:].baddbmm_(parts[..., rows].mT, parts[..., first:])
    return total.triu() + total.triu(1).mT


def join_parts(total: Tensor, largest: Tensor, bits: int) -> Tensor:
    """The Gram matrices [..., D, D] of summed `gram_of_parts` [..., 2 D, 2 D]."""
    dim = total.shape[-1] // 2
    high, cross, low = total[..., :dim, :dim], total[..., :dim, dim:], total[..., dim:, dim:]
    return (high + 2.0**-bits * (cross + cross.mT) + 4.0**-bits * low) * _unit(largest, bits)[..., None, None] ** 2


def _unit(largest: Tensor, bits: int) -> Tensor:
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float64), torch.frexp(largest).exponent - bits)


def gram_of_half(o_BSND: Tensor) -> Tensor:
    """`gram` of half precision on tensor cores: exact products, summed in fp32 over PIECE_TOKENS tokens and in fp64 over pieces.

    bf16 has the exponents of fp32, where squares overflow from 1e19 on and vanish below 1e-19: heads are brought near 1 by a
    power of two, which is exact. fp16 has no such values.
    """
    batch, _, heads, dim = o_BSND.shape
    scaled = o_BSND.dtype == torch.bfloat16 and o_BSND.numel() > 0  # a rank may have no tokens or heads
    scale_BN = range_scale(o_BSND) if scaled else None
    total = torch.zeros(batch, heads, dim, dim, dtype=torch.float64, device=o_BSND.device)
    for item, chunk in itertools.product(range(batch), o_BSND.split(chunk_tokens(heads, dim), dim=1)):
        o_SND = chunk[item] if scale_BN is None else chunk[item] * scale_BN[item, :, None]
        total[item] += product_in_pieces(o_SND, multiply_half)
    return total if scale_BN is None else total / scale_BN.double()[..., None, None] ** 2


def range_scale(o_BSND: Tensor) -> Tensor:
    """Power of two for each item and head, [B, N] in o's dtype, that takes its largest value to [0.5, 1), from 2**±128 nearly."""
    largest = torch.linalg.vector_norm(o_BSND, torch.inf, dim=(1, 3), dtype=torch.float32).clamp(2.0**-120, 2.0**120)
    return (torch.frexp(largest).mantissa / largest).to(o_BSND.dtype)


def multiply_half(a: Tensor, b: Tensor) -> Tensor:
    """a b, [P, D, K] x [P, K, D] -> [P, D, D] fp32 of half-precision a and b: exact products, summed in fp32. CUDA only."""
    return torch.bmm(a, b, out_dtype=torch.float32)


def product_of_halves(o_NSD: Tensor) -> Tensor:
    """OᵀO, [N, S, D] -> [N, D, D], for a device that the operations keep busy: of a symmetric matrix half is enough."""
    dim = o_NSD.shape[-1]
    upper = o_NSD.new_zeros(o_NSD.shape[0], dim, dim)
    for first in range(0, dim, BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        upper[:, rows, first:] = o_NSD[..., rows].mT @ o_NSD[..., first:]
    return upper.triu() + upper.triu(1).mT


def product_in_pieces(o_SND: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """OᵀO, [S, N, D] -> [N, D, D] fp64, for a device that few products cannot fill: a batch of pieces, summed in order.

    Piece p of P takes every P-th token from p on. Piece and head are then one dimension of one stride, so that the batch is a
    view of the outputs; the S mod P tokens that are left are one more product.
    """
    tokens, heads, dim = o_SND.shape
    count = -(-tokens // PIECE_TOKENS)
    total = torch.zeros(heads, dim, dim, dtype=torch.float64, device=o_SND.device)
    if count:
        whole = tokens // count * count
        pieces = o_SND[:whole].unflatten(0, (-1, count)).flatten(1, 2).transpose(0, 1)
        total += multiply(pieces.mT, pieces).unflatten(0, (count, heads)).sum(0, dtype=torch.float64)
        if whole < tokens:
            left = o_SND[whole:].transpose(0, 1)
            total += multiply(left.mT, left)
    return total


def spectrum(gram_BNDD: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, descending [B, N, D], and right singular vectors as columns [B, N, D, D], of a Gram matrix, fp64."""
    eigenvalues, vectors = eigen.eigh(gram_BNDD.double())
    return eigenvalues.clamp_min(0).sqrt().flip(-1), vectors.flip(-1)


def effective_rank(sigma: Tensor) -> Tensor:
    """exp(-sum p log p) with p = sigma / sum sigma over the last dimension; 0 for a zero spectrum. App. B."""
    total = sigma.sum(-1, keepdim=True)
    p = sigma / total.clamp_min(torch.finfo(sigma.dtype).tiny)
    rank = torch.exp(-torch.special.xlogy(p, p).sum(-1))
    return rank.masked_fill(total.squeeze(-1) == 0, 0.0)


def spectra(gram_kept: Tensor, gram_other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`spectrum` of the branch whose vectors are kept, and the singular values of the other: sigma, V, sigma of the other."""
    if gram_kept.device.type != "cpu":
        return spectra_at_once(gram_kept, gram_other)
    # Eigenvalues alone take a CPU less than half as long, and changing its threads would break a compiled graph in two.
    with nullcontext() if torch.compiler.is_compiling() else _one_thread():
        return *spectrum(gram_kept), eigen.eigvalsh(gram_other.double()).clamp_min(0).sqrt().flip(-1)


def spectra_at_once(gram_kept: Tensor, gram_other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`spectra` by one call: each call of torch.linalg makes the host wait for the device, to check its status."""
    sigmas, vectors = spectrum(torch.stack((gram_kept, gram_other)))
    return sigmas[0], vectors[0], sigmas[1]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run LAPACK on one thread: with matrices of D x D, several threads wait for each other longer than one computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def local_basis_matrix(gram_local: Tensor, gram_global: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """M with O_local M = U_l diag(g sigma_g + (1 - g) sigma_l) V_lᵀ (eq. 9-11): [B, N, D, D] fp64.

    `weight` is g [D], strongest singular direction first. A direction of sigma_l,r <= eps sigma_l,1 is noise and left
    unchanged; over the last tenth below eps the change fades in (`resolved`). Grams that are not finite give an M of NaN.
    """
    sigma_l, vectors, sigma_g = spectra(gram_local, gram_global)
    return _identity_plus(vectors, weight.double() * _gain(sigma_g, sigma_l, eps))


def global_basis_matrix(gram_local: Tensor, gram_global: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """M with O_global M = U_g diag(g sigma_g + (1 - g) sigma_l) V_gᵀ, the ablation's global basis: [B, N, D, D] fp64."""
    sigma_g, vectors, sigma_l = spectra(gram_global, gram_local)
    return _identity_plus(vectors, (1.0 - weight.double()) * _gain(sigma_l, sigma_g, eps))


def resolved(sigma: Tensor, eps: float) -> Tensor:
    """Share in [0, 1] in which a direction is changed: 1 where sigma_r > eps sigma_1, 0 up to FADE eps sigma_1, linear between.

    sigma [..., D], largest first. A step at eps would move the result by as much as the direction's change, however small the
    rounding error that moved sigma across it.
    """
    largest = sigma[..., :1]
    share = (sigma / largest.masked_fill(largest == 0, torch.inf) - FADE * eps) / (eps - FADE * eps)
    return share.clamp(0.0, 1.0)


def _gain(sigma_new: Tensor, sigma_kept: Tensor, eps: float) -> Tensor:
    """new / kept - 1 where the kept branch's direction is resolved."""
    share = resolved(sigma_kept, eps)
    return share * (sigma_new / sigma_kept.masked_fill(share == 0, torch.inf) - 1.0)


def _identity_plus(vectors: Tensor, gain: Tensor) -> Tensor:
    """I + V diag(gain) Vᵀ, exactly I where the gain is zero."""
    identity = torch.eye(gain.shape[-1], dtype=gain.dtype, device=gain.device)
    return identity + (vectors * gain[..., None, :]) @ vectors.transpose(-1, -2)


@one_operator("(Tensor o_base, Tensor matrix, Tensor o_global, Tensor lam, str form) -> Tensor", like_first)
def reconstruct(o_base: Tensor, matrix: Tensor, o_global: Tensor, lam: Tensor, form: str) -> Tensor:
    """Eq. 12-13: (1 - lam) O M + lam O_global (`lerp`) or O M + lam O_global (`add`): [B, S, N, D] in o_base's dtype.

    `matrix` is [B, N, D, D], `lam` a 0-dim tensor. Computed in fp32 at least, a chunk of tokens at a time.
    """
    compute_dtype = torch.promote_types(o_base.dtype, torch.float32)
    keep = 1.0 - lam if form == "lerp" else torch.ones_like(lam)
    matrix = (keep * matrix).to(compute_dtype)
    lam = lam.to(compute_dtype)[None]  # one dimension: a number without would not widen what it scales
    out = torch.empty_like(o_base)
    batch, tokens, heads, dim = o_base.shape
    size = chunk_tokens(heads, dim)
    for item, start in itertools.product(range(batch), range(0, tokens, size)):
        rows = item, slice(start, start + size)
        mixed = out[rows] if out.dtype == compute_dtype else torch.empty_like(out[rows], dtype=compute_dtype)
        torch.mul(lam, o_global[rows], out=mixed)
        # The product is added to it by the kernel that computes it.
        mixed.transpose(0, 1).baddbmm_(o_base[rows].to(compute_dtype).transpose(0, 1), matrix[item])
        if out.dtype != compute_dtype:
            out[rows] = mixed
    return out


def svd_fusion_ref(
    o_local: Tensor,
    o_global: Tensor,
    weight: Tensor,
    lam: float,
    *,
    basis: str = "local",
    form: str = "lerp",
    eps: float | None = None,
) -> Tensor:
    """Reference of the whole fusion by explicit SVD in fp64: [B, S, N, D] fp64. Shares nothing with the Gram form.

    `eps` is the definition's for the dtype of the branches, written out, so that another EPS of the Gram form would show.
    """
    if eps is None:
        eps = 1e-3 if o_local.dtype in (torch.bfloat16, torch.float16) else 1e-4
    local, compute_dtype = o_local.double().permute(0, 2, 1, 3), o_global.double().permute(0, 2, 1, 3)
    u_l, s_l, vh_l = torch.linalg.svd(local, full_matrices=False)
    u_g, s_g, vh_g = torch.linalg.svd(compute_dtype, full_matrices=False)
    g = weight.double()[: s_l.shape[-1]].expand_as(s_l)
    if basis == "local":
        g = g * _changed_ref(s_l, eps)
        rebuilt = torch.einsum("bnsr,bnr,bnrd->bnsd", u_l, g * s_g + (1 - g) * s_l, vh_l)
    else:
        g = 1 - (1 - g) * _changed_ref(s_g, eps)
        rebuilt = torch.einsum("bnsr,bnr,bnrd->bnsd", u_g, g * s_g + (1 - g) * s_l, vh_g)
    fused = (1 - lam) * rebuilt + lam * compute_dtype if form == "lerp" else rebuilt + lam * compute_dtype
    return fused.permute(0, 2, 1, 3)


def _changed_ref(sigma: Tensor, eps: float) -> Tensor:
    """Reference of `resolved`, singular value by singular value."""
    shares = []
    for row in sigma.flatten(0, -2).tolist():
        relative = [value / row[0] if row[0] > 0 else 0.0 for value in row]
        shares.append([1.0 if x > eps else 0.0 if x <= 0.9 * eps else 10 * (x / eps - 0.9) for x in relative])
    return torch.tensor(shares, dtype=sigma.dtype, device=sigma.device).view_as(sigma)
