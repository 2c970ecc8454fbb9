"""FreeLong's low-pass filter over time and space, as one small matrix per axis.

The published filter is P(k) = exp(-1/2 [(f_t/d_t)^2 + (f_h/d_s)^2 + (f_w/d_s)^2]) on the 3D FFT, f = frequency / Nyquist.
It is a product of one factor per axis, so filtering is a product with one circulant matrix per axis: no FFT, no complex
numbers, and any precision. In space it is a circular Gaussian blur of deviation 1 / (pi d), 1.27 tokens for d = 1/4.
"""

import math

import torch
from torch import Tensor

from freespec.operators import like_first, one_operator


def blur_matrix(size: int, cutoff: float) -> Tensor:
    """[n, n] fp64: the circulant matrix that multiplies frequency f (in Nyquists) by exp(-(f/d)^2 / 2)."""
    return _circulant(torch.fft.ifft(_response(_frequencies(size), cutoff)).real)


def uncentred_blur_matrix(size: int, cutoff: float) -> Tensor:
    """[n, n] complex128: the same on the published grid arange(n) * 2/n - 1, half a bin off for odd n."""
    shift = -1.0 / size if size % 2 else 0.0
    return _circulant(torch.fft.ifft(_response(_frequencies(size) + shift, cutoff)))


def tap_matrix(size: int, cutoff: float, taps: int) -> Tensor:
    """[n, n] fp64: a Gaussian of `taps` (odd) weights that sum to 1, folded round an axis that is shorter than they are."""
    reach = taps // 2
    offsets = torch.arange(-reach, reach + 1, device="cpu")
    # A Gaussian of deviation d/2 cycles per token in frequency is one of deviation 1 / (pi d) tokens in space.
    weights = torch.exp(-0.5 * (math.pi * cutoff * offsets.double()) ** 2)
    kernel = torch.zeros(size, dtype=torch.float64, device="cpu")
    return _circulant(kernel.index_add(0, offsets % size, weights / weights.sum()))


def low_pass(x_BFHWD: Tensor, matrices: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Re[(M_t x M_h x M_w) x] over frames, rows and columns: [B, F, H, W, D], in the dtype of x."""
    along_t, along_h, along_w = (m.to(_dtype(x_BFHWD, m)) for m in matrices)
    shape = x_BFHWD.shape
    x = along_w @ x_BFHWD.to(along_w.dtype)
    x = along_h @ x.flatten(3)
    x = along_t @ x.flatten(2)
    x = x.unflatten(2, shape[2:])
    return x.real if x.is_complex() else x


@one_operator("(Tensor total, Tensor near, Tensor far, Tensor[] matrices, *, int[] size) -> Tensor", like_first)
def add_low(
    total: Tensor, near: Tensor, far: Tensor, matrices: tuple[Tensor, Tensor, Tensor], *, size: tuple[int, int, int]
) -> Tensor:
    """total + LPF(far - near), [B, F*H*W, N, D] in the dtype of `total`, with `size` (F, H, W).

    Computed in fp32 at least, head by head, as the fp32 copies are larger than the branches.
    """
    compute_dtype = torch.promote_types(total.dtype, torch.float32)
    out = torch.empty_like(total)
    for head in range(total.shape[2]):
        low = (far[:, :, head].to(compute_dtype) - near[:, :, head].to(compute_dtype)).unflatten(1, size)
        out[:, :, head] = (total[:, :, head].to(compute_dtype) + low_pass(low, matrices).flatten(1, 3)).to(out.dtype)
    return out


def _frequencies(size: int) -> Tensor:
    """Frequency of each bin of an FFT of n, over Nyquist: 0, 2/n, .. and the negative ones."""
    return 2.0 * torch.fft.fftfreq(size, dtype=torch.float64, device="cpu")


def _response(frequencies: Tensor, cutoff: float) -> Tensor:
    return torch.exp(-0.5 * (frequencies / cutoff) ** 2)


def _circulant(kernel: Tensor) -> Tensor:
    index = torch.arange(kernel.shape[0], device="cpu")
    return kernel[(index[:, None] - index) % kernel.shape[0]]


def _dtype(x: Tensor, matrix: Tensor) -> torch.dtype:
    if not matrix.is_complex():
        return x.dtype
    return torch.complex128 if x.dtype == torch.float64 else torch.complex64
