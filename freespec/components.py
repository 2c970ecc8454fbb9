"""Principal components over time of attention outputs, and which of them two branches share (FreePCA).

The published method projects rows of n frames (one per pixel and channel) on the eigenvectors of the global branch's n x n
covariance, takes the columns that are most similar in both branches from the global one, and projects back. Projections are
linear in the frames, so all of it is two n x n matrices that mix frames, made from three n x n sums over pixels, channels
and heads: no row is ever projected.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from freespec import eigen
from freespec.operators import like_first, one_operator

# A component of less than this share of the largest energy is rounding noise, and so is its cosine: as in the Gram form.
EPS = 1e-8
# Values per frame and head in one product: bounds the fp64 copies of outputs to tens of MB.
CHUNK_VALUES = 1 << 17


def _grams_shape(x_local: Tensor, _x_global: Tensor, num_frames: int) -> Tensor:
    return x_local.new_empty(3, x_local.shape[0], num_frames, num_frames, dtype=torch.float64)


@one_operator("(Tensor x_local, Tensor x_global, int num_frames) -> Tensor", _grams_shape)
def temporal_grams(x_local: Tensor, x_global: Tensor, num_frames: int) -> Tensor:
    """[3, B, n, n] fp64: X_l X_lᵀ, X_l X_gᵀ and X_g X_gᵀ of the centred outputs [B, n * H*W, N, D], rows are frames.

    Centred over the frames before the product, since a mean is large beside what varies. All in fp64, which resolves EPS and
    holds the squares of any outputs; the split of the heads over ranks shows in the last bits only.
    """
    batch, _, heads, dim = x_local.shape
    total = torch.zeros(3, batch, num_frames, num_frames, dtype=torch.float64, device=x_local.device)
    local, far = (x.unflatten(1, (num_frames, -1)) for x in (x_local, x_global))
    pixels = max(1, CHUNK_VALUES // dim)
    for head in range(heads):
        for start in range(0, local.shape[2], pixels):
            rows = slice(start, start + pixels)
            x, y = (_centred(each[:, :, rows, head].double().flatten(2)) for each in (local, far))
            total += torch.stack((x @ x.mT, x @ y.mT, y @ y.mT))
    return total


def grams_of_views(views: Sequence[tuple[Tensor, Tensor]], num_frames: int) -> Tensor:
    """[3, V, B, n, n] fp64: `temporal_grams` of each view's (local, global) outputs."""
    return torch.stack([temporal_grams(local, far, num_frames) for local, far in views], dim=1)


def shared_projection(grams: Tensor, counts: Tensor, *, compat: bool = False) -> Tensor:
    """[V, B, n, n] fp64: the projection P on the most similar components of each view; `grams` [3, V, B, n, n].

    `counts` [V] says how many components a view takes. The eigenvectors of the global covariance X_g X_gᵀ are compared by
    cos = vᵀ C_lg v / sqrt(vᵀ C_ll v · vᵀ C_gg v). Centring makes the vector of ones a null direction, whose cosine is 0/0:
    it is left out by working in the n - 1 dimensions orthogonal to it. Components without energy in a branch are never taken.

    `compat`: the null direction is ranked with cosine 0, the average of the published code's rounding errors over many rows; if
    it is selected, one component fewer is exchanged.

    One frame is its own mean and has no component. Sums that are not finite give a P of NaN.
    """
    num_frames = grams.shape[-1]
    if num_frames == 1:
        return torch.zeros_like(grams[0])
    across = _across_ones(num_frames, grams.device)
    c_ll, c_lg, c_gg = (across.mT @ grams @ across).unbind(0)
    _, vectors = eigen.eigh(c_gg)
    e_ll, e_lg, e_gg = ((vectors * (c @ vectors)).sum(-2) for c in (c_ll, c_lg, c_gg))
    known = (e_ll > EPS * e_ll.amax(-1, keepdim=True)) & (e_gg > EPS * e_gg.amax(-1, keepdim=True))
    cosine = e_lg / torch.where(known, e_ll * e_gg, 1.0).sqrt()
    cosine = cosine.masked_fill(~known, float("-inf"))
    if compat:  # one column more, for the null direction
        cosine = torch.cat((cosine, torch.zeros_like(cosine[..., :1])), dim=-1)
    place = cosine.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    taken = (place < counts[:, None, None]) & cosine.isfinite()
    vectors = across @ vectors
    taken = taken[..., : vectors.shape[-1]]
    return (vectors * taken[..., None, :]) @ vectors.mT


def mixing_matrices(projection: Tensor) -> tuple[Tensor, Tensor]:
    """(A_l, A_g) with A_l X_l + A_g X_g = (I - P) X̃_l + P X̃_g + mean X_g, for X̃ centred over frames: like P [..., n, n]."""
    size = projection.shape[-1]
    mean = torch.full_like(projection, 1.0 / size)
    identity = torch.eye(size, dtype=projection.dtype, device=projection.device)
    return identity - mean - projection, projection + mean


@one_operator("(Tensor x_local, Tensor x_global, Tensor[] matrices) -> Tensor", like_first)
def mix_frames(x_local: Tensor, x_global: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
    """A_l X_l + A_g X_g over the frames of [B, n * H*W, N, D], A [B, n, n]; in fp32 at least, head by head."""
    local, far = matrices
    compute_dtype = torch.promote_types(x_local.dtype, torch.float32)
    out = torch.empty_like(x_local)
    frames = (local.shape[-1], -1)
    for head in range(x_local.shape[2]):
        x, y = (each[:, :, head].unflatten(1, frames).to(compute_dtype) for each in (x_local, x_global))
        mixed = local.to(compute_dtype) @ x.flatten(2) + far.to(compute_dtype) @ y.flatten(2)
        out[:, :, head] = mixed.unflatten(2, x.shape[2:]).flatten(1, 2).to(out.dtype)
    return out


def _centred(x: Tensor) -> Tensor:
    """[B, n, values] without its mean over the frames."""
    return x - x.mean(1, keepdim=True)


def _across_ones(size: int, device: torch.device) -> Tensor:
    """[n, n - 1] fp64: an orthonormal basis (Helmert's) of the vectors whose entries sum to 0."""
    basis = torch.zeros(size, size - 1, dtype=torch.float64, device="cpu")
    for k in range(1, size):
        basis[:k, k - 1] = 1.0
        basis[k, k - 1] = -float(k)
        basis[:, k - 1] /= (k * (k + 1)) ** 0.5
    return basis.to(device)
