"""Overlapping views of whole frames: their starts, their weights, and their merged output (FreeNoise, FreePCA).

A view is `window_frames` frames in a row; views start every `stride` frames. Both methods were published for lengths that
the stride divides: otherwise their last frames are in no view. Here a last view that ends with the video covers them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def view_starts(num_frames: int, window_frames: int, stride: int, *, cover: bool) -> tuple[int, ...]:
    """First frames 0, s, 2s, ... of the views; with `cover` also that of a last view which ends with the video."""
    last = max(num_frames - window_frames, 0)
    starts = tuple(range(0, last + 1, stride))
    return (*starts, last) if cover and starts[-1] != last else starts


def triangle(window_frames: int) -> list[int]:
    """FreeNoise's weights over a view: 1, 2, .. W/2, W/2, .. 2, 1 for even W, 1, .. (W + 1)/2, .. 1 for odd W."""
    return [min(frame, window_frames - 1 - frame) + 1 for frame in range(window_frames)]


def view_weights(
    starts: Sequence[int], num_frames: int, profile: Sequence[float], *, last_new_only: bool = False
) -> Tensor:
    """Weight of each frame of each view, [V, W] fp64: the profile over the view, normalised to 1 over the views of a frame.

    `last_new_only`: the last view counts only for the frames that no other view has. Frames in no view get nothing.
    """
    window = min(len(profile), num_frames)
    weights = torch.tensor(profile, dtype=torch.float64, device="cpu")[:window].repeat(len(starts), 1)
    if last_new_only and len(starts) > 1:
        weights[-1, : starts[-2] + window - starts[-1]] = 0.0
    total = torch.zeros(num_frames, dtype=torch.float64, device="cpu")
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + window] += weight
    return torch.stack([w / total[a : a + window].clamp_min(1e-300) for a, w in zip(starts, weights, strict=True)])


def merge_views(views: Iterable[Tensor], weights: Tensor, starts: Sequence[int], num_frames: int) -> Tensor:
    """sum_v weight_v * view_v at its place: views [B, W * H*W, N, D] -> [B, S, N, D] in their dtype.

    `weights` [V, W] are those of `view_weights`. Added in fp32 at least, view by view.
    """
    total, dtype = None, None
    for start, weight, view in zip(starts, weights.unbind(0), views, strict=True):
        window = weight.shape[0]
        frame_tokens = view.shape[1] // window
        compute_dtype = torch.promote_types(view.dtype, torch.float32)
        if total is None:
            dtype = view.dtype
            total = view.new_zeros(view.shape[0], num_frames * frame_tokens, *view.shape[2:], dtype=compute_dtype)
        by_frame = (
            view.unflatten(1, (window, frame_tokens)).to(compute_dtype) * weight.to(compute_dtype)[:, None, None, None]
        )
        total[:, start * frame_tokens : (start + window) * frame_tokens] += by_frame.flatten(1, 2)
    assert total is not None and dtype is not None, "a video has at least one view"
    return total.to(dtype)
