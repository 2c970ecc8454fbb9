"""Where far keys fail: the error of the global branch when each query looks for one far token, more and less sharply.

python -m benchmarks.peaked
"""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import tables
from benchmarks.measure import parser, run
from freespec.attention import WindowedAttention, masked_ref
from freespec.kernels import cpu_flash
from freespec.thinning import kept_tokens

FRAMES, WINDOW, HEADS, DIM = 20, 4, 2, 16
SIZES = ((8, 8, 16), (8, 8, 8), (16, 8, 16))  # rows, columns, kept tokens of a frame
SHARPNESS = (0.5, 5.0, 10.0, 20.0)  # length of the queries


def error(sharpness: float, size: tuple[int, int, int] = SIZES[1], *, seed: int = 0) -> tuple[float, float]:
    """Relative error of the global branch in fp64, and the mean over queries of the largest weight.

    Queries of each frame point at the tokens of the last one; values share a part, so that flat attention has a mean to find.
    """
    rows, columns, kept = size
    frame_tokens = rows * columns
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 1, FRAMES * frame_tokens, HEADS, DIM, generator=generator, dtype=torch.float64)
    v += 1.0
    q = torch.nn.functional.normalize(k[:, -frame_tokens:], dim=-1).repeat(1, FRAMES, 1, 1) * sharpness
    sample = kept_tokens(rows, columns, num_frames=FRAMES, kept=kept, layers=1, step=seed)[0]
    layer = WindowedAttention(num_frames=FRAMES, frame_tokens=frame_tokens, window_frames=WINDOW, kernel=cpu_flash)
    _, (out, _) = layer.dual(q, k, v, 0, 0, dtype=q.dtype, far=(k[:, sample], v[:, sample]))
    exact = masked_ref(q, k, v, frame_tokens=frame_tokens, window_frames=None)
    # Frames have the same queries: one has all weights.
    weights = torch.einsum("bsnd,bknd->bnsk", q[:, :frame_tokens], k) / DIM**0.5
    return float((out - exact).norm() / exact.norm()), float(weights.softmax(-1).amax(-1).mean())


def measured(repeats: int) -> Iterator[dict[str, Any]]:
    """Every sharpness with every size: errors and largest weights, draw by draw."""
    for sharpness in SHARPNESS:
        for size in SIZES:
            draws = [error(sharpness, size, seed=seed) for seed in range(repeats)]
            yield {"sharpness": sharpness, "size": list(size), "errors": draws}


def main() -> None:
    """Measure, print and write."""
    args = parser(__doc__, repeats=4).parse_args()
    run("peaked", args, measured(args.repeats), tables.peaked, {"frames": FRAMES, "window": WINDOW})


if __name__ == "__main__":
    main()
