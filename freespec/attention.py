"""The local and the global branch from dense calls only: windows are strided views, all other keys a circular slice.

Layouts: q, k, v and out are [B, S, N, D], lse is [B, S, N] (fp32; fp64 for fp64 inputs). Tokens are frame-major.
An empty set of keys gives out = 0 and lse = -inf, and no kernel is called for it.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from freespec.kernels import DualKernel, Kernel, kernel_at, key_of, sdpa
from freespec.windows import QueryGroup, query_groups, window_range

# Parts are merged in eighths of their tokens: the fp32 copies of half-precision outputs are three quarters of one output, and
# a GPU is given enough at a time. Fewer tokens than these are merged at once.
MERGE_PIECES, MERGE_TOKENS = 8, 2048
# Rows beyond whole units use other CPU kernels, whose sums differ in the last bits; shards therefore begin at multiples of this
# many tokens.
CPU_ROWS = 8
Partial = tuple[Tensor, Tensor]  # attention over some of the keys: out [B, S, N, D], lse [B, S, N]
Place = tuple[int, slice]  # batch item and rows of it


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets: (e^za A + e^zb B) / (e^za + e^zb), in fp32 at least.

    out [B, S, N, D] of any float dtype, lse [B, S, N]. Two empty sets give out = 0, lse = -inf. The weights are computed from
    the difference of the two, not from their log-sum-exp, which would add its rounding. On a CPU exp and log give the same bits
    at any position, unlike logaddexp, so that heads may be split in any way.
    """
    largest = torch.maximum(lse_a, lse_b)
    base = largest.masked_fill(torch.isneginf(largest), 0.0)
    weight_a, weight_b = torch.exp(lse_a - base), torch.exp(lse_b - base)
    total = weight_a + weight_b  # 1 to 2, or 0 for two empty sets
    weight_a, weight_b = ((weight / total.clamp_min(1.0))[..., None] for weight in (weight_a, weight_b))
    out = out_a.to(total.dtype) * weight_a + out_b.to(total.dtype) * weight_b
    return out.to(out_a.dtype), largest + torch.log(total)


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """`merge` of out [..., S, N, D], lse [..., S, N] and a part of the same shape, written over the first two.

    The only function of this package that changes an argument: both branches of a long video are the largest tensors of a step.
    """
    step = merge_step(out.shape[-3])
    for start in range(0, out.shape[-3], step):
        rows = (..., slice(start, start + step), slice(None))
        out[*rows, :], lse[rows] = merge(out[*rows, :], lse[rows], part[*rows, :], part_lse[rows])


def merge_step(num_tokens: int) -> int:
    """Tokens that `merge_into` merges at a time."""
    return max(MERGE_TOKENS, -(-num_tokens // MERGE_PIECES))


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowedAttention:
    """Attention over a video of `num_frames` x `frame_tokens` tokens with windows of `window_frames` frames.

    Queries and keys may be any contiguous part of the sequence: `q_start` and `k_start` are the absolute positions of
    their first tokens, so that the same calls serve one device and the shard of a rank. `dual_kernel` computes both
    branches in one call; None takes dense calls of `kernel`. `rest_kernel` takes the place of `kernel` where keys
    outside the windows are attended beside the windows; None is `kernel` there too. `of_scene`: this is a scene of a longer
    video, which begins at any token of a shard.

    In a compiled block `dense`, `far`, `local` and `dual` are one operator each: a compiler would materialise every overlapping window.
    """

    num_frames: int
    frame_tokens: int
    window_frames: int
    kernel: Kernel
    dual_kernel: DualKernel | None = None
    rest_kernel: Kernel | None = None
    of_scene: bool = False
    keys: tuple[str, str] = field(init=False, repr=False, compare=False)  # of kernel and rest_kernel, for the operators

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", (key_of(self.kernel), key_of(self.rest_kernel or self.kernel)))

    def halo(self, q_start: int, q_stop: int) -> tuple[int, int]:
        """Token range [start, stop) of all keys that the windows of the queries [q_start, q_stop) hold."""
        return window_range(
            q_start,
            q_stop,
            num_frames=self.num_frames,
            frame_tokens=self.frame_tokens,
            window_frames=self.window_frames,
        )

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Every query sees every key: out [B, S, N, D], lse [B, S, N]."""
        if torch.compiler.is_compiling():
            return dense_op(q, k, v, self.keys[0])
        return dense_part(self.kernel, q, k, v)

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`dense` over all keys of the video, without the log-sum-exp: out [B, S, N, D].

        At native length it calls torch's `scaled_dot_product_attention`, as diffusers does: equal bit for bit under any backend.
        """
        if self.num_frames > self.window_frames or q.numel() == 0:
            return self.dense(q, k, v)[0]
        return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    def far(self, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """`dense` over keys that lie in no query's window, beside a local branch: by `rest_kernel`."""
        rows = q.shape[1]
        q = _pad_rows(q, 1) if self.of_scene else q
        if torch.compiler.is_compiling():
            out, lse = dense_op(q, k, v, self.keys[1])
        else:
            out, lse = dense_part(self.rest_kernel or self.kernel, q, k, v)
        return out[:, :rows], lse[:, :rows]

    def local(self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int) -> Partial:
        """Local branch (eq. 1): each query sees its own window, which k and v must cover."""
        if torch.compiler.is_compiling():
            return local_op(q, k, v, self.keys[0], [*self._geometry, q_start, k_start])
        out, lse = _empty_keys(q)
        for group in self._groups(q, q_start):
            self._check_cover(group, k_start, k_start + k.shape[1])
            starts = q_start, group.k_start - k_start
            parts = self._attend(self.kernel, group, (q, k, v), starts, length=group.k_tokens)
            for place, part, part_lse in parts:
                out[place], lse[place] = part, part_lse
        return out, lse

    def rest(self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int) -> Partial:
        """Complement of the local branch: each query sees the keys of k that lie outside its window."""
        out, lse = _empty_keys(q)
        for place, part, part_lse in self._rest_parts(q, (k, v), q_start, k_start):
            out[place], lse[place] = part, part_lse
        return out, lse

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
        """Both branches for the cost of one: each query's window, which k and v must cover, and all keys of k.

        The global output has `dtype`: fp32 where more keys follow, so that many parts are rounded once. `far` are k and v of
        the same number of tokens of every frame; outside the windows they stand in for all keys.
        """
        if self.dual_kernel is not None and q.numel() > 0:
            return self._by_one_kernel(self.dual_kernel, (q, k, v), (q_start, k_start), far, dtype)
        if torch.compiler.is_compiling():
            made = dual_op(q, k, v, far or (), *self.keys, [*self._geometry, q_start, k_start], dtype)
            return (made[0], made[1]), (made[2], made[3])
        local = self.local(q, k, v, q_start, k_start)
        out, lse = local[0].to(dtype, copy=True), local[1].clone()
        parts = self._rest_parts(q, (k, v), q_start, k_start) if far is None else self.far_parts(q, far, q_start)
        for place, part, part_lse in parts:
            merge_into(out[place], lse[place], part, part_lse)
        return local, (out, lse)

    def far_parts(self, q: Tensor, far: tuple[Tensor, Tensor], q_start: int) -> Iterator[tuple[Place, Tensor, Tensor]]:
        """Each query and the kept tokens `far` of the frames outside its window, part by part.

        The log-sum-exp is shifted because each kept token stands for several, so that the sum of exponentials is unbiased.
        """
        shift = self.far_shift(far[0].shape[1])
        kept = far[0].shape[1] // self.num_frames
        for place, part, part_lse in self._rest_parts(q, far, q_start, 0, kept):
            yield place, part, part_lse + shift

    def far_shift(self, num_kept: int) -> float:
        """Logarithm of the number of tokens that each of `num_kept` kept tokens of the video stands for."""
        return math.log(self.num_frames * self.frame_tokens / num_kept)

    def views(self, q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int]) -> Iterator[Tensor]:
        """Attention inside each view of `window_frames` frames from frame `start` on, of the whole sequence, one by one.

        [B, S, N, D] -> [B, window_frames * frame_tokens, N, D] for each start. A view is a slice: nothing is copied.
        """
        length = self.window_frames * self.frame_tokens
        for start in starts:
            rows = slice(start * self.frame_tokens, start * self.frame_tokens + length)
            yield self.dense(q[:, rows], k[:, rows], v[:, rows])[0]

    def frames(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """Each frame of queries and the frames of keys that it sees, of the whole sequence: [B, S, N, D].

        `seen` [F, A] int64 on the CPU has their numbers, ascending, padded with -1. Frames side by side that see the same are one
        call, and keys side by side are not copied.
        """
        if torch.compiler.is_compiling():
            return frames_op(q, k, v, seen, self.keys[0], self.frame_tokens)
        out, stop = torch.empty_like(q), 0
        for frames, alike in itertools.groupby(seen.tolist()):
            rows = slice(stop, stop + sum(1 for _ in alike) * self.frame_tokens)
            near_k, near_v = (
                frames_of(x, [frame for frame in frames if frame >= 0], self.frame_tokens) for x in (k, v)
            )
            out[:, rows] = dense_part(self.kernel, q[:, rows], near_k, near_v)[0]
            stop = rows.stop
        return out

    def merge_into(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        """`merge_into` of this module, so that attention over ranks needs this object alone."""
        merge_into(out, lse, part, part_lse)

    def both(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Local and global branch of the whole sequence: (out_local, out_global), [B, S, N, D]."""
        (out_local, _), (out_global, _) = self.dual(q, k, v, 0, 0, dtype=q.dtype)
        return out_local, out_global

    @property
    def _geometry(self) -> tuple[int, int, int, int]:
        return self.num_frames, self.frame_tokens, self.window_frames, int(self.of_scene)

    def _by_one_kernel(
        self,
        kernel: DualKernel,
        qkv: tuple[Tensor, Tensor, Tensor],
        starts: tuple[int, int],
        far: tuple[Tensor, Tensor] | None,
        dtype: torch.dtype,
    ) -> tuple[Partial, Partial]:
        q, k, _ = qkv
        for group in self._groups(q, starts[0]):
            self._check_cover(group, starts[1], starts[1] + k.shape[1])
        out_local, lse_local, out_global, lse_global, _ = kernel(
            qkv,
            q_start=starts[0],
            k_start=starts[1],
            num_frames=self.num_frames,
            frame_tokens=self.frame_tokens,
            window_frames=self.window_frames,
            global_dtype=dtype,
            far=far,
        )
        return (out_local, lse_local), (out_global, lse_global)

    def _rest_parts(
        self, q: Tensor, kv: tuple[Tensor, Tensor], q_start: int, k_start: int, kept: int | None = None
    ) -> Iterator[tuple[Place, Tensor, Tensor]]:
        """Each query and the keys outside its window, part by part, as `_attend` gives them; of each frame kv has `kept` or all tokens.

        Read as a circle, those keys are one slice of constant length that starts where the window ends; k and v are
        written out a second time only as far as some window's slice runs over the end, and for one group at a time.
        """
        num_keys = kv[0].shape[1]
        for group in self._groups(q, q_start):
            if kept is not None:
                group = group.thinned(self.frame_tokens, kept)  # noqa: PLW2901
            self._check_cover(group, k_start, k_start + num_keys)
            first_end = group.k_start + group.k_tokens - k_start
            length = num_keys - group.k_tokens
            if length == 0:
                continue
            wrapped = group.k_stop - k_start - group.k_tokens  # the last entry's slice ends where its window starts
            circle = _circle(kv[0], first_end, wrapped), _circle(kv[1], first_end, wrapped)
            kernel = self.rest_kernel or self.kernel
            yield from self._attend(kernel, group, (q, *circle), (q_start, 0), length=length)

    def _groups(self, q: Tensor, q_start: int) -> tuple[QueryGroup, ...]:
        if q.shape[2] == 0:  # a rank without heads
            return ()
        return query_groups(
            q_start,
            q_start + q.shape[1],
            num_frames=self.num_frames,
            frame_tokens=self.frame_tokens,
            window_frames=self.window_frames,
        )

    def _check_cover(self, group: QueryGroup, k_start: int, k_stop: int) -> None:
        if group.k_start < k_start or group.k_stop > k_stop:
            raise ValueError(
                f"keys [{k_start}, {k_stop}) do not cover the window [{group.k_start}, {group.k_stop}) of the "
                f"queries [{group.q_start}, {group.q_stop})"
            )

    def _attend(
        self,
        kernel: Kernel,
        group: QueryGroup,
        qkv: tuple[Tensor, Tensor, Tensor],
        starts: tuple[int, int],
        *,
        length: int,
    ) -> Iterator[tuple[Place, Tensor, Tensor]]:
        """One dense call per batch item: entry i sees keys [starts[1] + i * k_step, + length), as a strided view.

        Yields where the part belongs, (item, rows), its out [rows, N, D] and its lse [rows, N].
        """
        q, *kv = qkv
        rows = slice(group.q_start - starts[0], group.q_stop - starts[0])
        span = slice(starts[1], starts[1] + (group.batch - 1) * group.k_step + length)
        for item in range(q.shape[0]):
            # Overlapping windows: the batch stride is one entry, so no key is copied.
            k_bnkd, v_bnkd = (x[item, span].unfold(0, length, group.k_step).transpose(-1, -2) for x in kv)
            q_bnsd = q[item, rows].unflatten(0, (group.batch, group.q_tokens)).transpose(1, 2)
            if self.of_scene or self.window_frames < self.num_frames:  # native length is one plain call
                q_bnsd = _pad_rows(q_bnsd, 2)
            part, part_lse = (x[:, :, : group.q_tokens] for x in kernel(q_bnsd, k_bnkd, v_bnkd))
            yield (item, rows), part.transpose(1, 2).flatten(0, 1), part_lse.transpose(1, 2).flatten(0, 1)


@torch.library.custom_op("freespec::dense", mutates_args=())
def dense_op(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """`WindowedAttention.dense` as an operator; `kernel` is a key of freespec.kernels."""
    out, lse = dense_part(kernel_at(kernel), q, k, v)
    return out.contiguous(), lse.contiguous()


def table_of(frames: Sequence[Sequence[int]]) -> Tensor:
    """The frames that each frame sees, as `WindowedAttention.frames` takes them: [F, A] int64 on the CPU, padded with -1."""
    most = max(map(len, frames))
    return torch.tensor([[*seen, *[-1] * (most - len(seen))] for seen in frames], device="cpu")


def frames_of(x: Tensor, frames: Sequence[int], frame_tokens: int) -> Tensor:
    """The tokens of these frames, ascending, of x [B, S, N, D]: a view if they are side by side."""
    if frames[-1] - frames[0] == len(frames) - 1:
        return x[:, frames[0] * frame_tokens : (frames[-1] + 1) * frame_tokens]
    return x.unflatten(1, (-1, frame_tokens))[:, list(frames)].flatten(1, 2)


@torch.library.custom_op("freespec::frames", mutates_args=())
def frames_op(  # noqa: PLR0917
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, kernel: str, frame_tokens: int
) -> Tensor:
    """`WindowedAttention.frames` as an operator: a tensor of frames, as numbers would compile every step by itself."""
    attention = _attention_of([seen.shape[0], frame_tokens, seen.shape[0], 0, 0, 0], kernel, kernel)
    return attention.frames(q, k, v, seen).contiguous()


@frames_op.register_fake
def _frames_shapes(  # noqa: PLR0917
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, kernel: str, frame_tokens: int
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("freespec::local", mutates_args=())
def local_op(q: Tensor, k: Tensor, v: Tensor, kernel: str, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """`WindowedAttention.local` as an operator; `numbers` are the geometry, and where q and k begin."""
    out, lse = _attention_of(numbers, kernel, kernel).local(q, k, v, *numbers[4:])
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("freespec::branches", mutates_args=())
def dual_op(  # noqa: PLR0917 - operators have no keyword-only arguments
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: Sequence[Tensor],
    kernel: str,
    rest_kernel: str,
    numbers: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`WindowedAttention.dual` as an operator: out and lse of the local branch, and of both sets of keys in `dtype`; no `far`: ()."""
    attention = _attention_of(numbers, kernel, rest_kernel)
    local, o_global = attention.dual(q, k, v, *numbers[4:], dtype=dtype, far=(far[0], far[1]) if far else None)
    return local[0].contiguous(), local[1].contiguous(), o_global[0].contiguous(), o_global[1].contiguous()


@dense_op.register_fake
def _dense_shapes(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _lse_shape(q)


@local_op.register_fake
def _local_shapes(q: Tensor, k: Tensor, v: Tensor, kernel: str, numbers: list[int]) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _lse_shape(q)


@dual_op.register_fake
def _dual_shapes(  # noqa: PLR0917
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: Sequence[Tensor],
    kernel: str,
    rest_kernel: str,
    numbers: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), _lse_shape(q), q.new_empty(q.shape, dtype=dtype), _lse_shape(q)


def _lse_shape(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _attention_of(numbers: list[int], kernel: str, rest_kernel: str) -> WindowedAttention:
    frames, frame_tokens, window_frames, of_scene, _, _ = numbers
    return WindowedAttention(
        num_frames=frames,
        frame_tokens=frame_tokens,
        window_frames=window_frames,
        kernel=kernel_at(kernel),
        rest_kernel=kernel_at(rest_kernel),
        of_scene=bool(of_scene),
    )


def masked_ref(q: Tensor, k: Tensor, v: Tensor, *, frame_tokens: int, window_frames: int | None) -> Tensor:
    """Reference of either branch on the whole sequence in fp64, by an explicit mask; `window_frames=None`: global."""
    num_tokens = q.shape[1]
    frame = torch.arange(num_tokens, device=q.device) // frame_tokens
    num_frames = num_tokens // frame_tokens
    logits = torch.einsum("bsnd,bknd->bnsk", q.double(), k.double()) / q.shape[-1] ** 0.5
    if window_frames is not None and window_frames < num_frames:
        start = (frame - window_frames // 2).clamp(0, num_frames - window_frames)
        inside = (frame >= start[:, None]) & (frame < start[:, None] + window_frames)
        logits = logits.masked_fill(~inside, float("-inf"))
    return torch.einsum("bnsk,bknd->bsnd", logits.softmax(dim=-1), v.double())


def thinned_ref(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, *, frame_tokens: int, window_frames: int) -> Tensor:
    """Reference of the global branch on the whole sequence in fp64, with an explicit weight for each query and key.

    A key in the query's window weighs 1. Of the others those of the tokens `kept`, [F·m], weigh frame_tokens / m, and the rest nothing.
    """
    num_tokens = q.shape[1]
    frame = torch.arange(num_tokens, device=q.device) // frame_tokens
    start = (frame - window_frames // 2).clamp(0, max(num_tokens // frame_tokens - window_frames, 0))
    inside = (frame >= start[:, None]) & (frame < start[:, None] + window_frames)
    outside = torch.zeros(num_tokens, dtype=torch.float64, device=q.device)
    outside[kept] = num_tokens / len(kept)
    weight = torch.where(inside, 1.0, outside)
    logits = torch.einsum("bsnd,bknd->bnsk", q.double(), k.double()) / q.shape[-1] ** 0.5
    weighed = weight * (logits - logits.amax(-1, keepdim=True)).exp()
    return torch.einsum("bnsk,bknd->bsnd", weighed / weighed.sum(-1, keepdim=True), v.double())


def _circle(x: Tensor, start: int, wrapped: int) -> Tensor:
    """Tokens [start, end) followed by [0, wrapped), copied only if both are needed."""
    if wrapped == 0:
        return x[:, start:]
    if start == x.shape[1]:
        return x[:, :wrapped]
    return torch.cat((x[:, start:], x[:, :wrapped]), dim=1)


def _pad_rows(q: Tensor, dim: int) -> Tensor:
    """On a CPU queries in whole units along `dim`, so that a row's bits do not depend on the rows beside it."""
    padding = -q.shape[dim] % CPU_ROWS if q.device.type == "cpu" else 0
    return torch.nn.functional.pad(q, (0, 0) * (q.ndim - 1 - dim) + (0, padding)) if padding else q


def dense_part(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """Every query and every key: out [B, S, N, D], lse [B, S, N]."""
    if q.shape[1] == 0 or k.shape[1] == 0 or q.shape[2] == 0:
        return _empty_keys(q)
    out, lse = kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2), lse.transpose(1, 2)


def _empty_keys(q: Tensor) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"), dtype=lse_dtype, device=q.device)
