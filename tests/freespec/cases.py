"""What the tests of the method draw, and the tolerances they may use: no others."""

from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

SAME_MATH = 1e-12  # fp64, same mathematics in another order

# On a busy machine drawing is slow, too, which is no fault.
drawn = settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**31 - 1)


def assert_same_math(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-12 in fp64, relative to the largest entry: a near-zero entry is judged by the size of its tensor."""
    assert actual.dtype == expected.dtype == torch.float64
    scale = expected.abs().max().clamp_min(1.0).item() if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=SAME_MATH * scale)


def assert_low_precision(actual: Tensor, plain: Tensor, reference: Tensor) -> None:
    """The error against the reference is at most twice that of plain torch in the same dtype."""
    assert actual.dtype == plain.dtype
    error, allowed = ((x.double() - reference.double()).norm().item() for x in (actual, plain))
    assert error <= 2 * allowed, f"error {error:.3e}, plain torch in {actual.dtype} {allowed:.3e}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """Sizes of a drawn video and of the attention over it."""

    num_frames: int
    frame_tokens: int
    window_frames: int
    batch: int
    heads: int
    dim: int

    @property
    def num_tokens(self) -> int:
        """S."""
        return self.num_frames * self.frame_tokens

    def qkv(self, seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Normal q, k, v [B, S, N, D], drawn on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        shape = (3, self.batch, self.num_tokens, self.heads, self.dim)
        q, k, v = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).unbind(0)
        return q, k, v


@st.composite
def videos(draw: st.DrawFn) -> Video:
    """Videos shorter than the window, as long, a frame longer, multiples and not; windows even and odd."""
    window = draw(st.integers(1, 6))
    extra = draw(st.sampled_from([-1, 0, 1, 2, window, window + 1, 2 * window + 1]))
    return Video(
        num_frames=max(window + extra, 1),
        frame_tokens=draw(st.integers(1, 4)),
        window_frames=window,
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([2, 4, 8])),
    )


def features(seed: int, sizes: tuple[int, int, int, int], *, rank: int | None = None) -> Tensor:
    """Branch outputs [B, S, N, D] fp64 whose spectrum falls from 1 to 0.01 with gaps, and is zero from `rank` on.

    Gaps, because M jumps where two singular values tie; 0.01, because the Gram form squares the condition number.
    """
    batch, tokens, heads, dim = sizes
    generator = torch.Generator().manual_seed(seed)
    full = min(tokens, dim)
    u, _ = torch.linalg.qr(torch.randn(batch, heads, tokens, full, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(batch, heads, dim, full, generator=generator, dtype=torch.float64))
    steps = torch.arange(full, dtype=torch.float64) + 0.4 * torch.rand(batch, heads, full, generator=generator).double()
    sigma = 0.01 ** (steps / full) * (0.5 + torch.rand(batch, heads, 1, generator=generator).double())
    sigma[..., full if rank is None else rank :] = 0.0
    return ((u * sigma[..., None, :]) @ v.transpose(-1, -2)).transpose(1, 2).contiguous()


def rotation(seed: int, heads: int, dim: int) -> Tensor:
    """One orthogonal matrix per head: [N, D, D] fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator, dtype=torch.float64))[0]
