"""The integers of parallel/shards.py against counting tokens one by one, exhaustively at small sizes."""

import itertools
import math

import pytest

from parallel import shards as plans
from parallel.shards import LayerShape, SequencePlan
from tests.parallel.masked import MaskedKernels

ONE_BYTE_ROWS = LayerShape(batch=1, head_dim=1, itemsize=1)
WINDOWS = [
    MaskedKernels(frames=frames, frame_tokens=frame_tokens, window=window)
    for frames, frame_tokens, window in itertools.product((1, 2, 5), (1, 3), (1, 2, 3, 6))
]


@pytest.mark.parametrize("parts", range(1, 10))
def test_splits_are_contiguous_balanced_and_whole(parts: int) -> None:
    for total in range(25):
        ranges = plans.split_ranges(total, parts)
        assert [item for start, stop in ranges for item in range(start, stop)] == list(range(total))
        sizes = [plans.length(span) for span in ranges]
        assert max(sizes) - min(sizes) <= 1


def test_a_ring_shard_is_the_shards_of_its_ulysses_group() -> None:
    for tokens, ring, ulysses in itertools.product(range(1, 20), range(1, 5), range(1, 5)):
        plan = SequencePlan(tokens=tokens, heads=3, ring=ring, ulysses=ulysses)
        for ring_rank, (start, stop) in enumerate(plan.ring_shards):
            members = [token for span in plan.member_shards(ring_rank) for token in range(*span)]
            assert members == list(range(start, stop))
        assert plan.on_shards().ring_shards == plan.shards


@pytest.mark.parametrize("tokens", [64, 65, 272, 301, 126_360])
def test_shards_of_the_engine_begin_at_whole_units(tokens: int) -> None:
    for ring, ulysses in ((1, 1), (2, 2), (3, 1), (2, 4), (8, 1)):
        ranks = ring * ulysses
        plan = SequencePlan(tokens=tokens, heads=8, ring=ring, ulysses=ulysses, unit=plans.token_unit(tokens, ranks))
        assert plan.unit == (8 if tokens >= 16 * ranks else 1)
        starts, stops = zip(*plan.shards, strict=True)
        assert starts == (0, *stops[:-1])
        assert stops[-1] == tokens
        assert all(start % plan.unit == 0 for start in starts)
        sizes = [plans.length(span) for span in plan.shards]
        assert 0 < max(sizes) <= min(sizes) + plan.unit
        assert [span for r in range(ring) for span in [plan.member_shards(r)[0][0], plan.member_shards(r)[-1][1]]] == [
            edge for span in plan.ring_shards for edge in span
        ]
    assert plans.token_unit(tokens, 1, even=True) == 1


def test_overlap_and_subtract_are_those_of_sets() -> None:
    spans = list(itertools.combinations_with_replacement(range(7), 2))
    for a, b in itertools.product(spans, spans):
        assert set(range(*plans.overlap(a, b))) == set(range(*a)) & set(range(*b))
        pieces = plans.subtract(a, b)
        assert [item for piece in pieces for item in range(*piece)] == sorted(set(range(*a)) - set(range(*b)))
        assert all(plans.length(piece) > 0 for piece in pieces)


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_halos_tile_what_windows_need(windows: MaskedKernels) -> None:
    tokens = windows.frames * windows.frame_tokens
    for ranks in range(1, 9):
        owned = plans.split_ranges(tokens, ranks)
        needed = plans.halo_needs(owned, windows.halo, tokens)
        for rank in range(ranks):
            seen = windows.window_mask(*owned[rank], 0, tokens).any(dim=0).nonzero().flatten().tolist()
            receives = plans.halo_receives(owned, needed, rank)
            got = [token for receive in receives for token in range(*receive.span)]
            assert sorted([*range(*owned[rank]), *got]) == seen
            for receive in receives:
                sent = plans.halo_sends(owned, needed, receive.peer)
                assert plans.Transfer(peer=rank, span=receive.span) in sent


def test_a_halo_can_have_many_owners() -> None:
    windows = MaskedKernels(frames=8, frame_tokens=1, window=5)
    owned = plans.split_ranges(8, 8)
    needed = plans.halo_needs(owned, windows.halo, 8)
    assert [receive.peer for receive in plans.halo_receives(owned, needed, 3)] == [1, 2, 4, 5]


def test_halo_needs_refuses_windows_of_another_sequence() -> None:
    windows = MaskedKernels(frames=4, frame_tokens=2, window=3)
    with pytest.raises(ValueError, match=r"\(0, 8\) of a sequence planned with 9 tokens"):
        plans.halo_needs([(0, 9)], windows.halo, 9)
    with pytest.raises(ValueError, match="do not hold the queries' own tokens"):
        plans.halo_needs([(0, 4), (4, 8)], lambda start, stop: (0, 8) if stop - start == 8 else (0, 4), 8)


@pytest.mark.parametrize("size", range(1, 7))
def test_ring_order_is_what_passing_blocks_on_gives(size: int) -> None:
    holding = list(range(size))
    arrivals: list[list[int]] = [[] for _ in range(size)]
    for _ in range(size - 1):
        holding = [holding[(rank - 1) % size] for rank in range(size)]
        for rank in range(size):
            arrivals[rank].append(holding[rank])
    assert [plans.ring_order(rank, size) for rank in range(size)] == [tuple(owners) for owners in arrivals]


def count_sent_rows(plan: SequencePlan, rank: int, windows: MaskedKernels) -> dict[str, int]:
    """Rows (one token of one head of one tensor) that a rank sends by kind, counted one by one."""
    ring_rank, ulysses_rank = divmod(rank, plan.ulysses)
    peers = [ring_rank * plan.ulysses + peer for peer in range(plan.ulysses) if peer != ulysses_rank]
    own_heads = range(*plan.head_shares[ulysses_rank])
    own_tokens = set(range(*plan.ring_shards[ring_rank]))
    rows = {"all_to_all": 0, "halo": 0, "ring": 0}
    for peer in peers:
        peer_heads = range(*plan.head_shares[peer % plan.ulysses])
        rows["all_to_all"] += 3 * len(peer_heads) * len(range(*plan.shards[rank]))
        rows["all_to_all"] += len(own_heads) * len(range(*plan.shards[peer]))
    for other, span in enumerate(plan.ring_shards):
        if other != ring_rank and plans.length(span):
            wanted = windows.window_mask(*span, 0, plan.tokens).any(dim=0).nonzero().flatten().tolist()
            rows["halo"] += 2 * len(own_heads) * len(own_tokens & set(wanted))
    for step in range(plan.ring - 1):
        rows["ring"] += 2 * len(own_heads) * len(range(*plan.ring_shards[(ring_rank - step) % plan.ring]))
    return rows


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_layer_bytes_count_every_row_that_leaves(windows: MaskedKernels) -> None:
    tokens = windows.frames * windows.frame_tokens
    for heads, ring, ulysses in itertools.product((1, 3, 4), (1, 2, 3), (1, 2, 4)):
        plan = SequencePlan(tokens=tokens, heads=heads, ring=ring, ulysses=ulysses)
        for rank in range(plan.ranks):
            rows = count_sent_rows(plan, rank, windows)
            own = plans.length(plan.head_shares[rank % ulysses])
            grams = (2 * own + math.ceil(own / ring)) * 8 * (ring - 1)
            dual = plans.layer_bytes(plan, rank, "dual", shape=ONE_BYTE_ROWS, halo=windows.halo)
            assert dual == {**rows, "reduce": grams}
            local = plans.layer_bytes(plan, rank, "local", shape=ONE_BYTE_ROWS, halo=windows.halo)
            assert local == {**rows, "ring": 0, "reduce": 0}
            whole = plans.layer_bytes(plan, rank, "global", shape=ONE_BYTE_ROWS, halo=windows.halo)
            assert whole == {**rows, "halo": 0, "reduce": 0}
        for mode in ("dual", "local", "global"):  # all ranks at once are the ranks one by one
            at_once = plans.layer_bytes_by_rank(plan, mode, shape=ONE_BYTE_ROWS, halo=windows.halo)
            one_by_one = [
                plans.layer_bytes(plan, rank, mode, shape=ONE_BYTE_ROWS, halo=windows.halo)
                for rank in range(plan.ranks)
            ]
            assert at_once == one_by_one


def test_layer_bytes_scale_with_the_shape_and_match_the_design_at_wan() -> None:
    """Wan 1.3B, 321 frames: Ulysses 4·S·C·2/P·(P-1)/P, ring 2·S·C·2·(P-1)/P, Grams 2·N·D²·8, all exact at 4 ranks."""
    wan = LayerShape(batch=1, head_dim=128, itemsize=2)
    windows = MaskedKernels(frames=81, frame_tokens=1, window=21)

    def halo(start: int, stop: int) -> tuple[int, int]:
        first, last = windows.halo(start // 1560, -(-stop // 1560))
        return first * 1560, last * 1560

    size = 126_360 * 1536 * 2
    ulysses = plans.layer_bytes(
        SequencePlan(tokens=126_360, heads=12, ring=1, ulysses=4), 1, "dual", shape=wan, halo=halo
    )
    assert ulysses == {"all_to_all": 4 * size // 4 * 3 // 4, "halo": 0, "ring": 0, "reduce": 0}
    ring = plans.layer_bytes(SequencePlan(tokens=126_360, heads=12, ring=4, ulysses=1), 1, "dual", shape=wan, halo=halo)
    assert ring["ring"] == 2 * size * 3 // 4
    assert ring["reduce"] == 3 * (2 * 12 + 3) * 128**2 * 8
    # Frames 20.25 to 40.5: rank 0's frame 20 sees up to frame 31, rank 2's frame 40 sees from frame 30 on.
    assert ring["halo"] == 2 * 1536 * 2 * int(1560 * (10.75 + 10.5))


def test_gather_and_cfg_bytes() -> None:
    plan = SequencePlan(tokens=10, heads=2, ring=2, ulysses=2)
    assert plans.gather_bytes(plan, token_bytes=8) == 3 * 8 * 3
    assert plans.cfg_bytes(2, prediction_bytes=100) == 100
    assert plans.cfg_bytes(1, prediction_bytes=100) == 0


def test_local_route_is_the_one_with_fewer_bytes() -> None:
    plan = SequencePlan(tokens=64, heads=4, ring=1, ulysses=4)
    narrow = MaskedKernels(frames=64, frame_tokens=1, window=3)
    wide = MaskedKernels(frames=64, frame_tokens=1, window=48)

    def busiest(candidate: SequencePlan, halo: plans.HaloRange) -> int:
        sent = plans.layer_bytes_by_rank(candidate, "local", shape=ONE_BYTE_ROWS, halo=halo)
        return max(sum(of_rank.values()) for of_rank in sent)

    assert busiest(plan, narrow.halo) == busiest(plan, wide.halo) == 4 * 16 * 3
    assert busiest(plan.on_shards(), narrow.halo) == 2 * 2 * 4
    assert busiest(plan.on_shards(), wide.halo) > 4 * 16 * 3
    assert plans.choose_local_route(plan, shape=ONE_BYTE_ROWS, halo=narrow.halo) == "halo"
    assert plans.choose_local_route(plan, shape=ONE_BYTE_ROWS, halo=wide.halo) == "all_to_all"


def test_impossible_plans_are_refused_with_their_numbers() -> None:
    with pytest.raises(ValueError, match="0 tokens and 2 heads over ring 1 x ulysses 1"):
        SequencePlan(tokens=0, heads=2, ring=1, ulysses=1)
