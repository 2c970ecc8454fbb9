"""Initial noise: the published loops, and what must hold of the result."""

import pytest
import torch
from torch import Tensor

from freespec import noise

SIZES = [(4, 4, 2), (11, 4, 3), (12, 4, 4), (13, 5, 2), (7, 3, 1), (3, 5, 2)]  # frames, window, stride


def fresh(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(1, 2, frames, 3, 2, generator=torch.Generator().manual_seed(seed))


def published_reshuffle(x: Tensor, window: int, stride: int, generator: torch.Generator) -> Tensor:
    """Frame by frame, as in FreeNoise's script; a last piece that is too short takes what there is room for."""
    frames = list(x.unbind(2))
    for start in range(window, len(frames), stride):
        order = torch.randperm(stride, generator=generator).tolist()
        piece = [frames[start - window + i] for i in order]
        for offset, frame in enumerate(piece):
            if start + offset < len(frames):
                frames[start + offset] = frame
    return torch.stack(frames, 2)


@pytest.mark.parametrize(("frames", "window", "stride"), SIZES)
def test_reshuffle_is_the_published_loop(frames: int, window: int, stride: int) -> None:
    x = fresh(frames)
    before = x.clone()
    ours, theirs = (
        make(x, torch.Generator().manual_seed(1))
        for make in (
            lambda x, g: noise.reshuffle(x, window_frames=window, stride=stride, generator=g),
            lambda x, g: published_reshuffle(x, window, stride, g),
        )
    )
    assert torch.equal(ours, theirs)
    assert torch.equal(x, before)
    assert torch.equal(ours[:, :, :window], x[:, :, :window])
    first = {frame.numpy().tobytes() for frame in x[:, :, :window].unbind(2)}
    assert {frame.numpy().tobytes() for frame in ours.unbind(2)} <= first


def test_reshuffle_depends_on_the_generator_alone() -> None:
    made = [
        noise.reshuffle(fresh(40), window_frames=8, stride=4, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_reshuffle_copies_what_was_rewritten_before() -> None:
    """Each piece of s frames holds the frames of the piece W before it: the order changes, the set does not."""
    made = noise.reshuffle(fresh(20), window_frames=4, stride=2, generator=torch.Generator().manual_seed(0))
    for start in range(4, 20, 2):
        pieces = (made[:, :, at : at + 2].unbind(2) for at in (start, start - 4))
        new, old = (sorted(frame.numpy().tobytes() for frame in piece) for piece in pieces)
        assert new == old


@pytest.mark.parametrize(("frames", "window", "stride"), SIZES)
def test_mean_reuse_is_the_published_loop(frames: int, window: int, stride: int) -> None:
    x = fresh(frames).double()
    expected, mean = [], x[:, :, :window].mean(2)
    for start in range(0, frames, window):
        chunk = x[:, :, start : start + window]
        own = chunk.mean(2)
        expected += [frame - own + mean if start else frame for frame in chunk.unbind(2)]
        mean = torch.stack(expected[-chunk.shape[2] :], 2).mean(2)  # published: that of the chunk before
    made = noise.reuse_mean(x, window_frames=window)
    torch.testing.assert_close(made, torch.stack(expected, 2), rtol=0, atol=1e-12)
    assert torch.equal(made[:, :, :window], x[:, :, :window])
    if frames > window:  # the control: another mean is seen
        assert (made - noise.reuse_mean(x, window_frames=window - 1)).abs().max().item() > 1e-3


def test_mean_reuse_shares_the_mean_and_no_more() -> None:
    x = fresh(18).double()
    made = noise.reuse_mean(x, window_frames=4)  # the last chunk has 2 frames
    chunks = made.split(4, dim=2)
    for chunk, own in zip(chunks, x.split(4, dim=2), strict=True):
        torch.testing.assert_close(chunk.mean(2), chunks[0].mean(2), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            chunk - chunk.mean(2, keepdim=True), own - own.mean(2, keepdim=True), atol=1e-12, rtol=0
        )
    assert not torch.allclose(x.split(4, dim=2)[1].mean(2), chunks[0].mean(2))  # they differ before


def test_the_kinds() -> None:
    x, generator = fresh(9), torch.Generator().manual_seed(0)
    kinds = {
        kind: noise.relate_frames(x, kind, window_frames=4, stride=2, generator=generator)
        for kind in ("iid", "freenoise", "mean_reuse")
    }
    assert torch.equal(kinds["iid"], x)
    assert torch.equal(kinds["mean_reuse"], noise.reuse_mean(x, window_frames=4))
    assert not torch.equal(kinds["freenoise"], x)
    for kind in kinds:  # at native length every kind is the same noise
        same = noise.relate_frames(x, kind, window_frames=9, stride=2, generator=generator)
        assert torch.equal(same, x)


@pytest.mark.parametrize(("window", "stride"), [(4, 5), (4, 0), (0, 1)])
def test_wrong_sizes(window: int, stride: int) -> None:
    with pytest.raises(ValueError, match="noise needs 1 <= stride <= window, got stride"):
        noise.reshuffle(fresh(9), window_frames=window, stride=stride, generator=torch.Generator())
    with pytest.raises(ValueError, match="a window of 1 frame or more, got 0"):
        noise.reuse_mean(fresh(9), window_frames=0)
