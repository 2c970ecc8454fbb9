"""Tensors between ranks: heads against tokens, gathers, halo, ring, ordered sum. Each takes the group it uses.

Sizes are integers that all ranks know (see shards.py), so they may be uneven or zero: a rank without
tokens or heads takes part with empty tensors, and point-to-point messages of no bytes are not sent on either side.
Shapes: B batch, N heads, D head dim, S all tokens; s tokens of this rank, r tokens of its ring shard, n heads of this
rank; h tokens of its halo, which include its own. Keys and values travel packed as kv [tokens, 2, B, n, D]: with the
tokens first, any range of them is one contiguous message.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.shards import Range, halo_receives, halo_sends, length, ring_order

# torch 2.13 has a new name for it, and warns of the old one.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


class CollectiveError(RuntimeError):
    """A collective that timed out or lost a peer: which rank noticed, in which operation, and what the caller was doing."""

    def __init__(self, rank: int, label: str, operation: str, ranks: tuple[int, ...], reason: str) -> None:
        super().__init__(rank, label, operation, ranks, reason)  # all arguments, so that the error can be pickled
        self.rank = rank
        self.label = label
        self.operation = operation
        self.ranks = ranks
        self.reason = reason

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.label}: {self.operation} among ranks {list(self.ranks)} failed: {self.reason}"


def ignore_call(operation: str, label: object) -> AbstractContextManager[None]:
    """Do not follow calls: those of gloo return when they are done, or raise."""
    return nullcontext()


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveTrace:
    """How a collective is reported: `label` names the caller's step and layer, `on_bytes` receives (kind, bytes sent).

    The label is formatted only for an error. Bytes that a rank keeps are not counted. `on_call` gives a context around every call of
    (operation, label): parallel/monitor.py.
    """

    label: object
    on_bytes: Callable[[str, int], None]
    on_call: Callable[[str, object], AbstractContextManager[None]] = ignore_call


def ignore_bytes(kind: str, num_bytes: int) -> None:
    """Do not count bytes."""


@contextmanager
def watch(operation: str, *, group: dist.ProcessGroup, trace: CollectiveTrace) -> Iterator[None]:
    """Turn the backend's errors (gloo and NCCL raise RuntimeError and its subclasses) into one CollectiveError.

    On NCCL an error of a finished call may surface in a later one: its watchdog, not this, ends a hung kernel.
    """
    following = nullcontext() if torch.compiler.is_compiling() else trace.on_call(operation, trace.label)
    try:
        with following:
            yield
    except RuntimeError as error:
        ranks = tuple(dist.get_process_group_ranks(group))
        raise CollectiveError(ranks[dist.get_rank(group)], str(trace.label), operation, ranks, str(error)) from error


def barrier(*, group: dist.ProcessGroup, device: torch.device, trace: CollectiveTrace) -> None:
    """Wait for every rank of the group, by a sum of one number, since NCCL's barrier guesses a device.

    A group of one rank returns at once: NCCL would create a communicator, with its memory on the device.
    """
    if dist.get_world_size(group) == 1:
        return
    number = torch.ones(1, device=device)
    with watch("meeting", group=group, trace=trace):
        dist.all_reduce(number, group=group)
        number.item()  # on a GPU the call returns before the others have come; this does not


def tokens_to_heads(
    tensors: Sequence[Tensor],
    *,
    token_sizes: Sequence[int],
    head_sizes: Sequence[int],
    group: dist.ProcessGroup,
    trace: CollectiveTrace,
) -> tuple[Tensor, ...]:
    """Each [B, s, N, D] -> [B, r, n, D], all in one all-to-all: out[:, tokens of i] = (in of rank i)[:, :, my heads].

    q, k and v go together because one large message is faster than three.
    """
    if dist.get_world_size(group) == 1:  # alone, every token and every head is already here
        return tuple(tensors)
    parts, shapes = _by_head_share(tensors, token_sizes, head_sizes, dist.get_rank(group))
    return torch.cat(_all_to_all(parts, shapes, group=group, trace=trace), dim=2).unbind(0)


def start_tokens_to_heads(
    x_BsND: Tensor,
    *,
    token_sizes: Sequence[int],
    head_sizes: Sequence[int],
    group: dist.ProcessGroup,
    trace: CollectiveTrace,
) -> Callable[[], Tensor]:
    """`tokens_to_heads` of one tensor, under way when this returns: what is computed next hides it.

    Call the result to wait for [B, r, n, D], once. Every rank must start its collectives in the same order.
    """
    if dist.get_world_size(group) == 1:
        return lambda: x_BsND
    parts, shapes = _by_head_share([x_BsND], token_sizes, head_sizes, dist.get_rank(group))
    arriving, work = _start_all_to_all(parts, shapes, group=group, trace=trace)

    def wait() -> Tensor:
        with watch("all-to-all", group=group, trace=trace):
            _wait([work])
        return torch.cat(arriving, dim=2).squeeze(0)

    return wait


def heads_to_tokens(
    x_BrnD: Tensor,
    *,
    token_sizes: Sequence[int],
    head_sizes: Sequence[int],
    group: dist.ProcessGroup,
    trace: CollectiveTrace,
) -> Tensor:
    """[B, r, n, D] -> [B, s, N, D], the inverse: out[:, :, heads of i] = (in of rank i)[:, my tokens]."""
    if dist.get_world_size(group) == 1:
        return x_BrnD
    batch, _, _, head_dim = x_BrnD.shape
    num_tokens = token_sizes[dist.get_rank(group)]
    parts = [[x_BrnD[:, a:b]] for a, b in _spans(token_sizes)]
    shapes = [(batch, num_tokens, num_heads, head_dim) for num_heads in head_sizes]
    return torch.cat(_all_to_all(parts, shapes, group=group, trace=trace), dim=2)


def gather_tokens(
    x_BsC: Tensor, kind: str = "gather", *, token_sizes: Sequence[int], group: dist.ProcessGroup, trace: CollectiveTrace
) -> Tensor:
    """[B, s, ...] -> [B, S, ...] on every rank: out[:, tokens of i] = in of rank i. Bytes are counted as `kind`.

    all_gather wants equal sizes, so shards are padded to the largest, which balanced shards miss by eight tokens at most.
    """
    if dist.get_world_size(group) == 1:
        return x_BsC
    if min(token_sizes) == max(token_sizes):
        return _all_gather(x_BsC.contiguous(), kind, group=group, trace=trace).transpose(0, 1).flatten(1, 2)
    padded = x_BsC.new_zeros(x_BsC.shape[0], max(token_sizes), *x_BsC.shape[2:])
    padded[:, : x_BsC.shape[1]] = x_BsC
    gathered = _all_gather(padded, kind, group=group, trace=trace).unbind(0)
    return torch.cat([part[:, :size] for part, size in zip(gathered, token_sizes, strict=True)], dim=1)


def gather_copies(x: Tensor, kind: str, *, group: dist.ProcessGroup, trace: CollectiveTrace) -> tuple[Tensor, ...]:
    """Any shape -> one tensor of that shape per rank of the group, in rank order, the same on every rank."""
    if dist.get_world_size(group) == 1:
        return (x,)
    return _all_gather(x.contiguous(), kind, group=group, trace=trace).unbind(0)


def sum_over_ranks(x: Tensor, *, group: dist.ProcessGroup, trace: CollectiveTrace) -> Tensor:
    """Any shape -> the same shape: out = x_0 + x_1 + ..., added in rank order on every rank.

    Gathered and then added, not all-reduced: with a fixed order every rank, and every run, gets the same bits.
    """
    first, *others = gather_copies(x, "reduce", group=group, trace=trace)
    for other in others:
        first = first + other
    return first


def max_over_ranks(x: Tensor, *, group: dist.ProcessGroup, trace: CollectiveTrace) -> Tensor:
    """Any shape -> the same shape: the largest of all ranks, entry by entry."""
    return torch.stack(gather_copies(x, "reduce", group=group, trace=trace)).amax(0)


def broadcast(x: Tensor, *, source: int, group: dist.ProcessGroup, trace: CollectiveTrace) -> Tensor:
    """Any shape, the same on all ranks -> out = x of the group's rank `source`, written into x on the others."""
    size = dist.get_world_size(group)
    if size == 1:
        return x
    with watch("broadcast", group=group, trace=trace):
        dist.broadcast(x, group=group, group_src=source)
    trace.on_bytes("broadcast", x.nbytes * (size - 1) if dist.get_rank(group) == source else 0)
    return x


def collect(
    x: Tensor, *, sizes: Sequence[int], target: int, group: dist.ProcessGroup, trace: CollectiveTrace
) -> list[Tensor]:
    """[size of this rank] -> on the group's rank `target` the [size] of every rank, in rank order; on the others nothing.

    Messages of the sizes that they have: one rank needs them, and an all-gather would pad them and give them to all.
    """
    rank = dist.get_rank(group)
    parts = [x if peer == rank else x.new_empty(size) for peer, size in enumerate(sizes)] if rank == target else []
    receives = [(peer, part) for peer, part in enumerate(parts) if peer != rank]
    sends = [] if rank == target else [(target, x)]
    with watch("collecting", group=group, trace=trace):
        _wait(_start_messages("collect", sends, receives, group=group, trace=trace))
    return parts


def pack_keys(k_BrnD: Tensor, v_BrnD: Tensor) -> Tensor:
    """k, v [B, r, n, D] -> kv [r, 2, B, n, D]."""
    return torch.stack((k_BrnD.transpose(0, 1), v_BrnD.transpose(0, 1)), dim=1)


def unpack_keys(kv: Tensor) -> tuple[Tensor, Tensor]:
    """kv [r, 2, B, n, D] -> views k, v [B, r, n, D]."""
    k, v = kv.unbind(1)
    return k.transpose(0, 1), v.transpose(0, 1)


def exchange_halo(
    k_BrnD: Tensor,
    v_BrnD: Tensor,
    *,
    owned: Sequence[Range],
    needed: Sequence[Range],
    group: dist.ProcessGroup,
    trace: CollectiveTrace,
) -> Tensor:
    """k, v [B, r, n, D] of the tokens owned[rank] -> kv [h, 2, B, n, D] of the tokens needed[rank].

    kv[t - start] = (k, v)[t] of whichever rank owns token t. needed[rank] contains owned[rank] (shards.halo_needs checks):
    own keys are copied to their place, sent from there, and others are received beside them, with no further buffer.
    """
    rank = dist.get_rank(group)
    start = needed[rank][0]
    batch, _, num_heads, head_dim = k_BrnD.shape
    kv = k_BrnD.new_empty(length(needed[rank]), 2, batch, num_heads, head_dim)

    def place(span: Range) -> Tensor:
        return kv[span[0] - start : span[1] - start]

    own_k, own_v = place(owned[rank]).unbind(1)
    own_k.copy_(k_BrnD.transpose(0, 1))
    own_v.copy_(v_BrnD.transpose(0, 1))
    sends = [(send.peer, place(send.span)) for send in halo_sends(owned, needed, rank)]
    receives = [(receive.peer, place(receive.span)) for receive in halo_receives(owned, needed, rank)]
    with watch("halo exchange", group=group, trace=trace):
        _wait(_start_messages("halo", sends, receives, group=group, trace=trace))
    return kv


class RingShift:
    """Walk the keys of all other ring members: yields (owner, kv [r of owner, 2, B, n, D]), nearest predecessor first.

    Blocks travel to the next rank; step i yields the block of rank - i. The next transfer is under way before a block
    is yielded, and the first one before the constructor returns, so that the caller's attention hides it. There are two
    buffers: a block is valid until the next one is asked for.
    """

    def __init__(
        self, own_kv: Tensor, *, sizes: Sequence[int], group: dist.ProcessGroup, trace: CollectiveTrace
    ) -> None:
        self._group, self._trace, self._sizes = group, trace, sizes
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._owners = ring_order(self._rank, self._size)
        self._step = 0
        self._buffers: list[Tensor] = []
        self._works: list[dist.Work] = []
        self._incoming = own_kv
        self._pass_on(own_kv)

    def __iter__(self) -> "RingShift":
        return self

    def __next__(self) -> tuple[int, Tensor]:
        if self._step == len(self._owners):
            raise StopIteration
        with watch("ring shift", group=self._group, trace=self._trace):
            _wait(self._works)
        self._works = []  # they hold the block that was sent, which may be freed now
        owner, arrived = self._owners[self._step], self._incoming
        self._step += 1
        self._pass_on(arrived)
        return owner, arrived

    def _pass_on(self, kv: Tensor) -> None:
        """Start sending `kv` to the next rank and receiving the block after it; nothing once all blocks have come."""
        if self._step == len(self._owners):
            return
        if len(self._buffers) < 2:
            self._buffers.append(kv.new_empty(max(self._sizes), *kv.shape[1:]))
        self._incoming = self._buffers[self._step % 2][: self._sizes[self._owners[self._step]]]
        sends = [((self._rank + 1) % self._size, kv)]
        receives = [((self._rank - 1) % self._size, self._incoming)]
        with watch("ring shift", group=self._group, trace=self._trace):
            self._works = _start_messages("ring", sends, receives, group=self._group, trace=self._trace)


def _spans(sizes: Sequence[int]) -> list[Range]:
    return list(pairwise(accumulate(sizes, initial=0)))


def _by_head_share(
    tensors: Sequence[Tensor], token_sizes: Sequence[int], head_sizes: Sequence[int], rank: int
) -> tuple[list[list[Tensor]], list[tuple[int, ...]]]:
    """What each rank is sent of tensors [B, s, N, D], and the shape of what it sends: [tensors, B, its tokens, n, D]."""
    batch, _, _, head_dim = tensors[0].shape
    parts = [[x[:, :, a:b] for x in tensors] for a, b in _spans(head_sizes)]
    return parts, [(len(tensors), batch, num_tokens, head_sizes[rank], head_dim) for num_tokens in token_sizes]


def _all_to_all(
    parts: Sequence[Sequence[Tensor]],
    shapes: Sequence[tuple[int, ...]],
    *,
    group: dist.ProcessGroup,
    trace: CollectiveTrace,
) -> list[Tensor]:
    """Send parts[i], one after the other, to rank i; what rank i sent comes back as a tensor of shapes[i]."""
    return _start_all_to_all(parts, shapes, group=group, trace=trace, async_op=False)[0]


def _start_all_to_all(
    parts: Sequence[Sequence[Tensor]],
    shapes: Sequence[tuple[int, ...]],
    *,
    group: dist.ProcessGroup,
    trace: CollectiveTrace,
    async_op: bool = True,
) -> tuple[list[Tensor], dist.Work]:
    """`_all_to_all` under way: its results are ready once the work is done, which keeps the sent tensors alive."""
    first = parts[0][0]
    send_splits = [sum(x.numel() for x in part) for part in parts]
    receive_splits = [torch.Size(shape).numel() for shape in shapes]
    send, received = first.new_empty(sum(send_splits)), first.new_empty(sum(receive_splits))
    flat = [x for part in parts for x in part]
    for room, x in zip(send.split([x.numel() for x in flat]), flat, strict=True):
        room.view(x.shape).copy_(x)
    with watch("all-to-all", group=group, trace=trace):
        work = dist.all_to_all_single(received, send, receive_splits, send_splits, group=group, async_op=async_op)
    kept = send_splits[dist.get_rank(group)]
    trace.on_bytes("all_to_all", (send.numel() - kept) * send.element_size())
    return [room.view(shape) for room, shape in zip(received.split(receive_splits), shapes, strict=True)], work


def _all_gather(x: Tensor, kind: str, *, group: dist.ProcessGroup, trace: CollectiveTrace) -> Tensor:
    """Any shape -> [P, ...], x of every rank in rank order: one tensor, as NCCL would copy a list of them once more."""
    size = dist.get_world_size(group)
    gathered = x.new_empty(size, *x.shape)
    if x.numel() == 0:  # as everywhere in the group
        return gathered
    with watch(f"all-gather ({kind})", group=group, trace=trace):
        getattr(dist, ALL_GATHER)(gathered.view(-1, *x.shape[1:]), x.view(x.shape or (1,)), group=group)
    trace.on_bytes(kind, x.numel() * x.element_size() * (size - 1))
    return gathered


def _start_messages(
    kind: str,
    sends: Sequence[tuple[int, Tensor]],
    receives: Sequence[tuple[int, Tensor]],
    *,
    group: dist.ProcessGroup,
    trace: CollectiveTrace,
) -> list[dist.Work]:
    """Start point-to-point messages (group rank of the peer, contiguous tensor), empty ones left out on both sides."""
    ops = [dist.P2POp(dist.isend, x, group=group, group_peer=peer) for peer, x in sends if x.numel()]
    ops += [dist.P2POp(dist.irecv, x, group=group, group_peer=peer) for peer, x in receives if x.numel()]
    works = dist.batch_isend_irecv(ops) if ops else []
    trace.on_bytes(kind, sum(x.numel() * x.element_size() for _, x in sends))
    return works


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()
