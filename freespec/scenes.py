"""Windows that end where a scene ends: the local branch of each scene by itself, the global branch over the whole video.

Windows are those of a video that consists of the scene alone, so that no query sees another scene through its window. A scene
shorter than the window is one window.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from freespec.attention import Partial, WindowedAttention, merge_into

Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenedAttention:
    """`WindowedAttention` of a video whose scenes begin at the frames `starts`, the first at 0.

    `video` is the attention across scenes, with windows of the same length.
    """

    video: WindowedAttention
    starts: tuple[int, ...]
    # The attention of each scene, and its tokens [start, stop) in the video; made once, outside compiled blocks.
    _scenes: tuple[tuple[WindowedAttention, int, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        size = self.video.frame_tokens
        bounds = itertools.pairwise([*self.starts, self.video.num_frames])
        scenes = tuple(
            (replace(self.video, num_frames=stop - start, of_scene=True), start * size, stop * size)
            for start, stop in bounds
        )
        object.__setattr__(self, "_scenes", scenes)

    def halo(self, q_start: int, q_stop: int) -> Range:
        """Token range [start, stop) of all keys that the windows of the queries [q_start, q_stop) hold."""
        halos = []
        for scene, offset, stop in self._scenes:
            first, last = max(q_start, offset), min(q_stop, stop)
            if first < last:
                start, end = scene.halo(first - offset, last - offset)
                halos.append((start + offset, end + offset))
        return (min(start for start, _ in halos), max(end for _, end in halos)) if halos else (0, 0)

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """Every query sees every key: out [B, S, N, D], lse [B, S, N]."""
        return self.video.dense(q, k, v)

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`dense` of all keys, out [B, S, N, D]; see `WindowedAttention.whole`."""
        return self.video.whole(q, k, v)

    def far(self, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """`dense` over keys that lie in no query's window, beside a local branch."""
        return self.video.far(q, k, v)

    def local(self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int) -> Partial:
        """Local branch: each query sees its own window, which k and v must cover."""
        parts = [
            scene.local(rows, ks, vs, starts[0], starts[1])
            for scene, rows, (ks, vs), starts, _ in self._split((q, k, v), q_start, k_start)
        ]
        return _join(q, parts)

    def dual(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_start: int,
        k_start: int,
        *,
        dtype: torch.dtype,
        far: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Partial, Partial]:
        """Both branches: each query's window, which k and v must cover, and all keys of k, the latter in `dtype`; `far` as there."""
        local, compute_dtype = [], []
        others, shift = (far, self.video.far_shift(far[0].shape[1])) if far else ((k, v), 0.0)
        for scene, rows, (ks, vs), starts, (first, last) in self._split((q, k, v), q_start, k_start):
            inside = None
            if far:
                kept, offset = far[0].shape[1] // self.video.num_frames, first + k_start - starts[1]
                first = offset // scene.frame_tokens * kept  # noqa: PLW2901 - rows of far instead of k
                last = first + scene.num_frames * kept  # noqa: PLW2901
                inside = far[0][:, first:last], far[1][:, first:last]
            near, (out, lse) = scene.dual(rows, ks, vs, starts[0], starts[1], dtype=dtype, far=inside)
            for outside in (slice(0, first), slice(last, others[0].shape[1])):
                if outside.start < outside.stop:
                    part, part_lse = scene.far(rows, others[0][:, outside], others[1][:, outside])
                    merge_into(out, lse, part, part_lse + shift)
            local.append(near)
            compute_dtype.append((out, lse))
        return _join(q, local), _join(q, compute_dtype)

    def views(self, q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int]) -> Iterator[Tensor]:
        """Views are of the whole video, see `WindowedAttention.views`."""
        return self.video.views(q, k, v, starts)

    def frames(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """Frames are of the whole video, see `WindowedAttention.frames`."""
        return self.video.frames(q, k, v, seen)

    def merge_into(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        """`freespec.attention.merge_into`."""
        merge_into(out, lse, part, part_lse)

    def both(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Local and global branch of the whole sequence: (out_local, out_global), [B, S, N, D]."""
        (out_local, _), (out_global, _) = self.dual(q, k, v, 0, 0, dtype=q.dtype)
        return out_local, out_global

    def _split(
        self, qkv: tuple[Tensor, Tensor, Tensor], q_start: int, k_start: int
    ) -> Iterator[tuple[WindowedAttention, Tensor, tuple[Tensor, Tensor], Range, Range]]:
        """The queries of each scene and the keys inside it, where both start in the scene, and the keys' rows of k."""
        q, k, v = qkv
        for scene, offset, stop in self._scenes:
            first, last = max(q_start, offset), min(q_start + q.shape[1], stop)
            if first >= last:
                continue
            rows = max(offset - k_start, 0), min(stop - k_start, k.shape[1])
            inside = slice(*rows)
            starts = first - offset, rows[0] + k_start - offset
            yield scene, q[:, first - q_start : last - q_start], (k[:, inside], v[:, inside]), starts, rows


def _join(q: Tensor, parts: list[Partial]) -> Partial:
    if not parts:
        compute_dtype = torch.promote_types(q.dtype, torch.float32)
        return torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"), dtype=compute_dtype, device=q.device)
    if len(parts) == 1:
        return parts[0]
    out, lse = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
    return out, lse


def scenes_ref(
    q: Tensor, k: Tensor, v: Tensor, *, frame_tokens: int, window_frames: int, starts: Sequence[int]
) -> Tensor:
    """Reference of the local branch on a whole video in fp64: an explicit list of keys for each frame."""
    num_frames = q.shape[1] // frame_tokens
    outs = []
    for frame in range(num_frames):
        first = max(start for start in starts if start <= frame)
        last = min([start for start in starts if start > frame], default=num_frames)
        length = min(window_frames, last - first)
        start = min(max(frame - window_frames // 2, first), last - length)
        keys = slice(start * frame_tokens, (start + length) * frame_tokens)
        rows = slice(frame * frame_tokens, (frame + 1) * frame_tokens)
        logits = torch.einsum("bsnd,bknd->bnsk", q[:, rows].double(), k[:, keys].double()) / q.shape[-1] ** 0.5
        outs.append(torch.einsum("bnsk,bknd->bsnd", logits.softmax(-1), v[:, keys].double()))
    return torch.cat(outs, dim=1)
