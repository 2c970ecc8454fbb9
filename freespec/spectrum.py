"""Singular spectra of attention outputs and their fusion in one D x D matrix per head (method.md, eq. 4-13).

With O = U S Vᵀ, U = O V S⁻¹: a reconstruction that keeps a branch's singular vectors and changes its singular values is
O M with M = V diag(new / old) Vᵀ. Only the Gram matrices OᵀO sum over tokens, so the long U is never computed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Singular values below this share of the largest are noise of the Gram form: such directions stay as they are.
EPS = 1e-4
# Tokens per partial sum: bounds the fp32 copies of half-precision outputs to tens of MB.
CHUNK_TOKENS = 8192

Reduce = Callable[[Tensor], Tensor]


def gram(o_BSND: Tensor) -> Tensor:
    """OᵀO per batch item and head: [B, S, N, D] -> [B, N, D, D] fp64. Products in fp32 at least, partial sums in fp64."""
    batch, _, heads, dim = o_BSND.shape
    wide = torch.promote_types(o_BSND.dtype, torch.float32)
    total = torch.zeros(batch, heads, dim, dim, dtype=torch.float64, device=o_BSND.device)
    for chunk in o_BSND.split(CHUNK_TOKENS, dim=1):
        o_BNSD = chunk.to(wide).transpose(1, 2)
        total += o_BNSD.transpose(-1, -2) @ o_BNSD
    return total


def spectrum(gram_BNDD: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, descending [B, N, D], and right singular vectors as columns [B, N, D, D], of a Gram matrix, fp64."""
    eigenvalues, vectors = torch.linalg.eigh(gram_BNDD.double())
    return eigenvalues.clamp_min(0).sqrt().flip(-1), vectors.flip(-1)


def effective_rank(sigma: Tensor) -> Tensor:
    """exp(-sum p log p) with p = sigma / sum sigma over the last dimension; 0 for a zero spectrum. App. B."""
    total = sigma.sum(-1, keepdim=True)
    p = sigma / total.clamp_min(torch.finfo(sigma.dtype).tiny)
    rank = torch.exp(-torch.special.xlogy(p, p).sum(-1))
    return torch.where(total.squeeze(-1) > 0, rank, torch.zeros_like(rank))


def local_basis_matrix(gram_local: Tensor, gram_global: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """M with O_local M = U_l diag(g sigma_g + (1 - g) sigma_l) V_lᵀ (eq. 9-11): [B, N, D, D] fp64.

    `weight` is g [D], strongest singular direction first. Where sigma_l,r <= eps sigma_l,1 the direction stays as it is.
    """
    sigma_l, vectors = spectrum(gram_local)
    sigma_g = torch.linalg.eigvalsh(gram_global.double()).clamp_min(0).sqrt().flip(-1)
    kept = sigma_l > eps * sigma_l[..., :1]
    gain = weight.double() * (sigma_g / sigma_l.masked_fill(~kept, 1.0) - 1.0)
    return _identity_plus(vectors, gain.masked_fill(~kept, 0.0))


def global_basis_matrix(gram_local: Tensor, gram_global: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """M with O_global M = U_g diag(g sigma_g + (1 - g) sigma_l) V_gᵀ, the ablation's global basis: [B, N, D, D] fp64."""
    sigma_g, vectors = spectrum(gram_global)
    sigma_l = torch.linalg.eigvalsh(gram_local.double()).clamp_min(0).sqrt().flip(-1)
    kept = sigma_g > eps * sigma_g[..., :1]
    gain = (1.0 - weight.double()) * (sigma_l / sigma_g.masked_fill(~kept, 1.0) - 1.0)
    return _identity_plus(vectors, gain.masked_fill(~kept, 0.0))


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
    lam = lam.to(wide)
    out = torch.empty_like(o_base)
    for start in range(0, o_base.shape[1], CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        rotated = (o_base[:, rows].to(wide).transpose(1, 2) @ matrix).transpose(1, 2)
        out[:, rows] = (rotated + lam * o_global[:, rows].to(wide)).to(out.dtype)
    return out


def svd_fusion_ref(
    o_local: Tensor,
    o_global: Tensor,
    weight: Tensor,
    lam: float,
    *,
    basis: str = "local",
    form: str = "lerp",
    eps: float = EPS,
) -> Tensor:
    """Reference of the whole fusion by explicit SVD in fp64: [B, S, N, D] fp64. Shares nothing with the Gram form."""
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
