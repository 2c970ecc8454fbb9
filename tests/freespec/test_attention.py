"""Both branches from dense calls against explicit masks: whole videos, parts of the sequence, empty sets of keys."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from freespec import attention, windows
from freespec.attention import WindowedAttention, masked_ref, merge
from freespec.kernels import Kernel, cpu_flash, cuda_cudnn, cuda_efficient, cuda_flash, plain
from tests.freespec.cases import Video, assert_low_precision, assert_same_math, drawn, seeds, videos

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LONG = Video(num_frames=11, frame_tokens=3, window_frames=4, batch=2, heads=2, dim=8)


def spied(kernel: Kernel) -> Kernel:
    """The kernel, and an error if it is ever called without queries, keys or heads: some crash on those."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert min(*q.shape, *k.shape, *v.shape) > 0
        return kernel(q, k, v)

    return call


def windowed(video: Video, kernel: Kernel = cpu_flash) -> WindowedAttention:
    return WindowedAttention(
        num_frames=video.num_frames,
        frame_tokens=video.frame_tokens,
        window_frames=video.window_frames,
        kernel=spied(kernel),
    )


def expected(video: Video, qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(out_local, out_global) by masks."""
    sizes = {"frame_tokens": video.frame_tokens}
    return (
        masked_ref(*qkv, **sizes, window_frames=video.window_frames),
        masked_ref(*qkv, **sizes, window_frames=None),
    )


def check_both(video: Video, seed: int, kernel: Kernel = cpu_flash) -> None:
    qkv = video.qkv(seed)
    for actual, exact in zip(windowed(video, kernel).both(*qkv), expected(video, qkv), strict=True):
        assert_same_math(actual, exact)


@drawn
@given(video=videos(), seed=seeds)
@pytest.mark.parametrize("kernel", [plain, cpu_flash])
def test_both_branches_equal_masked_attention(kernel: Kernel, video: Video, seed: int) -> None:
    check_both(video, seed, kernel)


def test_negative_control_window_shifted_by_one_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    check_both(LONG, 0)
    rule = windows.window_start
    monkeypatch.setattr(windows, "window_start", lambda frame, *sizes: rule(frame + 1, *sizes))
    with pytest.raises(AssertionError):
        check_both(LONG, 0)


def test_negative_control_circle_that_starts_one_token_early(monkeypatch: pytest.MonkeyPatch) -> None:
    circle = attention._circle
    monkeypatch.setattr(attention, "_circle", lambda x, start, wrapped: circle(x.roll(1, dims=1), start, wrapped))
    with pytest.raises(AssertionError):
        check_both(LONG, 0)


def test_negative_control_merge_without_the_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "merge", lambda a, za, b, zb: ((a + b) / 2, za))
    with pytest.raises(AssertionError):
        check_both(LONG, 0)


def test_no_key_is_copied_for_the_windows() -> None:
    q, k, v = LONG.qkv(0)
    owners = {x.untyped_storage().data_ptr() for x in (k, v)}

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert {x.untyped_storage().data_ptr() for x in (k, v)} <= owners
        return plain(q, k, v)

    windowed(LONG, kernel).local(q, k, v, 0, 0)
    with pytest.raises(AssertionError):  # the control: the rest of the keys is written out as a circle
        windowed(LONG, kernel).rest(q, k, v, 0, 0)


@drawn
@given(video=videos(), seed=seeds, cuts=st.tuples(*[st.floats(0, 1)] * 4))
def test_any_part_of_the_queries_and_keys(video: Video, seed: int, cuts: tuple[float, ...]) -> None:
    """A shard: queries [a, b), keys from its halo on. Local, and rest + far keys = global, equal the rows of the whole."""
    q, k, v = video.qkv(seed)
    layer = windowed(video)
    q_start, q_stop = sorted(round(x * video.num_tokens) for x in cuts[:2])
    halo = layer.halo(q_start, q_stop)
    k_start, k_stop = round(cuts[2] * halo[0]), halo[1] + round(cuts[3] * (video.num_tokens - halo[1]))
    q_part, near = q[:, q_start:q_stop], (k[:, k_start:k_stop], v[:, k_start:k_stop])
    exact_local, exact_global = (x[:, q_start:q_stop] for x in expected(video, (q, k, v)))

    out_local, lse_local = layer.local(q_part, *near, q_start, k_start)
    assert_same_math(out_local, exact_local)
    state = merge(out_local, lse_local, *layer.rest(q_part, *near, q_start, k_start))
    for far in (slice(0, k_start), slice(k_stop, None)):
        state = merge(*state, *layer.dense(q_part, k[:, far], v[:, far]))
    assert_same_math(state[0], exact_global)


def test_negative_control_of_the_parts() -> None:
    """A key offset that is wrong by a frame is seen, and keys that miss a part of the window are an error."""
    q, k, v = LONG.qkv(0)
    layer, rows = windowed(LONG), slice(15, 20)
    start, stop = layer.halo(15, 20)
    keys = k[:, start:stop], v[:, start:stop]
    exact = expected(LONG, (q, k, v))[0][:, rows]
    assert_same_math(layer.local(q[:, rows], *keys, 15, start)[0], exact)
    with pytest.raises(AssertionError):
        early = k[:, start - 3 : stop], v[:, start - 3 : stop]
        assert_same_math(layer.local(q[:, rows], *early, 15, start)[0], exact)
    for branch in (layer.local, layer.rest):
        with pytest.raises(ValueError, match=r"keys \[10, 24\) do not cover the window \[9, 21\)"):
            branch(q[:, rows], k[:, 10:24], v[:, 10:24], 15, 10)
        with pytest.raises(ValueError, match=r"keys \[9, 23\) do not cover the window \[12, 24\)"):
            branch(q[:, rows], k[:, 9:23], v[:, 9:23], 15, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frame_tokens", [9, 30])
def test_on_a_cpu_a_row_of_queries_has_the_same_bits_in_any_part(dtype: torch.dtype, frame_tokens: int) -> None:
    video = Video(num_frames=13, frame_tokens=frame_tokens, window_frames=5, batch=1, heads=2, dim=64)
    q, k, v = (x.to(dtype) for x in video.qkv(0))
    branches = windowed(video)

    def both(start: int, stop: int) -> list[Tensor]:
        parts = branches.dual(q[:, start:stop], k, v, start, 0, dtype=dtype)
        return [x for part in parts for x in part]

    cuts = [0, 1, 8, 50, 51, 77, 113, q.shape[1]]
    pieces = zip(*(both(*span) for span in itertools.pairwise(cuts)), strict=True)
    for joined, whole in zip(pieces, both(0, q.shape[1]), strict=True):
        assert torch.equal(torch.cat(joined, dim=1), whole)
    # Negative control: keys in another order are other bits.
    turned = branches.dense(q, k.roll(7, dims=1), v.roll(7, dims=1))[1]
    assert not torch.equal(turned, branches.dense(q, k, v)[1])


def test_halo_is_the_union_of_the_windows() -> None:
    assert windowed(LONG).halo(15, 20) == (9, 24)
    assert windowed(LONG).halo(0, 33) == (0, 33)
    assert windowed(LONG).halo(5, 5) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_native_length_is_plain_attention_bit_for_bit(dtype: torch.dtype) -> None:
    """F <= F0: one dense call, both branches are its output."""
    for frames in (1, 3, 4):
        video = Video(num_frames=frames, frame_tokens=3, window_frames=4, batch=2, heads=2, dim=8)
        q, k, v = video.qkv(0, dtype)
        out_local, out_global = windowed(video).both(q, k, v)
        # Item by item, since the kernel may split its work by the size of the batch.
        exact = torch.cat([windowed(video).dense(*(x[i : i + 1] for x in (q, k, v)))[0] for i in range(2)])
        assert torch.equal(out_local, exact)
        assert torch.equal(out_global, exact)


def test_local_branch_of_a_dual_step_is_the_local_branch_alone() -> None:
    q, k, v = LONG.qkv(0, torch.float32)
    assert torch.equal(windowed(LONG).both(q, k, v)[0], windowed(LONG).local(q, k, v, 0, 0)[0])


@pytest.mark.parametrize("empty", ["queries", "keys", "heads"])
def test_empty_sets_call_no_kernel(empty: str) -> None:
    q, k, v = LONG.qkv(0, torch.bfloat16)
    if empty == "queries":
        q = q[:, :0]
    elif empty == "keys":
        k, v = k[:, :0], v[:, :0]
    else:
        q, k, v = (x[:, :, :0] for x in (q, k, v))
    layer = windowed(LONG)
    results = [layer.dense(q, k, v)]
    if empty != "keys":
        results += [layer.local(q, k, v, 0, 0), layer.rest(q, k, v, 0, 0)]
    for out, lse in results:
        assert torch.equal(out, torch.zeros_like(q))
        assert torch.equal(lse, torch.full(q.shape[:3], float("-inf")))


def test_negative_control_of_the_spy() -> None:
    q, k, v = (x.transpose(1, 2) for x in LONG.qkv(0))
    with pytest.raises(AssertionError):
        spied(plain)(q, k[:, :, :0], v[:, :, :0])


@drawn
@given(seed=seeds, sizes=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_merge_is_attention_over_the_union(seed: int, sizes: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, sum(sizes), 2, 4, generator=generator, dtype=torch.float64).unbind(0)
    dense, cut = windowed(LONG).dense, sizes[0]
    parts = dense(q, k[:, :cut], v[:, :cut]), dense(q, k[:, cut:], v[:, cut:])
    out, lse = merge(*parts[0], *parts[1])
    exact_out, exact_lse = dense(q, k, v)
    assert_same_math(out, exact_out)
    if sum(sizes):
        assert_same_math(lse, exact_lse)
    else:
        assert torch.equal(lse, exact_lse)  # -inf


def test_merge_of_two_empty_sets_is_empty_and_keeps_the_dtype() -> None:
    out, lse = torch.zeros(1, 2, 1, 4, dtype=torch.bfloat16), torch.full((1, 2, 1), float("-inf"))
    merged, merged_lse = merge(out, lse, out, lse)
    assert torch.equal(merged, out)
    assert torch.equal(merged_lse, lse)
    assert merged.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_merge_does_not_round_by_the_size_of_the_logits(size: float) -> None:
    """fp32 weights are exact to some roundings of 1; those from a log-sum-exp near 100 are off by 4e-6."""
    generator = torch.Generator().manual_seed(0)
    out_a, out_b = torch.randn(2, 1, 500, 3, 8, generator=generator).unbind(0)
    lse_a, lse_b = (size + torch.randn(2, 1, 500, 3, generator=generator)).unbind(0)
    exact, exact_lse = merge(out_a.double(), lse_a.double(), out_b.double(), lse_b.double())
    out, lse = merge(out_a, lse_a, out_b, lse_b)
    assert relative_error(out, exact) < 2**-22
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2**-22, atol=2**-22)
    if size == 100.0:  # the control
        total = torch.logaddexp(lse_a, lse_b)
        rounded = out_a * torch.exp(lse_a - total)[..., None] + out_b * torch.exp(lse_b - total)[..., None]
        assert relative_error(rounded, exact) > 2**-20


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def test_merge_of_far_apart_logits_is_finite() -> None:
    out = torch.ones(1, 1, 1, 2)
    merged, lse = merge(out, torch.full((1, 1, 1), 300.0), 3 * out, torch.full((1, 1, 1), -300.0))
    assert torch.equal(merged, out)
    assert lse.item() == 300.0


def plain_torch(video: Video, qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both branches in the dtype of the arguments: logits, mask, softmax, values."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    frame = torch.arange(video.num_tokens, device=q.device) // video.frame_tokens
    start = (frame - video.window_frames // 2).clamp(0, video.num_frames - video.window_frames)[:, None]
    outside = (frame < start) | (frame >= start + video.window_frames)
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    out_local = logits.masked_fill(outside, float("-inf")).softmax(-1) @ v
    return out_local.transpose(1, 2), (logits.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(
    ("kernel", "dtype", "device"),
    [
        pytest.param(cpu_flash, torch.float32, "cpu", id="cpu_flash-fp32"),
        pytest.param(cpu_flash, torch.bfloat16, "cpu", id="cpu_flash-bf16"),
        pytest.param(cuda_flash, torch.bfloat16, "cuda", id="cuda_flash-bf16", marks=gpu),
        pytest.param(cuda_cudnn, torch.bfloat16, "cuda", id="cuda_cudnn-bf16", marks=gpu),
        pytest.param(cuda_efficient, torch.float32, "cuda", id="cuda_efficient-fp32", marks=gpu),
        pytest.param(cuda_efficient, torch.bfloat16, "cuda", id="cuda_efficient-bf16", marks=gpu),
    ],
)
@pytest.mark.parametrize("window_frames", [4, 5])
def test_low_precision_of_both_branches(kernel: Kernel, dtype: torch.dtype, device: str, window_frames: int) -> None:
    video = Video(num_frames=13, frame_tokens=40, window_frames=window_frames, batch=2, heads=3, dim=64)
    qkv = video.qkv(0, dtype, device)
    exact = expected(video, qkv)
    actual = windowed(video, kernel).both(*qkv)
    for branch, twin in enumerate(plain_torch(video, qkv)):
        assert_low_precision(actual[branch], twin, exact[branch])
        with pytest.raises(AssertionError):  # the control: the other branch is not within rounding
            assert_low_precision(actual[1 - branch], twin, exact[branch])


@pytest.mark.parametrize("tokens", [1, 2048, 2049, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_into_the_first_is_merging(tokens: int, dtype: torch.dtype) -> None:
    """A chunk at a time and in place, with rows that have no key: the same bits as the pure function on the whole."""
    generator = torch.Generator().manual_seed(0)
    out, part = torch.randn(2, 1, tokens, 2, 4, generator=generator).to(dtype).unbind(0)
    lse, part_lse = torch.randn(2, 1, tokens, 2, generator=generator).unbind(0)
    lse[:, ::3], part_lse[:, ::2] = float("-inf"), float("-inf")
    expected, expected_lse = merge(out, lse, part, part_lse)
    attention.merge_into(out, lse, part, part_lse)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert not torch.equal(out, part)


def test_the_global_branch_of_a_dual_call_in_fp32_rounds_once() -> None:
    """More keys may follow on a ring: what is merged so far is not rounded to the dtype of q."""
    q, k, v = LONG.qkv(0, torch.bfloat16)
    (local, _), (o_global, lse) = windowed(LONG).dual(q, k, v, 0, 0, dtype=torch.float32)
    _, (rounded, _) = windowed(LONG).dual(q, k, v, 0, 0, dtype=torch.bfloat16)
    assert (local.dtype, o_global.dtype, lse.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(o_global.to(torch.bfloat16), rounded)
    assert not torch.equal(o_global, rounded.float())
