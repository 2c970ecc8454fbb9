"""Self-attention over ranks: a sequence layout, and both branches of it in any layout, around kernels that are passed in.

    q, k, v [B, s, N, D] --scatter--> [B, r, n, D] --branches--> local, global [B, r, n, D] --gather--> [B, s, N, D]

scatter and gather cross the ulysses axis (heads against tokens); branches cross the ring axis (halo, then ring).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import collectives
from parallel.collectives import CollectiveTrace, RingShift, exchange_halo, pack_keys, unpack_keys
from parallel.mesh import SeqMesh
from parallel.shards import Mode, Range, SequencePlan, halo_needs, length, split_ranges, subtract

Partial = tuple[Tensor, Tensor]  # attention over some of the keys: out [B, s, n, D], lse [B, s, n]


class BranchKernels(Protocol):
    """Attention over given keys: out in the dtype of q, lse the natural log-sum-exp in fp32 (fp64 for fp64).

    No keys give out = 0, lse = -inf. `q_start` and `k_start` are the absolute tokens that q and k, v begin with. k and v
    may be strided views whose last dimension alone is contiguous.
    """

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """Every query sees every key of k."""
        ...

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output of `dense` alone, where k and v are all keys of the sequence."""
        ...

    def far(self, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """`dense` over keys outside every query's window, beside a local branch; it may be less exact."""
        ...

    def local(self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int) -> Partial:
        """Every query sees its own window, which k and v cover."""
        ...

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
        """Both branches in one call: windows, and all keys of k; the latter's out in `dtype`.

        With `far`, k and v of the same number of tokens of every frame, these stand in for the keys outside the windows.
        """
        ...

    def merge_into(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        """Merge attention over some keys with a part over others, written over out and lse."""
        ...

    def halo(self, q_start: int, q_stop: int) -> Range:
        """Tokens that the windows of the queries [q_start, q_stop) hold; an empty range for no queries."""
        ...


class HeadExchange(Protocol):
    """A provider of the two exchanges across the ulysses axis, as parallel.collectives defines them."""

    def tokens_to_heads(
        self,
        tensors: Sequence[Tensor],
        *,
        token_sizes: Sequence[int],
        head_sizes: Sequence[int],
        group: dist.ProcessGroup,
        trace: CollectiveTrace,
    ) -> tuple[Tensor, ...]:
        """Each [B, s, N, D] -> [B, r, n, D]."""
        ...

    def heads_to_tokens(
        self,
        x_BrnD: Tensor,
        *,
        token_sizes: Sequence[int],
        head_sizes: Sequence[int],
        group: dist.ProcessGroup,
        trace: CollectiveTrace,
    ) -> Tensor:
        """[B, r, n, D] -> [B, s, N, D]."""
        ...


class HybridAttention(Protocol):
    """A provider of scatter, global branch and gather in one."""

    def __call__(self, q_BsND: Tensor, k_BsND: Tensor, v_BsND: Tensor, *, layout: "SequenceLayout") -> Tensor:
        """[B, s, N, D] of this rank's tokens -> [B, s, N, D]: every query sees every key of the sequence."""
        ...


TORCH_EXCHANGE: HeadExchange = collectives


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptTokens:
    """The tokens that stand in for all keys outside the windows, the same number in every frame.

    Attributes:
        index: their places in the sequence, ascending, [F·m].
        cuts: where in the index the tokens of each ring shard begin, and its length.
    """

    index: Tensor
    cuts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Keys:
    """Keys and values [B, tokens, n, D] of a contiguous range of absolute tokens."""

    k: Tensor
    v: Tensor
    span: Range


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceLayout:
    """How one video's tokens and heads lie over the ranks of a mesh, and how tensors move between them.

    With `gathers_keys` each member of a ring gathers all keys of its heads before it attends, instead of passing blocks on. This costs
    memory and gives the same bits on any ring, provided that kernels compute a row of queries equally in any call.
    """

    mesh: SeqMesh
    plan: SequencePlan
    exchange: HeadExchange
    trace: CollectiveTrace
    gathers_keys: bool = False

    def __post_init__(self) -> None:
        if (self.mesh.ring.size, self.mesh.ulysses.size) != (self.plan.ring, self.plan.ulysses):
            raise ValueError(
                f"a plan for ring {self.plan.ring} x ulysses {self.plan.ulysses} on a mesh of "
                f"ring {self.mesh.ring.size} x ulysses {self.mesh.ulysses.size}"
            )

    def on_shards(self) -> "SequenceLayout":
        """The same shards with all heads on every rank: local steps by halo alone, scatter and gather do nothing."""
        return replace(self, mesh=self.mesh.on_shards(), plan=self.plan.on_shards(), exchange=TORCH_EXCHANGE)

    @property
    def shard(self) -> Range:
        """Tokens of this rank outside attention."""
        return self.plan.shards[self.mesh.sequence.rank]

    @property
    def ring_shard(self) -> Range:
        """Tokens of this rank inside attention."""
        return self.plan.ring_shards[self.mesh.ring.rank]

    @property
    def head_share(self) -> Range:
        """Heads of this rank inside attention."""
        return self.plan.head_shares[self.mesh.ulysses.rank]

    def shard_tokens(self, x: Tensor, *, dim: int) -> Tensor:
        """This rank's tokens of a whole sequence, as a view: [..., S, ...] -> [..., s, ...]."""
        if x.shape[dim] != self.plan.tokens:
            raise ValueError(f"dim {dim} of {tuple(x.shape)} is not the planned sequence of {self.plan.tokens} tokens")
        return x.narrow(dim, self.shard[0], length(self.shard))

    def gather_tokens(self, x_BsC: Tensor) -> Tensor:
        """The whole sequence on every rank: [B, s, C] -> [B, S, C]."""
        sizes = [length(shard) for shard in self.plan.shards]
        return collectives.gather_tokens(x_BsC, token_sizes=sizes, group=self.mesh.sequence.group, trace=self.trace)

    @property
    def sends_early(self) -> bool:
        """Whether v is sent before q and k: if heads are split and the exchange is torch's."""
        return self.mesh.ulysses.size > 1 and self.exchange is TORCH_EXCHANGE

    def start_scatter(self, v_BsND: Tensor) -> Callable[[], Tensor]:
        """Start `scatter` of v, overlapped with the rotation of q and k; call the result to get [B, r, n, D]."""
        tokens, heads = self._exchange_sizes()
        return collectives.start_tokens_to_heads(
            v_BsND, token_sizes=tokens, head_sizes=heads, group=self.mesh.ulysses.group, trace=self.trace
        )

    def scatter(self, q_BsND: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """q and k, or q, k, v [B, s, N, D] -> [B, r, n, D], one exchange that feeds both branches."""
        if q_BsND.shape[1:3] != (length(self.shard), self.plan.heads):
            raise ValueError(
                f"q {tuple(q_BsND.shape)} is not [B, {length(self.shard)}, {self.plan.heads}, D] of tokens {self.shard}"
            )
        tokens, heads = self._exchange_sizes()
        return self.exchange.tokens_to_heads(
            (q_BsND, *others),
            token_sizes=tokens,
            head_sizes=heads,
            group=self.mesh.ulysses.group,
            trace=self.trace,
        )

    def gather(self, out_BrnD: Tensor) -> Tensor:
        """[B, r, n, D] -> [B, s, N, D]: the inverse of scatter, for one tensor."""
        tokens, heads = self._exchange_sizes()
        return self.exchange.heads_to_tokens(
            out_BrnD, token_sizes=tokens, head_sizes=heads, group=self.mesh.ulysses.group, trace=self.trace
        )

    def thinned_branches(
        self, q_BrnD: Tensor, k_BrnD: Tensor, v_BrnD: Tensor, kept: KeptTokens, kernels: BranchKernels
    ) -> tuple[Tensor, Tensor]:
        """`branches` of mode dual, [B, r, n, D] each, with the kept tokens in place of all keys outside the windows.

        Every rank of a ring has the windows by halo and gathers the kept tokens, in the order of one rank: the same calls.
        """
        near, _ = self._near_and_far(k_BrnD, v_BrnD, "local", kernels)
        far = self._gather_kept(k_BrnD, v_BrnD, kept)
        if q_BrnD.numel() == 0:
            return q_BrnD, q_BrnD
        (local, _), (out, _) = kernels.dual(
            q_BrnD, near.k, near.v, self.ring_shard[0], near.span[0], dtype=q_BrnD.dtype, far=far
        )
        return local, out

    def branches(
        self, q_BrnD: Tensor, k_BrnD: Tensor, v_BrnD: Tensor, mode: Mode, kernels: BranchKernels
    ) -> tuple[Tensor | None, Tensor | None]:
        """Local and global attention of this rank's queries, [B, r, n, D] each; None for a branch the mode leaves out.

        Near keys (this rank's own; with a local branch its halo, which contains them) are attended while the ring's first
        block is on its way. Far blocks follow in ring order, without the tokens that were near: every key counts once,
        and the order of merging depends on the rank alone, not on timing. Where keys are gathered, or alone, all are near.
        """
        q, start = q_BrnD, self.ring_shard[0]
        near, far = self._near_and_far(k_BrnD, v_BrnD, mode, kernels)
        if q.numel() == 0:  # no tokens or no heads: nothing to attend, but this rank still passes on the others' keys
            for _ in far:
                pass
            return (None if mode == "global" else q), (None if mode == "local" else q)
        complete = near.span == (0, self.plan.tokens)
        if mode == "global" and complete:
            return None, kernels.whole(q, near.k, near.v)
        if mode == "local":
            return kernels.local(q, near.k, near.v, start, near.span[0])[0], None
        # Merged in fp32 at least, if anything is: many bf16 parts add up to one rounding, not to one each.
        out_dtype = q.dtype if complete else torch.promote_types(q.dtype, torch.float32)
        if mode == "dual":
            (local, _), (out, lse) = kernels.dual(q, near.k, near.v, start, near.span[0], dtype=out_dtype)
            attend = kernels.far
        else:
            local, (out, lse) = None, kernels.dense(q, near.k, near.v)
            attend = kernels.dense
            out = out.to(out_dtype)
        for owner, kv in far:
            for keys in _outside(near.span, kv, self.plan.ring_shards[owner]):
                kernels.merge_into(out, lse, *attend(q, keys.k, keys.v))
        return local, out.to(q.dtype)

    def reduce(self, x: Tensor) -> Tensor:
        """Sum over the ring: every token of this rank's heads, the same bits on every rank of the ring."""
        return collectives.sum_over_ranks(x, group=self.mesh.ring.group, trace=self.trace)

    def largest(self, x: Tensor) -> Tensor:
        """Maximum over the ring, entry by entry, on every rank of the ring."""
        return collectives.max_over_ranks(x, group=self.mesh.ring.group, trace=self.trace)

    def share_heads(self, function: Callable[..., Tensor], *matrices_BnDD: Tensor) -> Tensor:
        """Apply `function` to matrices [B, n, D, D] that all members of the ring hold: each computes a share, all get the results.

        The function handles items and heads independently: a member calls it with some of them, [1, some, D, D], possibly none.
        """
        ring = self.mesh.ring
        if ring.size == 1:
            return function(*matrices_BnDD)
        shape = matrices_BnDD[0].shape
        shares = split_ranges(shape[0] * shape[1], ring.size)
        own = slice(*shares[ring.rank])
        found = function(*(matrices.flatten(0, 1)[None, own] for matrices in matrices_BnDD))
        sizes = [length(share) for share in shares]
        found = collectives.gather_tokens(found, "reduce", token_sizes=sizes, group=ring.group, trace=self.trace)
        return found.view(shape)

    def sum_heads(self, x: Tensor) -> Tensor:
        """Sum over the ulysses axis: what was added up over this rank's heads becomes the sum over all heads."""
        return collectives.sum_over_ranks(x, group=self.mesh.ulysses.group, trace=self.trace)

    def cfg_exchange(self, prediction: Tensor) -> tuple[Tensor, ...]:
        """One prediction per rank of the cfg axis -> all of them, in the order of the axis, on every rank."""
        return collectives.gather_copies(prediction, "cfg", group=self.mesh.cfg.group, trace=self.trace)

    def _exchange_sizes(self) -> tuple[list[int], list[int]]:
        members = self.plan.member_shards(self.mesh.ring.rank)
        return [length(shard) for shard in members], [length(share) for share in self.plan.head_shares]

    def _gather_kept(self, k: Tensor, v: Tensor, kept: KeptTokens) -> tuple[Tensor, Tensor]:
        """k and v of the kept tokens of all shards, [B, F·m, n, D]."""
        ring = self.mesh.ring
        if ring.size == 1:
            return k.index_select(1, kept.index), v.index_select(1, kept.index)
        own = kept.index[kept.cuts[ring.rank] : kept.cuts[ring.rank + 1]] - self.ring_shard[0]
        kv = pack_keys(k.index_select(1, own), v.index_select(1, own))[None]
        sizes = [stop - start for start, stop in pairwise(kept.cuts)]
        kv = collectives.gather_tokens(kv, "far", token_sizes=sizes, group=ring.group, trace=self.trace)
        return unpack_keys(kv[0])

    def _near_and_far(
        self, k: Tensor, v: Tensor, mode: Mode, kernels: BranchKernels
    ) -> tuple[_Keys, Iterable[tuple[int, Tensor]]]:
        """Keys available before the ring turns, and the ring's blocks; the first is already being sent.

        The halo goes before the ring: the near attention waits for it, and both use the same links.
        """
        ring, shards = self.mesh.ring, self.plan.ring_shards
        sizes = [length(shard) for shard in shards]
        if ring.size == 1:  # every key is here, so only the check that windows and plan agree is left of the halo
            halo_needs(shards, kernels.halo, self.plan.tokens)
            return _Keys(k, v, self.ring_shard), ()
        if self.gathers_keys and mode != "local":
            own = pack_keys(k, v)[None]
            kv = collectives.gather_tokens(own, "ring", token_sizes=sizes, group=ring.group, trace=self.trace)[0]
            return _Keys(*unpack_keys(kv), (0, self.plan.tokens)), ()
        if mode == "global":
            near, own_kv = _Keys(k, v, self.ring_shard), pack_keys(k, v)
        else:
            needed = halo_needs(shards, kernels.halo, self.plan.tokens)
            halo_kv = exchange_halo(k, v, owned=shards, needed=needed, group=ring.group, trace=self.trace)
            near = _Keys(*unpack_keys(halo_kv), needed[ring.rank])
            own_kv = halo_kv[self.ring_shard[0] - near.span[0] :][: length(self.ring_shard)]
        if mode == "local":
            return near, ()
        return near, RingShift(own_kv, sizes=sizes, group=ring.group, trace=self.trace)


def _outside(near: Range, kv: Tensor, span: Range) -> Iterator[_Keys]:
    """The tokens of a block kv [r, 2, B, n, D] over `span` that are not among the near ones: up to two views."""
    for start, stop in subtract(span, near):
        yield _Keys(*unpack_keys(kv[start - span[0] : stop - span[0]]), (start, stop))
