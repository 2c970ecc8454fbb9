"""Eigenvalues of symmetric matrices where one that is not finite has eigenvalues and vectors that are not a number.

LAPACK raises for such a matrix: on the one rank that has its head, while the others wait for that rank in a collective. Not a
number reaches every rank alike instead, and the engine, which looks at each step's latents, says it once for all of them.
"""

import torch
from torch import Tensor


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending [.., n], and eigenvectors as columns [.., n, n], of symmetric matrices [.., n, n]."""
    finite, broken = _finite_or_identity(matrices)
    values, vectors = torch.linalg.eigh(finite)
    return values.masked_fill(broken[..., None], torch.nan), vectors.masked_fill(broken[..., None, None], torch.nan)


def eigvalsh(matrices: Tensor) -> Tensor:
    """The eigenvalues of `eigh` alone, which cost less."""
    finite, broken = _finite_or_identity(matrices)
    return torch.linalg.eigvalsh(finite).masked_fill(broken[..., None], torch.nan)


def _finite_or_identity(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices with the identity in place of those that are not finite, and which those are, [..] bool."""
    broken = ~torch.isfinite(matrices).all(-1).all(-1)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.where(broken[..., None, None], identity, matrices), broken
