"""Singular spectra of attention outputs and their fusion in one D x D matrix per head (method.md, eq. 4-13).

With O = U S Vᵀ, U = O V S⁻¹: a reconstruction that keeps a branch's singular vectors and changes its singular values is
O M with M = V diag(new / old) Vᵀ. Only the Gram matrices OᵀO sum over tokens, so the long U is never computed.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import pad

from freespec import eigen

# Singular values below this share of the largest are noise of the Gram form: such directions stay as they are.
EPS = 1e-4
# Of a chunk of tokens in fp32, which outputs in half precision are copied to. Few heads are taken in longer chunks: on a CPU each
# product of a short one is over before its threads are awake.
CHUNK_BYTES = 48 * 2**20
# Tokens whose products are summed in fp32 at most.
CHUNK_TOKENS = 32768
# A GPU takes a chunk in pieces, as a batch: the product of a whole chunk is one tile for each of 12 heads, and it has 132 places.
PIECE_TOKENS = 512
# Rows of a symmetric product that a CPU computes at a time, from the diagonal on.
BLOCK_ROWS = 32

Reduce = Callable[[Tensor], Tensor]


def chunk_tokens(heads: int, head_dim: int) -> int:
    """Tokens that are taken at a time, of so many heads; a rank may have none."""
    return min(CHUNK_TOKENS, max(1, CHUNK_BYTES // max(1, 4 * heads * head_dim)))


def gram(o_BSND: Tensor) -> Tensor:
    """OᵀO per batch item and head: [B, S, N, D] -> [B, N, D, D] fp64. Products in fp32 at least, partial sums in fp64."""
    batch, _, heads, dim = o_BSND.shape
    wide = torch.promote_types(o_BSND.dtype, torch.float32)
    product = product_of_halves if o_BSND.device.type == "cpu" else product_in_pieces
    total = torch.zeros(batch, heads, dim, dim, dtype=torch.float64, device=o_BSND.device)
    for item, chunk in itertools.product(range(batch), o_BSND.split(chunk_tokens(heads, dim), dim=1)):
        total[item] += product(chunk[item].transpose(0, 1).to(wide, memory_format=torch.contiguous_format))
    return total


def grams(o_local: Tensor, o_global: Tensor) -> Tensor:
    """Gram matrices of both branches, [2, B, N, D, D] fp64, so that one message sums both over ranks."""
    return torch.stack((gram(o_local), gram(o_global)))


def product_of_halves(o_NSD: Tensor) -> Tensor:
    """OᵀO, [N, S, D] -> [N, D, D], for a device that the operations keep busy: of a symmetric matrix half is enough."""
    dim = o_NSD.shape[-1]
    upper = o_NSD.new_zeros(o_NSD.shape[0], dim, dim)
    for first in range(0, dim, BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        upper[:, rows, first:] = o_NSD[..., rows].mT @ o_NSD[..., first:]
    return upper.triu() + upper.triu(1).mT


def product_in_pieces(o_NSD: Tensor) -> Tensor:
    """OᵀO, [N, S, D] -> [N, D, D] fp64, for a device that few products cannot fill: a batch of pieces, summed in order."""
    tokens = o_NSD.shape[1]
    count = -(-tokens // PIECE_TOKENS)
    pieces = pad(o_NSD, (0, 0, 0, count * PIECE_TOKENS - tokens)).unflatten(1, (count, PIECE_TOKENS))
    return (pieces.mT @ pieces).sum(1, dtype=torch.float64)


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
    """`spectra` by one call: each call of torch.linalg makes the host wait for the device, to see whether it went well."""
    sigmas, vectors = spectrum(torch.stack((gram_kept, gram_other)))
    return sigmas[0], vectors[0], sigmas[1]


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK on one thread: D x D is so small that several wait for each other longer than one computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def local_basis_matrix(gram_local: Tensor, gram_global: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """M with O_local M = U_l diag(g sigma_g + (1 - g) sigma_l) V_lᵀ (eq. 9-11): [B, N, D, D] fp64.

    `weight` is g [D], strongest singular direction first. Where sigma_l,r <= eps sigma_l,1 the direction stays as it is. Grams
    that are not finite give an M that is not a number.
    """
    sigma_l, vectors, sigma_g = spectra(gram_local, gram_global)
    noise = sigma_l <= eps * sigma_l[..., :1]
    gain = weight.double() * (sigma_g / sigma_l.masked_fill(noise, 1.0) - 1.0)
    return _identity_plus(vectors, gain.masked_fill(noise, 0.0))


def global_basis_matrix(gram_local: Tensor, gram_global: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """M with O_global M = U_g diag(g sigma_g + (1 - g) sigma_l) V_gᵀ, the ablation's global basis: [B, N, D, D] fp64."""
    sigma_g, vectors, sigma_l = spectra(gram_global, gram_local)
    noise = sigma_g <= eps * sigma_g[..., :1]
    gain = (1.0 - weight.double()) * (sigma_l / sigma_g.masked_fill(noise, 1.0) - 1.0)
    return _identity_plus(vectors, gain.masked_fill(noise, 0.0))


def _identity_plus(vectors: Tensor, gain: Tensor) -> Tensor:
    """I + V diag(gain) Vᵀ, exactly I where the gain is zero."""
    identity = torch.eye(gain.shape[-1], dtype=gain.dtype, device=gain.device)
    return identity + (vectors * gain[..., None, :]) @ vectors.transpose(-1, -2)


def reconstruct(o_base: Tensor, matrix: Tensor, o_global: Tensor, lam: Tensor, form: str) -> Tensor:
    """Eq. 12-13: (1 - lam) O M + lam O_global (`lerp`) or O M + lam O_global (`add`): [B, S, N, D] in o_base's dtype.

    `matrix` is [B, N, D, D], `lam` a 0-dim tensor. Computed in fp32 at least, a chunk of tokens at a time.
    """
    wide = torch.promote_types(o_base.dtype, torch.float32)
    keep = 1.0 - lam if form == "lerp" else torch.ones_like(lam)
    matrix = (keep * matrix).to(wide)
    lam = lam.to(wide)[None]  # one dimension: a number without would not widen what it scales
    out = torch.empty_like(o_base)
    batch, tokens, heads, dim = o_base.shape
    size = chunk_tokens(heads, dim)
    for item, start in itertools.product(range(batch), range(0, tokens, size)):
        rows = item, slice(start, start + size)
        mixed = out[rows] if out.dtype == wide else torch.empty_like(out[rows], dtype=wide)
        torch.mul(lam, o_global[rows], out=mixed)
        # The product is added to it by the kernel that computes it.
        mixed.transpose(0, 1).baddbmm_(o_base[rows].to(wide).transpose(0, 1), matrix[item])
        if out.dtype != wide:
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
    eps: float = 1e-4,
) -> Tensor:
    """Reference of the whole fusion by explicit SVD in fp64: [B, S, N, D] fp64. Shares nothing with the Gram form.

    `eps` is the definition's, written out, so that another EPS of the Gram form would show.
    """
    local, wide = o_local.double().permute(0, 2, 1, 3), o_global.double().permute(0, 2, 1, 3)
    u_l, s_l, vh_l = torch.linalg.svd(local, full_matrices=False)
    u_g, s_g, vh_g = torch.linalg.svd(wide, full_matrices=False)
    g = weight.double()[: s_l.shape[-1]].expand_as(s_l)
    if basis == "local":
        g = torch.where(s_l <= eps * s_l[..., :1], 0.0, g)
        rebuilt = torch.einsum("bnsr,bnr,bnrd->bnsd", u_l, g * s_g + (1 - g) * s_l, vh_l)
    else:
        g = torch.where(s_g <= eps * s_g[..., :1], 1.0, g)
        rebuilt = torch.einsum("bnsr,bnr,bnrd->bnsd", u_g, g * s_g + (1 - g) * s_l, vh_g)
    fused = (1 - lam) * rebuilt + lam * wide if form == "lerp" else rebuilt + lam * wide
    return fused.permute(0, 2, 1, 3)
