"""Far keys against explicit weights: whole videos, shards and scenes, odd sizes; which tokens are kept; where a sample fails."""

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from benchmarks.peaked import error
from freespec import attention, kernels
from freespec.attention import WindowedAttention, masked_ref, thinned_ref
from freespec.far_keys import check_far, far_tokens, parse_far
from freespec.methods import FORMS, METHODS, make_method
from freespec.scenes import ScenedAttention
from freespec.thinning import kept_tokens
from tests.freespec.cases import assert_same_math

# frames, rows, columns, window, kept: windows even and odd, a frame more than the window, kept tokens that divide nothing.
SIZES = [(9, 3, 5, 4, 4), (5, 3, 5, 4, 7), (13, 2, 3, 5, 1), (8, 1, 7, 1, 6), (4, 2, 3, 4, 2)]
Sizes = tuple[int, int, int, int, int]


def layer_of(sizes: Sizes) -> WindowedAttention:
    frames, rows, columns, window, _ = sizes
    return WindowedAttention(
        num_frames=frames, frame_tokens=rows * columns, window_frames=window, kernel=kernels.cpu_flash
    )


def draw(sizes: Sizes, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, and the tokens that are kept of a layer in a step."""
    frames, rows, columns, _, kept = sizes
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, frames * rows * columns, 3, 8, generator=generator, dtype=torch.float64)
    return 2 * q, k, v, kept_tokens(rows, columns, num_frames=frames, kept=kept, layers=3, step=5)[seed % 3]


def check_both(sizes: Sizes) -> None:
    q, k, v, kept = draw(sizes)
    frame_tokens, window = sizes[1] * sizes[2], sizes[3]
    (local, _), (out, _) = layer_of(sizes).dual(q, k, v, 0, 0, dtype=q.dtype, far=(k[:, kept], v[:, kept]))
    assert_same_math(out, thinned_ref(q, k, v, kept, frame_tokens=frame_tokens, window_frames=window))
    assert_same_math(local, masked_ref(q, k, v, frame_tokens=frame_tokens, window_frames=window))


@pytest.mark.parametrize("sizes", SIZES)
def test_both_branches_equal_explicit_weights(sizes: Sizes) -> None:
    check_both(sizes)


def test_negative_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the shift of the log-sum-exp, and with keys of the frame beside the right ones."""
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(WindowedAttention, "far_shift", lambda *_: 0.0)
        check_both(SIZES[0])
    circle = attention._circle
    monkeypatch.setattr(attention, "_circle", lambda x, start, wrapped: circle(x.roll(1, dims=1), start, wrapped))
    with pytest.raises(AssertionError):
        check_both(SIZES[0])


@pytest.mark.parametrize("starts", [(0,), (0, 8), (0, 3, 9), (0, 1, 2, 10, 12)])
@pytest.mark.parametrize("bounds", [(0, 78), (0, 13, 13, 14, 50, 78)])
def test_shards_and_scenes_equal_explicit_weights(starts: tuple[int, ...], bounds: tuple[int, ...]) -> None:
    """A shard has the keys of its halo, and the kept tokens of the whole video; a scene has windows of its own."""
    sizes = (13, 2, 3, 5, 4)
    q, k, v, kept = draw(sizes)
    scened = ScenedAttention(video=layer_of(sizes), starts=starts)
    layer = scened if len(starts) > 1 else layer_of(sizes)
    locals_, globals_ = [], []
    for first, last in itertools.pairwise(bounds):
        halo = slice(*layer.halo(first, last))
        near = q[:, first:last], k[:, halo], v[:, halo]
        (local, _), (out, _) = layer.dual(*near, first, halo.start, dtype=q.dtype, far=(k[:, kept], v[:, kept]))
        locals_.append(local)
        globals_.append(out)
    exact = layer.dual(q, k, v, 0, 0, dtype=q.dtype)[0][0]
    assert_same_math(torch.cat(locals_, 1), exact)
    assert_same_math(torch.cat(globals_, 1), weighed(q, k, v, kept, starts))


def weighed(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, starts: tuple[int, ...]) -> Tensor:
    """The global branch of 13 frames of 6 tokens in scenes, query by query, each key as often as it counts."""
    outs = []
    for query in range(78):
        first = max(start for start in starts if start <= query // 6)
        last = min([start for start in starts if start > query // 6], default=13)
        length = min(5, last - first)
        start = min(max(query // 6 - 2, first), last - length)
        counts = [1.0 if start <= key // 6 < start + length else 1.5 * (key in kept) for key in range(78)]
        logits = torch.einsum("bnd,bknd->bnk", q[:, query], k) / 8**0.5 + torch.tensor(counts).double().log()
        outs.append(torch.einsum("bnk,bknd->bnd", logits.softmax(-1), v))
    return torch.stack(outs, 1)


def test_as_many_tokens_of_every_frame_are_kept_each_equally_often() -> None:
    counts = torch.zeros(5 * 70, dtype=torch.int64)
    for step in range(40):
        table = kept_tokens(7, 10, num_frames=5, kept=9, layers=25, step=step)
        assert table.shape == (25, 45)
        assert (table.diff() > 0).all()
        assert torch.equal(table // 70, torch.arange(5).repeat_interleave(9).expand(25, -1))
        counts += torch.bincount(table.flatten(), minlength=350)
    assert counts.float().mean() == 40 * 25 * 9 / 70
    assert (counts - 40 * 25 * 9 / 70).abs().max() < 20  # independent draws would deviate by 10, and by 35 at most


def test_kept_tokens_are_spread_and_move_on() -> None:
    """One token in each quarter of a frame; other ones in the next frame, layer and step."""
    tables = [kept_tokens(8, 8, num_frames=6, kept=4, layers=2, step=step) for step in (3, 4)]
    tokens = torch.stack(tables).unflatten(-1, (6, 4)) % 64
    quarters = tokens // 32 * 2 + tokens % 8 // 4
    assert torch.equal(quarters.sort(-1).values, torch.arange(4).expand_as(quarters))
    for dim in range(3):
        one, other = tokens.narrow(dim, 0, 1), tokens.narrow(dim, 1, 1)
        assert (one != other).any(-1).all()


@pytest.mark.parametrize(
    ("far", "kept"), [("all", None), ("1/8", 42), ("7/8", 289), ("1/1000", 1), (4096, 91), ("46", 1), (14850, None)]
)
def test_numbers_of_kept_tokens(far: int | str, kept: int | None) -> None:
    sizes = {"num_frames": 61, "frame_tokens": 330, "window_frames": 16}
    assert far_tokens(far, **sizes) == kept
    assert far_tokens(far, **sizes | {"window_frames": 61}) is None


@pytest.mark.parametrize("far", ["0", "-4", "8/1", "1/1", "0/8", "1/0", "0.125", "some", "", "1 /8", "12345678901234"])
def test_nonsense_is_refused(far: str) -> None:
    with pytest.raises(ValueError, match=r"attention.far must be all, a share .* such as 1/8, .* 4096, got"):
        parse_far(far)


def test_too_few_keys_and_methods_that_read_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"44 is less than one key for each of the 45 frames .* use 45 or more"):
        far_tokens(44, num_frames=61, frame_tokens=330, window_frames=16)
    for name in METHODS | FORMS:
        method = make_method(name)
        check_far("all", method, name)
        if name in ("freespec", "freelong", "ultravico", "direct_far"):
            check_far("1/8", method, name)
        else:
            with pytest.raises(ValueError, match=f"1/8 thins the keys of dual steps, and method {name} has steps"):
                check_far("1/8", method, name)


@pytest.mark.parametrize(("sharpness", "least", "most"), [(0.5, 0.0, 0.1), (5.0, 0.1, 0.25), (20.0, 0.7, 1.0)])
def test_a_sample_serves_flat_attention_and_fails_peaked_attention(sharpness: float, least: float, most: float) -> None:
    """Each query looks for one token of the last frame: flat attention hardly notices that most are left out, peaked attention does."""
    assert least <= error(sharpness)[0] <= most


def test_shares_are_exact() -> None:
    assert parse_far("2/16") == Fraction(1, 8)
