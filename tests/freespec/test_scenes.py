"""Windows that end with their scene: equal to an explicit list of keys for each frame, whole and on shards."""

import itertools

import pytest
import torch
from torch import Tensor

from freespec import kernels
from freespec.attention import WindowedAttention, masked_ref
from freespec.scenes import ScenedAttention, scenes_ref

FRAMES, FRAME_TOKENS, WINDOW = 17, 6, 5
STARTS = [(0,), (0, 8), (0, 3, 9), (0, 1, 2, 14, 16)]


def draw(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    sizes = (2, FRAMES * FRAME_TOKENS, 3, 8)
    q, k, v = (torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return q, k, v


def scened(starts: tuple[int, ...]) -> ScenedAttention:
    whole = WindowedAttention(
        num_frames=FRAMES, frame_tokens=FRAME_TOKENS, window_frames=WINDOW, kernel=kernels.cpu_flash
    )
    return ScenedAttention(video=whole, starts=starts)


@pytest.mark.parametrize("starts", STARTS)
def test_both_branches_equal_explicit_keys(starts):
    q, k, v = draw()
    local, o_global = scened(starts).both(q, k, v)
    sizes = {"frame_tokens": FRAME_TOKENS, "window_frames": WINDOW}
    torch.testing.assert_close(local, scenes_ref(q, k, v, **sizes, starts=starts), rtol=0, atol=1e-12)
    whole = masked_ref(q, k, v, frame_tokens=FRAME_TOKENS, window_frames=None)
    torch.testing.assert_close(o_global, whole, rtol=0, atol=1e-12)
    if len(starts) > 1:  # negative control: windows that cross scenes
        crossing = masked_ref(q, k, v, **sizes)
        assert not torch.allclose(local, crossing, rtol=0, atol=1e-2)


def test_one_scene_is_the_plain_window():
    q, k, v = draw()
    local, o_global = scened((0,)).both(q, k, v)
    plain_local, plain_global = scened((0,)).video.both(q, k, v)
    assert torch.equal(local, plain_local)
    assert torch.equal(o_global, plain_global)


@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("bounds", [[0, 17, 53, 102], [0, 40, 40, 41, 102]])
def test_shards_with_their_halo_equal_the_whole(starts, bounds):
    """A shard holds the keys of its halo alone; what lies outside is merged in afterwards, as a ring does."""
    q, k, v = draw()
    attention = scened(starts)
    expected_local, expected_global = attention.both(q, k, v)
    locals_, globals_ = [], []
    for a, b in itertools.pairwise(bounds):
        rows = q[:, a:b]
        start, stop = attention.halo(a, b)
        near = slice(start, stop)
        (local, _), (out, lse) = attention.dual(rows, k[:, near], v[:, near], a, start, dtype=q.dtype)
        for outside in (slice(0, start), slice(stop, q.shape[1])):
            attention.merge_into(out, lse, *attention.far(rows, k[:, outside], v[:, outside]))
        locals_.append(local)
        globals_.append(out)
        assert torch.equal(attention.local(rows, k[:, near], v[:, near], a, start)[0], local)
    torch.testing.assert_close(torch.cat(locals_, 1), expected_local, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(globals_, 1), expected_global, rtol=0, atol=1e-12)


@pytest.mark.parametrize("starts", STARTS[1:])
@pytest.mark.parametrize("bounds", [[0, 32, 56, 102], [0, 8, 16, 102]])
def test_on_a_cpu_shards_in_whole_units_have_the_bits_of_the_whole(starts, bounds):
    """Where every shard holds all keys, a row of a scene has the same bits wherever the shards end."""
    q, k, v = draw(torch.float32)
    attention = scened(starts)
    far = tuple(x.unflatten(1, (FRAMES, FRAME_TOKENS))[:, :, :2].flatten(1, 2) for x in (k, v))
    for thinned in (None, far):
        whole = attention.dual(q, k, v, 0, 0, dtype=q.dtype, far=thinned)
        parts = [
            attention.dual(q[:, a:b], k, v, a, 0, dtype=q.dtype, far=thinned) for a, b in itertools.pairwise(bounds)
        ]
        for branch in (0, 1):
            for what in (0, 1):  # out and lse
                assert torch.equal(torch.cat([part[branch][what] for part in parts], 1), whole[branch][what])
