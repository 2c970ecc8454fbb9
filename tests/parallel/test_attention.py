"""Every layout and mode against masked attention of the whole sequence on one device in fp64, to 1e-10."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from freespec import spectrum
from freespec.attention import WindowedAttention, thinned_ref
from freespec.kernels import cpu_flash
from freespec.thinning import kept_tokens
from parallel import attention, collectives, shards
from parallel.attention import TORCH_EXCHANGE, BranchKernels, HeadExchange, KeptTokens, SequenceLayout
from parallel.shards import LayerShape, SequencePlan
from tests.parallel.masked import MaskedKernels, masked_attention
from tests.parallel.worlds import ByteCount, bytes_at_torch, seeded, small_mesh
from tests.ranks import run_ranks

HEAD_DIM = 4
Degrees = tuple[int, int, int]


@dataclass(frozen=True)
class Video:
    """A sequence to attend over: frames x frame_tokens tokens, windows of `window` frames."""

    frames: int
    frame_tokens: int
    window: int
    heads: int
    batch: int = 1

    @property
    def tokens(self) -> int:
        return self.frames * self.frame_tokens

    @property
    def masked(self) -> MaskedKernels:
        return MaskedKernels(frames=self.frames, frame_tokens=self.frame_tokens, window=self.window)

    @property
    def freespec(self) -> WindowedAttention:
        return WindowedAttention(
            num_frames=self.frames, frame_tokens=self.frame_tokens, window_frames=self.window, kernel=cpu_flash
        )

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = seeded(3, self.batch, self.tokens, self.heads, HEAD_DIM, seed=self.tokens)
        return 2 * q, k, v


@cache
def reference(video: Video) -> tuple[Tensor, Tensor]:
    """Local and global branch of the whole sequence."""
    mask = video.masked.window_mask(0, video.tokens, 0, video.tokens)
    return masked_attention(*video.qkv, mask)[0], masked_attention(*video.qkv, torch.ones_like(mask))[0]


VIDEOS = [
    Video(frames=7, frame_tokens=4, window=3, heads=12),
    Video(frames=5, frame_tokens=3, window=2, heads=3, batch=2),  # nothing divides by anything
    Video(frames=3, frame_tokens=2, window=1, heads=2),  # 8 ranks: some without tokens, some without heads
    Video(frames=4, frame_tokens=2, window=6, heads=5),  # the window holds everything
    Video(frames=8, frame_tokens=1, window=5, heads=4),  # a halo with many owners
]


def all_degrees(num_ranks: int) -> list[Degrees]:
    return [
        (cfg, ring, ulysses)
        for cfg, ring, ulysses in itertools.product(range(1, num_ranks + 1), repeat=3)
        if cfg * ring * ulysses == num_ranks
    ]


def make_layout(degrees: Degrees, video: Video, count: ByteCount) -> SequenceLayout:
    cfg, ring, ulysses = degrees
    return SequenceLayout(
        mesh=small_mesh(cfg=cfg, ring=ring, ulysses=ulysses),
        plan=SequencePlan(tokens=video.tokens, heads=video.heads, ring=ring, ulysses=ulysses),
        exchange=TORCH_EXCHANGE,
        trace=count.trace(),
    )


def grams(out_BrnD: Tensor) -> Tensor:
    return torch.einsum("brni,brnj->bnij", out_BrnD, out_BrnD)


def head_share(layout: SequenceLayout) -> slice:
    return slice(*layout.plan.head_shares[layout.mesh.ulysses.rank])


def worst_error(layout: SequenceLayout, video: Video, mode: shards.Mode, kernels: BranchKernels) -> float:
    """Run one attention layer as the engine does; the largest difference to the reference inside it and after it.

    A dual step reduces two Gram matrices per head, fuses their spectra, and sends one tensor back.
    """
    inner = layout.scatter(*(layout.shard_tokens(x, dim=1) for x in video.qkv))
    pairs = [
        (got, expected)
        for got, expected in zip(layout.branches(*inner, mode, kernels), reference(video), strict=True)
        if got is not None
    ]
    assert len(pairs) == (2 if mode == "dual" else 1)
    if mode == "dual":
        layout.share_heads(torch.add, *layout.reduce(torch.stack([grams(got) for got, _ in pairs])))
    mine = [(got, expected[:, slice(*layout.ring_shard), head_share(layout)]) for got, expected in pairs]
    out, expected = pairs[-1]
    mine.append((layout.gather(out), layout.shard_tokens(expected, dim=1)))
    assert all(got.shape == want.shape for got, want in mine)
    return max((float((got - want).abs().max()) for got, want in mine if got.numel()), default=0.0)


def kept_of(video: Video, plan: SequencePlan) -> KeptTokens:
    """About a third of each frame's tokens."""
    index = kept_tokens(
        1, video.frame_tokens, num_frames=video.frames, kept=-(-video.frame_tokens // 3), layers=1, step=0
    )[0]
    starts = torch.tensor([*(start for start, _ in plan.ring_shards), video.tokens])
    return KeptTokens(index=index, cuts=tuple(torch.searchsorted(index, starts).tolist()))


def thinned_error(layout: SequenceLayout, video: Video, count: ByteCount, kept: KeptTokens) -> float:
    """The largest difference of both branches to explicit weights; the kept tokens' bytes are those of a padded gather."""
    inner = layout.scatter(*(layout.shard_tokens(x, dim=1) for x in video.qkv))
    count.sent.clear()
    branches = layout.thinned_branches(*inner, kept, video.freespec)
    rows = max(stop - start for start, stop in itertools.pairwise(kept.cuts))
    heads = head_share(layout)
    row_bytes = 2 * video.batch * (heads.stop - heads.start) * HEAD_DIM * 8
    assert count.sent["far"] == rows * row_bytes * (layout.mesh.ring.size - 1)
    sizes = {"frame_tokens": video.frame_tokens, "window_frames": video.window}
    expected = reference(video)[0], thinned_ref(*video.qkv, kept.index, **sizes)
    pairs = [(got, want[:, slice(*layout.ring_shard), heads]) for got, want in zip(branches, expected, strict=True)]
    return max((float((got - want).abs().max()) for got, want in pairs if got.numel()), default=0.0)


def layouts_of_modes(layout: SequenceLayout) -> Iterator[tuple[shards.Mode, SequenceLayout]]:
    for mode in ("local", "global", "dual"):
        yield mode, layout
    yield "local", layout.on_shards()
    for mode in ("global", "dual"):
        yield mode, replace(layout, gathers_keys=True)


def gathered_bytes(plan: SequencePlan, rank: int, shape: LayerShape) -> dict[str, int]:
    """What a rank sends for keys that are gathered: its block, padded to the largest, to each other member."""
    heads = shards.length(plan.head_shares[rank % plan.ulysses])
    block = max(map(shards.length, plan.ring_shards)) * 2 * heads * shape.row_bytes
    return {"halo": 0, "ring": block * (plan.ring - 1)}


def check_layouts(rank: int, degrees: Degrees) -> None:
    count = ByteCount()
    layout = make_layout(degrees, VIDEOS[0], count)
    for video in VIDEOS:
        shape = LayerShape(batch=video.batch, head_dim=HEAD_DIM, itemsize=8)
        layout = replace(layout, plan=replace(layout.plan, tokens=video.tokens, heads=video.heads))
        for mode, route in layouts_of_modes(layout):
            count.sent.clear()
            with bytes_at_torch() as sent:
                error = worst_error(route, video, mode, video.masked)
            assert error < 1e-10, f"{mode} of {video}: {error}"
            planned = shards.layer_bytes(
                route.plan, route.mesh.sequence.rank, mode, shape=shape, halo=video.masked.halo
            )
            if route.gathers_keys:
                planned |= gathered_bytes(route.plan, route.mesh.sequence.rank, shape)
            assert +count.sent == +Counter(planned), f"{mode} of {video}"
            assert sent.total() == count.sent.total(), f"{mode} of {video}"
            if mode == "dual":  # which calls each of the method's own kernels
                assert worst_error(route, video, mode, video.freespec) < 1e-10, f"{video} with freespec's kernels"
                assert thinned_error(route, video, count, kept_of(video, layout.plan)) < 1e-10, f"{video} with far keys"


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_every_layout_and_mode_is_one_device_and_sends_the_planned_bytes(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(num_ranks, check_layouts, all_degrees(num_ranks), tmp_path)


def check_whole_run(rank: int, degrees: Degrees) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Grams of the global branch, and the cfg axis's gathered predictions."""
    video, count = VIDEOS[1], ByteCount()
    layout = make_layout(degrees, video, count)
    inner = layout.scatter(*(layout.shard_tokens(x, dim=1) for x in video.qkv))
    _, whole = layout.branches(*inner, "dual", video.masked)
    assert whole is not None
    total, expected = layout.reduce(grams(whole)), grams(reference(video)[1])[:, head_share(layout)]
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-10)
    of_all_heads = grams(reference(video)[1]).sum(dim=1)
    torch.testing.assert_close(layout.sum_heads(total.sum(dim=1)), of_all_heads, rtol=0, atol=1e-10)
    unreduced = (grams(whole) - expected).abs().max()
    assert unreduced > 1e-3 if degrees[1] > 1 else unreduced < 1e-10

    count.sent.clear()
    gathered = layout.gather_tokens(layout.gather(whole).flatten(2) * (1 + layout.mesh.cfg.rank))
    scale = 1 + layout.mesh.cfg.rank
    torch.testing.assert_close(gathered, reference(video)[1].flatten(2) * scale, rtol=0, atol=1e-10)
    token_bytes = video.batch * video.heads * HEAD_DIM * 8
    assert count.sent["gather"] == shards.gather_bytes(layout.plan, token_bytes=token_bytes)
    predictions = layout.cfg_exchange(gathered)
    assert len(predictions) == degrees[0]
    assert torch.equal(predictions[layout.mesh.cfg.rank], gathered)
    assert count.sent["cfg"] == shards.cfg_bytes(degrees[0], prediction_bytes=gathered.nbytes)
    return total, predictions


def test_grams_and_predictions_are_the_same_bits_on_every_rank(tmp_path: Path) -> None:
    cases = [(1, 4, 1), (1, 2, 2), (2, 2, 1), (2, 1, 2)]
    for (_, _, ulysses), by_rank in zip(cases, run_ranks(4, check_whole_run, cases, tmp_path), strict=True):
        for rank, (total, predictions) in enumerate(by_rank):
            assert torch.equal(total, by_rank[rank % ulysses][0])
            assert all(torch.equal(a, b) for a, b in zip(predictions, by_rank[0][1], strict=True))


def fusion_of(branches: Video, share: Any) -> Tensor:
    """The fusion's matrices of all heads of a video, whose Grams every rank has."""
    local, whole = (grams(out) for out in reference(branches))
    make = partial(spectrum.local_basis_matrix, weight=torch.linspace(1, 0.1, HEAD_DIM, dtype=torch.float64))
    return share(make, local, whole)


def fusions_on_ranks(rank: int, degrees: Degrees) -> list[tuple[Tensor, int]]:
    """Fusion matrices of 12 heads, and of two videos of 3, and how many matrices this rank was given of each."""
    found = []
    for video in VIDEOS[:2]:
        counts: list[int] = []

        def counted(make: Any, *matrices: Tensor, counts: list[int] = counts) -> Tensor:
            counts.append(matrices[0][..., 0, 0].numel())
            return make(*matrices)

        layout = make_layout(degrees, video, ByteCount())
        matrix = fusion_of(video, lambda make, *m, of=layout, to=counted: of.share_heads(partial(to, make), *m))
        found.append((matrix, *counts))
    return found


def test_each_rank_of_a_ring_decomposes_a_share_with_the_bits_of_one(tmp_path: Path) -> None:
    """Shares of 12 and of 6 matrices that do not divide; on a ring of eight some ranks have none."""
    for ranks, shares in {3: ([4, 4, 4], [2, 2, 2]), 8: ([1, 2] * 4, [0, 1, 1, 1] * 2)}.items():
        [by_rank] = run_ranks(ranks, fusions_on_ranks, [(1, ranks, 1)], tmp_path)
        for index, video in enumerate(VIDEOS[:2]):
            alone = fusion_of(video, lambda make, *matrices: make(*matrices))
            assert [found[index][1] for found in by_rank] == shares[index]
            assert all(torch.equal(found[index][0], alone) for found in by_rank)
            assert not torch.equal(by_rank[0][index][0], alone.flip(1)), "heads are told apart"


# Negative controls: the same comparison must fail when one movement is broken.


class SkippedExchange:
    """A head exchange that only relabels this rank's own numbers. Even shares, so that the shapes fit."""

    def tokens_to_heads(self, tensors: Sequence[Tensor], *, head_sizes: list[int], **_: object) -> tuple[Tensor, ...]:
        return tuple(x.reshape(x.shape[0], -1, head_sizes[0], x.shape[3]) for x in tensors)

    def heads_to_tokens(self, x_BrnD: Tensor, *, token_sizes: list[int], **_: object) -> Tensor:
        return x_BrnD.reshape(x_BrnD.shape[0], token_sizes[0], -1, x_BrnD.shape[3])


def drop_halo_row(*args: Tensor, **options: Any) -> Tensor:
    """Clear the key and value of the halo's first token, which on the last rank is another rank's."""
    kv = collectives.exchange_halo(*args, **options)
    kv[0] = 0
    return kv


class LateRing(collectives.RingShift):
    """A ring whose blocks bear the name of the rank after their owner."""

    def __next__(self) -> tuple[int, Tensor]:
        owner, kv = super().__next__()
        return (owner + 1) % self._size, kv


def no_ring(*args: Tensor, **options: Any) -> tuple[()]:
    return ()


def swapped_keys(kv: Tensor) -> tuple[Tensor, Tensor]:
    k, v = collectives.unpack_keys(kv)
    return v, k


class ShiftedWindows(MaskedKernels):
    """Kernels that take each query for the token after it."""

    def local(self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int) -> tuple[Tensor, Tensor]:
        mask = self.window_mask(q_start + 1, q_start + 1 + q.shape[1], k_start, k_start + k.shape[1])
        return masked_attention(q, k, v, mask)


@dataclass(frozen=True)
class Control:
    """One movement to break in a layout of two ranks, and the mode whose result must show it."""

    degrees: Degrees
    mode: shards.Mode
    exchange: HeadExchange = TORCH_EXCHANGE
    kernels: type[MaskedKernels] = MaskedKernels
    patches: tuple[tuple[str, Any], ...] = ()
    gathers_keys: bool = False


CONTROLS = {
    "skipped all-to-all": Control((1, 1, 2), "global", exchange=SkippedExchange()),
    "dropped halo row in the local branch": Control((1, 2, 1), "local", patches=(("exchange_halo", drop_halo_row),)),
    "dropped halo row in a dual step": Control((1, 2, 1), "dual", patches=(("exchange_halo", drop_halo_row),)),
    "ring blocks under a wrong name": Control((1, 2, 1), "dual", patches=(("RingShift", LateRing),)),
    "no ring": Control((1, 2, 1), "global", patches=(("RingShift", no_ring),)),
    "gathered keys and values swapped": Control(
        (1, 2, 1), "dual", patches=(("unpack_keys", swapped_keys),), gathers_keys=True
    ),
    "windows shifted by one token": Control((1, 2, 1), "local", kernels=ShiftedWindows),
}

KEPT = "ranks that keep other tokens"


def break_layouts(rank: int, name: str) -> tuple[float, float]:
    """Worst error as it is, and with the control broken."""
    if name == KEPT:
        return keep_other_tokens(rank)
    video = Video(frames=8, frame_tokens=2, window=3, heads=4)
    control = CONTROLS[name]
    layout = replace(make_layout(control.degrees, video, ByteCount()), gathers_keys=control.gathers_keys)
    sound = worst_error(layout, video, control.mode, video.masked)
    with ExitStack() as stack:
        for attribute, broken in control.patches:
            stack.enter_context(mock.patch.object(attention, attribute, broken))
        kernels = control.kernels(frames=video.frames, frame_tokens=video.frame_tokens, window=video.window)
        return sound, worst_error(replace(layout, exchange=control.exchange), video, control.mode, kernels)


def keep_other_tokens(rank: int) -> tuple[float, float]:
    """Error with far keys as they are, and when rank 0 keeps another token than rank 1 takes it to."""
    video, count = Video(frames=8, frame_tokens=2, window=3, heads=4), ByteCount()
    layout = make_layout((1, 2, 1), video, count)
    kept = kept_of(video, layout.plan)
    other = replace(kept, index=torch.cat((kept.index[:1] ^ 1, kept.index[1:])))
    sound, broken = (thinned_error(layout, video, count, each) for each in (kept, kept if rank else other))
    return sound, broken


def test_broken_movements_are_noticed(tmp_path: Path) -> None:
    names = [*CONTROLS, KEPT]
    for name, by_rank in zip(names, run_ranks(2, break_layouts, names, tmp_path), strict=True):
        assert max(sound for sound, _ in by_rank) < 1e-10, name
        assert max(broken for _, broken in by_rank) > 1e-3, name
