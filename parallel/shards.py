"""Who holds, sends and receives what, as integers: token shards, head shares, halos, ring order, bytes. No tensors.

Everything here is a pure function of numbers that all ranks know, so that every rank can work out every other rank's
sizes and no size is ever communicated. A range is (start, stop) in absolute tokens (or heads) of the whole sequence.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

Range = tuple[int, int]
Mode = Literal["local", "global", "dual"]
Route = Literal["all_to_all", "halo"]
HaloRange = Callable[[int, int], Range]  # queries [q_start, q_stop) -> tokens that their windows hold

# Rows of a matrix beyond whole units use other CPU kernels, whose sums differ in the last bits: the last one or two of four on
# most CPUs, the last seven of eight on Intel's with AVX-512.
ROWS = 8
SHORT_SHARD = 2 * ROWS  # tokens; below, a unit would be much of a shard
GRAM_ITEMSIZE = 8  # Gram matrices travel in fp64
GRAMS_PER_HEAD = 2  # one of the local branch, one of the global branch


def split_range(total: int, parts: int, index: int, unit: int = 1) -> Range:
    """Part `index` of `total` items in `parts` contiguous parts whose sizes differ by at most one unit.

    A unit is `unit` items, the last one what is left. The cut i·units // parts nests: `ulysses` neighbouring parts out of
    ring·ulysses are exactly one part out of ring.
    """
    units = -(-total // unit)
    start, stop = (unit * (at * units // parts) for at in (index, index + 1))
    return min(start, total), min(stop, total)


def split_ranges(total: int, parts: int, unit: int = 1) -> tuple[Range, ...]:
    """All parts of `split_range`, in order."""
    return tuple(split_range(total, parts, index, unit) for index in range(parts))


def token_unit(tokens: int, ranks: int, *, even: bool = False) -> int:
    """Tokens that shards are cut at multiples of: 1 for short shards, and where shards must be `even`."""
    return 1 if even or tokens < SHORT_SHARD * ranks else ROWS


def length(span: Range) -> int:
    """Number of items in a range."""
    return span[1] - span[0]


def overlap(a: Range, b: Range) -> Range:
    """What two ranges share; (0, 0) if nothing."""
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else (0, 0)


def subtract(span: Range, hole: Range) -> tuple[Range, ...]:
    """Subtract `hole` from `span`: up to two ranges, in order, none of them empty."""
    if length(overlap(span, hole)) == 0:
        hole = (span[1], span[1])
    pieces = (span[0], min(span[1], hole[0])), (max(span[0], hole[1]), span[1])
    return tuple(piece for piece in pieces if length(piece) > 0)


def refuse_uneven(who: str, tokens: Sequence[int], heads: Sequence[int]) -> None:
    """Raise ValueError unless the ranks' numbers of tokens are equal, and those of heads; `who` can take no others."""
    for name, sizes in (("tokens", tokens), ("heads", heads)):
        if min(sizes) != max(sizes):
            raise ValueError(
                f"{who} takes even shares only, and {sum(sizes)} {name} over {len(sizes)} ranks are not: {_few(sizes)}"
            )


def _few(sizes: Sequence[int]) -> str:
    """The sizes, shortened to fit a line."""
    return str(list(sizes)) if len(sizes) <= 16 else f"{min(sizes)} to {max(sizes)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SequencePlan:
    """S tokens and N heads over ring x ulysses ranks; `rank` below counts ring-major over all of them.

    A rank's shard is its tokens outside attention. The shards of a ulysses group make up the group's ring shard: all
    tokens of it, for a share of the heads, is what a rank holds inside attention. Shards begin at multiples of `unit`.
    """

    tokens: int
    heads: int
    ring: int
    ulysses: int
    unit: int = 1

    def __post_init__(self) -> None:
        if min(self.tokens, self.heads, self.ring, self.ulysses) < 1:
            raise ValueError(
                f"cannot plan {self.tokens} tokens and {self.heads} heads over ring {self.ring} x ulysses {self.ulysses}"
            )

    @property
    def ranks(self) -> int:
        """Number of ranks that share the sequence."""
        return self.ring * self.ulysses

    @property
    def shards(self) -> tuple[Range, ...]:
        """Token range of every rank."""
        return split_ranges(self.tokens, self.ranks, self.unit)

    @property
    def ring_shards(self) -> tuple[Range, ...]:
        """Token range of every ring member, that is of every ulysses group."""
        return split_ranges(self.tokens, self.ring, self.unit)

    @property
    def head_shares(self) -> tuple[Range, ...]:
        """Head range of every ulysses member."""
        return split_ranges(self.heads, self.ulysses)

    def member_shards(self, ring_rank: int) -> tuple[Range, ...]:
        """Token ranges of the ranks of one ulysses group."""
        return self.shards[ring_rank * self.ulysses : (ring_rank + 1) * self.ulysses]

    def on_shards(self) -> "SequencePlan":
        """The same shards with all heads on each: every rank is a ring member, nothing is exchanged for heads."""
        return replace(self, ring=self.ranks, ulysses=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """Tokens `span` that go to or come from the group's rank `peer`."""

    peer: int
    span: Range


def halo_needs(owned: Sequence[Range], halo: HaloRange, tokens: int) -> tuple[Range, ...]:
    """Token range that the windows of each member's queries hold; it contains the member's own tokens."""
    if halo(0, tokens) != (0, tokens):
        raise ValueError(f"the windows cover tokens {halo(0, tokens)} of a sequence planned with {tokens} tokens")
    needed = tuple(halo(*span) for span in owned)
    for own, need in zip(owned, needed, strict=True):
        if overlap(own, need) != own and length(own) > 0:
            raise ValueError(f"the windows {need} of the queries {own} do not hold the queries' own tokens")
    return needed


def halo_sends(owned: Sequence[Range], needed: Sequence[Range], rank: int) -> tuple[Transfer, ...]:
    """Tokens that `rank` sends to each member that needs some of them, in the order of members."""
    shared = ((peer, overlap(owned[rank], need)) for peer, need in enumerate(needed) if peer != rank)
    return tuple(Transfer(peer=peer, span=span) for peer, span in shared if length(span) > 0)


def halo_receives(owned: Sequence[Range], needed: Sequence[Range], rank: int) -> tuple[Transfer, ...]:
    """Tokens that `rank` receives from each member that owns part of its halo, in the order of members."""
    shared = ((peer, overlap(own, needed[rank])) for peer, own in enumerate(owned) if peer != rank)
    return tuple(Transfer(peer=peer, span=span) for peer, span in shared if length(span) > 0)


def ring_order(rank: int, size: int) -> tuple[int, ...]:
    """Owners of the blocks that reach `rank`, in the order in which they come: blocks travel to the next rank."""
    return tuple((rank - step) % size for step in range(1, size))


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """The size of one token of one head: `batch` items of `head_dim` numbers of `itemsize` bytes."""

    batch: int
    head_dim: int
    itemsize: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one token and one head in one tensor."""
        return self.batch * self.head_dim * self.itemsize


def layer_bytes(plan: SequencePlan, rank: int, mode: Mode, *, shape: LayerShape, halo: HaloRange) -> dict[str, int]:
    """Bytes that `rank` sends in one attention layer, by kind: all_to_all, halo, ring, reduce.

    all_to_all: q, k, v [B, s, N, D] without the own heads, then out [B, r, n, D] without the own tokens.
    halo:       k, v of own tokens in others' windows.    ring: k, v of every block but the one that ends here.
    reduce:     both Gram matrices [B, n, D, D] to each ring member, in fp32 on a CPU four times as much, and the fusion's
                matrices of a share of the items and heads.
    """
    ring_rank, ulysses_rank = divmod(rank, plan.ulysses)
    own, shard = plan.ring_shards[ring_rank], plan.shards[rank]
    heads = length(plan.head_shares[ulysses_rank])
    kv_bytes = 2 * heads * shape.row_bytes
    to_heads = 3 * length(shard) * (plan.heads - heads)
    to_tokens = heads * (length(own) - length(shard))
    needed = halo_needs(plan.ring_shards, halo, plan.tokens)
    sends = halo_sends(plan.ring_shards, needed, ring_rank)
    ends_here = length(plan.ring_shards[(ring_rank + 1) % plan.ring])
    return {
        "all_to_all": (to_heads + to_tokens) * shape.row_bytes,
        "halo": kv_bytes * sum(length(send.span) for send in sends) if mode != "global" else 0,
        "ring": kv_bytes * (plan.tokens - ends_here) if mode != "local" else 0,
        "reduce": _matrix_bytes(plan, heads, shape) if mode == "dual" else 0,
    }


def _matrix_bytes(plan: SequencePlan, heads: int, shape: LayerShape) -> int:
    """Bytes of Gram matrices and fusion matrices to each ring member; shares of the latter are padded to the largest."""
    grams = GRAMS_PER_HEAD * shape.batch * heads
    fusions = -(-shape.batch * heads // plan.ring)
    return (grams + fusions) * shape.head_dim**2 * GRAM_ITEMSIZE * (plan.ring - 1)


def layer_bytes_by_rank(plan: SequencePlan, mode: Mode, *, shape: LayerShape, halo: HaloRange) -> list[dict[str, int]]:
    """`layer_bytes` of every rank, in rank order. P log P for P ranks, where asking rank by rank takes P² and more."""
    shards, ring_shards, shares = plan.shards, plan.ring_shards, plan.head_shares
    sent = _halo_tokens_sent(ring_shards, halo_needs(ring_shards, halo, plan.tokens)) if mode != "global" else None
    found = []
    for ring_rank, own in enumerate(ring_shards):
        passed_on = plan.tokens - length(ring_shards[(ring_rank + 1) % plan.ring])
        for ulysses_rank, share in enumerate(shares):
            shard, heads = length(shards[ring_rank * plan.ulysses + ulysses_rank]), length(share)
            kv_bytes = 2 * heads * shape.row_bytes
            rows = 3 * shard * (plan.heads - heads) + heads * (length(own) - shard)
            found.append(
                {
                    "all_to_all": rows * shape.row_bytes,
                    "halo": 0 if sent is None else kv_bytes * sent[ring_rank],
                    "ring": kv_bytes * passed_on if mode != "local" else 0,
                    "reduce": _matrix_bytes(plan, heads, shape) if mode == "dual" else 0,
                }
            )
    return found


def _halo_tokens_sent(owned: Sequence[Range], needed: Sequence[Range]) -> list[int]:
    """Tokens that each member sends, once for every other member whose windows hold them.

    All members together need sum_i (min(x, stop_i) - min(x, start_i)) of the tokens before x; a member's own part of that,
    less the tokens that it needs itself, which `halo_needs` has checked to be all of its own, is what it sends.
    """

    def before(bounds: Sequence[int]) -> Callable[[int], int]:
        ordered = sorted(bounds)
        sums = list(accumulate(ordered, initial=0))

        def summed(x: int) -> int:
            count = bisect_left(ordered, x)
            return sums[count] + (len(ordered) - count) * x

        return summed

    starts, stops = before([start for start, _ in needed]), before([stop for _, stop in needed])
    covered = {x: stops(x) - starts(x) for span in owned for x in span}
    return [covered[stop] - covered[start] - (stop - start) for start, stop in owned]


def gather_bytes(plan: SequencePlan, *, token_bytes: int) -> int:
    """Bytes that a rank sends to gather tokens of `token_bytes` each: its shard, padded to the largest, to every other."""
    return max(length(shard) for shard in plan.shards) * token_bytes * (plan.ranks - 1)


def cfg_bytes(cfg: int, *, prediction_bytes: int) -> int:
    """Bytes that a rank sends to give its prediction to the other ranks of its cfg group."""
    return prediction_bytes * (cfg - 1)


def choose_local_route(plan: SequencePlan, *, shape: LayerShape, halo: HaloRange) -> Route:
    """Fewest bytes for local-only steps: heads against tokens and back, or a halo with all heads on each shard.

    The halo is fetched for every head by every rank of a ulysses group, so it wins where windows are shorter than shards.
    """

    def busiest(candidate: SequencePlan) -> int:
        return max(sum(sent.values()) for sent in layer_bytes_by_rank(candidate, "local", shape=shape, halo=halo))

    return "halo" if busiest(plan.on_shards()) <= busiest(plan) else "all_to_all"
