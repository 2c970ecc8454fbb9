"""Texts over time: pieces, weights and penalties; the calls by pieces equal every frame attending to every text."""

import itertools

import pytest
import torch
from torch import Tensor

from freespec import kernels
from freespec.events import MAX_PENALTY, Event, Piece, Share, plan, repeated
from freespec.timeline import attend, place, timeline_ref

FRAME_TOKENS = 6
A, B = (0, None), (1, None)


def spans(*boundaries: int, transition: str = "cut", width: float = 0.0) -> list[Event]:
    """Events between neighbouring boundaries, all begun by one kind of transition."""
    return [Event(start=a, stop=b, transition=transition, width=width) for a, b in itertools.pairwise(boundaries)]


MIXED = [
    Event(start=0, stop=4),
    Event(start=4, stop=7, transition="relay", width=0.8),
    Event(start=7, stop=11, transition="fade", width=3.0),
    Event(start=11, stop=13, transition="cut"),
    Event(start=13, stop=17, transition="relay", width=1.3),
]


def draw(num_frames: int, num_texts: int, dtype: torch.dtype) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Queries of a video, and keys and values of texts of different lengths, with logits up to some units."""
    generator = torch.Generator().manual_seed(5)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    texts = [(2 * normal(2, 5 + i, 3, 8), normal(2, 5 + i, 3, 8)) for i in range(num_texts)]
    return normal(2, num_frames * FRAME_TOKENS, 3, 8), texts


def by_pieces(
    q: Tensor,
    texts: list[tuple[Tensor, Tensor]],
    events: list[Event],
    bounds: list[int],
    shown: list[int] | None = None,
) -> Tensor:
    """The output of ranks that hold the tokens between neighbouring bounds, put together; the queries are those of frames `shown`."""
    pieces = plan(events, events[-1].stop)
    pieces = pieces if shown is None else repeated(pieces, shown)

    def several(index: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = kernels.plain(*(x.transpose(1, 2) for x in (rows, *texts[index])))
        return out.transpose(1, 2), lse.transpose(1, 2)

    def one(index: int, rows: Tensor) -> Tensor:
        return several(index, rows)[0]

    placed = place(pieces, q.device, q.dtype)
    parts = [
        attend(q[:, a:b], placed, q_start=a, frame_tokens=FRAME_TOKENS, one=one, several=several)
        for a, b in itertools.pairwise(bounds)
    ]
    return torch.cat(parts, dim=1)


def test_a_cut_is_one_piece_an_event():
    assert plan(spans(0, 3, 5), 5) == (
        Piece(start=0, stop=3, shares=(Share(weights=None, events=(A,)),)),
        Piece(start=3, stop=5, shares=(Share(weights=None, events=(B,)),)),
    )


def test_a_fade_mixes_the_frames_whose_middle_lies_on_its_ramp():
    first, ramp, last = plan(spans(0, 4, 8, transition="fade", width=2.0), 8)
    assert (first.stop, ramp.stop, last.stop) == (3, 5, 8)
    assert [share.weights for share in ramp.shares] == [(0.75, 0.25), (0.25, 0.75)]


def test_weights_of_fades_sum_to_one():
    for piece in plan(MIXED, 17):
        weights = [share.weights or (1.0,) * (piece.stop - piece.start) for share in piece.shares]
        assert all(abs(sum(frame) - 1.0) < 1e-15 for frame in zip(*weights, strict=True))


def test_a_relay_lowers_an_event_by_its_distance_and_drops_it_when_far():
    pieces = plan(spans(0, 10, 20, transition="relay", width=0.5), 20)
    [share] = next(piece for piece in pieces if piece.start <= 9 < piece.stop).shares
    penalties = dict(share.events)[1]
    frame = 9 - next(piece.start for piece in pieces if piece.start <= 9 < piece.stop)
    assert penalties[frame] == 0.5**2 / (2 * 0.5**2)
    assert max(penalties) <= MAX_PENALTY
    assert pieces[0].shares == (Share(weights=None, events=(A,)),)  # far from the boundary the second is not attended
    assert pieces[-1].shares == (Share(weights=None, events=(B,)),)


@pytest.mark.parametrize(
    "events",
    [
        spans(0, 17),
        spans(0, 1, 9, 17),
        spans(0, 5, 17, transition="fade", width=4.0),
        spans(0, 5, 9, 17, transition="relay", width=0.6),
        MIXED,
    ],
)
@pytest.mark.parametrize("bounds", [[0, 102], [0, 0, 13, 27, 28, 77, 102], list(range(0, 103, 17))])
def test_pieces_on_shards_equal_every_frame_attending_to_every_text(events, bounds):
    q, texts = draw(17, len(events), torch.float64)
    expected = timeline_ref(q, texts, events, frame_tokens=FRAME_TOKENS)
    # What the greatest penalty leaves out is below e^-20 times the ratio of the texts' sums.
    tolerance = 1e-12 if all(event.transition != "relay" for event in events) else 1e-5
    torch.testing.assert_close(by_pieces(q, texts, events, bounds), expected, rtol=0, atol=tolerance)
    shifted = [0, *(bound + 1 for bound in bounds[1:-1]), bounds[-1]]
    if len(events) > 1:  # negative control: the texts the other way round
        assert not torch.allclose(by_pieces(q, texts[::-1], events, shifted), expected, rtol=0, atol=1e-2)


def test_one_text_for_all_events_is_that_text_alone():
    q, [text, *_] = draw(17, 1, torch.float32)
    whole = by_pieces(q, [text], spans(0, 17), [0, 102])
    for transition in ("cut", "fade", "relay"):
        faded = by_pieces(q, [text, text], spans(0, 6, 17, transition=transition, width=3.0), [0, 102])
        torch.testing.assert_close(faded, whole, rtol=0, atol=1e-6)


def test_half_precision_is_mixed_in_fp32():
    q, texts = draw(17, 5, torch.bfloat16)
    expected = timeline_ref(q, texts, MIXED, frame_tokens=FRAME_TOKENS)
    out = by_pieces(q, texts, MIXED, [0, 102])
    assert out.dtype == torch.bfloat16
    error = (out.double() - expected).abs().max()
    assert error <= 2 * (expected.bfloat16().double() - expected).abs().max() + 2**-8 * expected.abs().max()


@pytest.mark.parametrize(
    ("events", "num_frames", "message"),
    [
        (spans(0, 3, 5), 6, "cover 5 latent frames of 6"),
        (
            [Event(start=0, stop=2), Event(start=3, stop=5)],
            5,
            "event 2 covers latent frames [3, 5), expected to start at 2",
        ),
        ([Event(start=0, stop=0)], 0, "event 1 covers latent frames [0, 0)"),
        (spans(0, 3, 5, transition="fade"), 5, "a fade needs a width above 0 frames, got 0"),
        (
            spans(0, 5, 7, 12, transition="fade", width=3.0),
            12,
            "event 2 has 2 latent frames, too few for fades of 3 and 3",
        ),
        (spans(0, 5, 9, transition="dissolve", width=1.0), 9, "unknown transition 'dissolve'"),
    ],
)
def test_events_that_do_not_fit_are_refused(events, num_frames, message):
    with pytest.raises(ValueError) as error:
        plan(events, num_frames)
    assert message in str(error.value)


def test_frames_that_are_there_twice_attend_as_their_own():
    """In a fade, a relay, at both ends and twice at one frame."""
    q, texts = draw(17, len(MIXED), torch.float64)
    shown = sorted([*range(17), 0, 3, 3, 8, 16])
    more = q.unflatten(1, (17, FRAME_TOKENS))[:, shown].flatten(1, 2)
    once = by_pieces(q, texts, MIXED, [0, 17 * FRAME_TOKENS]).unflatten(1, (17, FRAME_TOKENS))[:, shown].flatten(1, 2)
    made = by_pieces(more, texts, MIXED, [0, 40, len(shown) * FRAME_TOKENS], shown)
    torch.testing.assert_close(made, once, rtol=0, atol=1e-12)
    with pytest.raises(AssertionError):  # negative control: the events in other places
        other = by_pieces(more, texts, MIXED, [0, len(shown) * FRAME_TOKENS], sorted([*range(17), 0, 3, 4, 8, 16]))
        torch.testing.assert_close(other, once, rtol=0, atol=1e-12)
