"""The tokens of each frame that far keys keep, as a tensor of indices: a function of frame, layer and step."""

import torch
from torch import Tensor

from freespec.far_keys import STEPS, z_order


def kept_tokens(rows: int, columns: int, *, num_frames: int, kept: int, layers: int, step: int) -> Tensor:
    """Indices of the `kept` tokens of each frame in the video, ascending, [layers, num_frames * kept] int64 on the CPU.

    Every `frame_tokens / kept`-th token along a Z-curve, from starts of low discrepancy over frames, layers and steps: on average each
    token is kept equally often, and neighbouring frames and steps keep different ones.
    """
    frame_tokens = rows * columns
    order = torch.tensor(z_order(rows, columns))
    frame, layer = torch.arange(num_frames), torch.arange(layers)[:, None]
    place = (frame * STEPS[0] + layer * STEPS[1] + step * STEPS[2]) % 2**32
    start = (place * frame_tokens) >> 32  # [layers, num_frames], in tokens / kept
    chosen = order[(torch.arange(kept) * frame_tokens + start[..., None]) // kept].sort(-1).values
    return (chosen + frame[:, None] * frame_tokens).flatten(1)
