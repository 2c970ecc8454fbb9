"""The Triton kernel of both branches against masked attention in fp64, run by Triton's interpreter on the CPU.

The interpreter is chosen when triton is imported, and other tests may have imported it: the kernel runs in a process of
its own, which stays for all cases.
"""

import importlib.util
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from freespec.attention import WindowedAttention
from freespec.kernels import plain, select_dual
from freespec.thinning import kept_tokens
from tests.freespec.cases import Video, assert_low_precision

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; it comes with torch for CUDA on Linux"
)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SMALL_TILES = (16, 16)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A video, a part of its queries and keys, and how they lie in memory."""

    video: Video
    dtype: torch.dtype = torch.float32
    queries: tuple[int, int] | None = None
    keys: tuple[int, int] | None = None
    global_dtype: torch.dtype | None = None
    tiles: tuple[int, int] = SMALL_TILES
    heads_first: bool = False  # [B, N, S, D] in memory, as some kernels leave it
    kept: int | None = None  # tokens of a frame that are far keys

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the video."""
        q, k, v = self.video.qkv(0, self.dtype)
        if self.heads_first:
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def far_index(self) -> Tensor | None:
        """Tokens of the video that are far keys; None if all are attended."""
        tokens = self.video.frame_tokens
        sizes = {"num_frames": self.video.num_frames, "layers": 1, "step": 3}
        return None if self.kept is None else kept_tokens(1, tokens, kept=self.kept, **sizes)[0]

    def parts(self) -> tuple[tuple[Tensor, Tensor, Tensor], int, int]:
        """q, k, v of the part, and where q and k start."""
        q, k, v = self.whole()
        a, b = self.queries or (0, self.video.num_tokens)
        c, d = self.keys or (0, self.video.num_tokens)
        return (q[:, a:b], k[:, c:d], v[:, c:d]), a, c


WHOLE = Video(num_frames=7, frame_tokens=9, window_frames=3, batch=2, heads=2, dim=16)


def windowed(video: Video, dual_kernel: Any) -> WindowedAttention:
    return WindowedAttention(
        num_frames=video.num_frames,
        frame_tokens=video.frame_tokens,
        window_frames=video.window_frames,
        kernel=plain,
        dual_kernel=dual_kernel,
    )


def run(case: Case, device: str = "cpu") -> tuple[Tensor, ...]:
    """What the kernel makes of a case: out_local, lse_local, out_global, lse_global."""
    from freespec.triton_dual import Tiles, dual  # noqa: PLC0415 - in the process with the interpreter

    qkv, q_start, k_start = case.parts()
    tiles = Tiles(queries=case.tiles[0], keys=case.tiles[1], warps=4, stages=1)
    layer = windowed(case.video, lambda *args, **kwargs: dual(*args, **kwargs, tiles=tiles))
    q, k, v = (x.to(device) for x in qkv)
    far, index = None, case.far_index()
    if index is not None:
        far_k, far_v = (x.to(device)[:, index] for x in case.whole()[1:])
        far = far_k, far_v
    local, o_global = layer.dual(q, k, v, q_start, k_start, dtype=case.global_dtype or case.dtype, far=far)
    return tuple(x.cpu() for x in (*local, *o_global))


def run_grams(case: Case, tiles_of_a_run: int) -> tuple[Tensor, ...]:
    """Outputs and Gram matrices, with programs that do at least so many blocks each."""
    from freespec import triton_dual  # noqa: PLC0415

    qkv, q_start, k_start = case.parts()
    blocks = -(-qkv[0].shape[1] // case.tiles[0])
    triton_dual.GRAM_SLOTS = -(-blocks // tiles_of_a_run)
    sizes = (case.video.num_frames, case.video.frame_tokens, case.video.window_frames)
    names = ("num_frames", "frame_tokens", "window_frames")
    out = triton_dual.dual(
        qkv,
        q_start=q_start,
        k_start=k_start,
        **dict(zip(names, sizes, strict=True)),
        global_dtype=case.dtype,
        grams=True,
        tiles=triton_dual.Tiles(queries=case.tiles[0], keys=case.tiles[1], warps=4, stages=1),
    )
    return out.out_local, out.out_global, out.grams


def count_graphs(layers: int) -> tuple[int, bool]:
    """Compiled graphs of that many layers which share one function, and whether they gave what they give uncompiled."""
    import torch._dynamo.testing  # noqa: PLC0415

    from freespec.triton_dual import dual  # noqa: PLC0415

    q, k, v = WHOLE.qkv(0, torch.float32)
    layer = windowed(WHOLE, dual)
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def block(x: Tensor) -> Tensor:
        local, o_global = layer.dual(x, k, v, 0, 0, dtype=x.dtype)
        return local[0] + o_global[0]

    compiled = plainly = q
    for _ in range(layers):
        compiled = block(compiled)
        local, o_global = layer.dual(plainly, k, v, 0, 0, dtype=q.dtype)
        plainly = local[0] + o_global[0]
    return counter.frame_count, torch.equal(compiled, plainly)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """One process, started fresh, in which kernels are interpreted."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setenv("OMP_NUM_THREADS", "1")
            pool.submit(int).result()  # the process starts here
        yield pool


def exact(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The case by explicit masks in `dtype`: out_local, lse_local, out_global, lse_global."""
    (q, k, v), q_start, k_start = case.parts()
    video = case.video
    frame = (q_start + torch.arange(q.shape[1])) // video.frame_tokens
    key_frame = (k_start + torch.arange(k.shape[1])) // video.frame_tokens
    first = (frame - video.window_frames // 2).clamp(0, max(video.num_frames - video.window_frames, 0))[:, None]
    weight = torch.ones(k.shape[1])
    index = case.far_index()
    if index is not None:  # far keys are those of the whole video, and count as often as tokens are left out
        _, k, v = case.whole()
        key_frame = torch.arange(video.num_tokens) // video.frame_tokens
        weight = torch.zeros(video.num_tokens)
        weight[index] = video.num_tokens / len(index)
    outside = (key_frame < first) | (key_frame >= first + video.window_frames)
    logits = torch.einsum("bsnd,bknd->bnsk", q.to(dtype), k.to(dtype)) / q.shape[-1] ** 0.5
    results: list[Tensor] = []
    for count in (torch.zeros(()), weight):
        seen = logits + torch.where(outside, count, 1.0).log().to(dtype)
        out = torch.einsum("bnsk,bknd->bsnd", seen.softmax(-1), v.to(dtype))
        results += [out, seen.logsumexp(-1).transpose(1, 2)]
    return tuple(results)


def check(case: Case, actual: tuple[Tensor, ...]) -> None:
    """At most twice as far from fp64 as plain torch in the dtype of the case."""
    for got, right, plainly in zip(actual, exact(case, torch.float64), exact(case, case.dtype), strict=True):
        assert_low_precision(got, plainly.to(got.dtype), right)


def video(frames: int, tokens: int, window: int, dim: int, *, batch: int = 1, heads: int = 1) -> Video:
    return Video(num_frames=frames, frame_tokens=tokens, window_frames=window, batch=batch, heads=heads, dim=dim)


@needs_triton
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(video=video(5, 9, 3, 16, batch=2, heads=2)), id="blocks that cross frames"),
        pytest.param(Case(video=video(5, 9, 3, 16, batch=2, heads=2), dtype=torch.bfloat16), id="bf16"),
        pytest.param(Case(video=video(5, 9, 3, 16, batch=2, heads=2), dtype=torch.float16), id="fp16"),
        pytest.param(Case(video=video(5, 23, 2, 64)), id="frames of several blocks, even window"),
        pytest.param(Case(video=video(13, 3, 4, 128, batch=2, heads=2)), id="blocks of more frames than a window"),
        pytest.param(Case(video=video(4, 16, 3, 24)), id="padded head dim, frames of whole blocks"),
        pytest.param(Case(video=video(4, 11, 3, 3, batch=2, heads=3)), id="head dim below the smallest tile"),
        pytest.param(Case(video=video(3, 10, 4, 32, batch=2, heads=2)), id="shorter than a window"),
        pytest.param(Case(video=video(3, 10, 3, 32, batch=2, heads=2)), id="as long as a window: nothing is left over"),
        pytest.param(Case(video=video(5, 7, 1, 16, batch=2, heads=3)), id="windows of one frame"),
        pytest.param(Case(video=video(9, 13, 3, 32), heads_first=True, tiles=(32, 16)), id="heads first in memory"),
    ],
)
def test_both_branches_of_a_video(interpreter: ProcessPoolExecutor, case: Case) -> None:
    check(case, interpreter.submit(run, case).result())


SHARDS = {
    "head": ((0, 17), (0, 60)),
    "head and middle, a frame cut": ((5, 51), (0, 90)),
    "middle": ((39, 65), (26, 91)),
    "one query": ((58, 59), (39, 78)),
    "keys are the windows alone": ((58, 63), (39, 78)),
    "tail": ((100, 117), (70, 117)),
    "all keys": ((30, 60), (0, 117)),
}


@needs_triton
@pytest.mark.parametrize("shard", SHARDS)
def test_a_shard_of_the_queries_and_keys(interpreter: ProcessPoolExecutor, shard: str) -> None:
    queries, keys = SHARDS[shard]
    # Some heads, for enough numbers: with five queries of one, which of two kernels rounds better is chance, and the machine's.
    case = Case(video=video(9, 13, 3, 16, batch=2, heads=3), queries=queries, keys=keys)
    check(case, interpreter.submit(run, case).result())


@needs_triton
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(video=video(9, 13, 3, 16, batch=2, heads=2), kept=4), id="a third"),
        pytest.param(
            Case(video=video(9, 13, 4, 24, heads=2), kept=12, heads_first=True), id="all but one, even window"
        ),
        pytest.param(Case(video=video(40, 5, 3, 16), kept=1), id="blocks of more far frames than a window"),
        pytest.param(Case(video=video(3, 10, 4, 32, heads=2), kept=3), id="shorter than a window: none is far"),
        pytest.param(Case(video=video(7, 9, 3, 16, heads=2), kept=2, dtype=torch.bfloat16), id="bf16"),
    ],
)
def test_far_keys_of_a_video(interpreter: ProcessPoolExecutor, case: Case) -> None:
    check(case, interpreter.submit(run, case).result())
    every = replace(case, kept=None)
    if case.video.num_frames > case.video.window_frames:
        with pytest.raises(AssertionError):
            check(every, interpreter.submit(run, case).result())


@needs_triton
@pytest.mark.parametrize("shard", SHARDS)
def test_far_keys_of_a_shard(interpreter: ProcessPoolExecutor, shard: str) -> None:
    """The keys of the shard serve its windows alone; far keys are of the whole video."""
    queries, keys = SHARDS[shard]
    case = Case(video=video(9, 13, 3, 16, batch=2, heads=3), queries=queries, keys=keys, kept=5)
    check(case, interpreter.submit(run, case).result())


@needs_triton
def test_the_global_branch_in_fp32_of_bf16_inputs(interpreter: ProcessPoolExecutor) -> None:
    case = Case(video=WHOLE, dtype=torch.bfloat16)
    rounded = interpreter.submit(run, case).result()[2]
    kept = interpreter.submit(run, Case(video=WHOLE, dtype=torch.bfloat16, global_dtype=torch.float32)).result()[2]
    assert (rounded.dtype, kept.dtype) == (torch.bfloat16, torch.float32)
    right = exact(case, torch.float64)[2]
    assert (kept.double() - right).norm() < (rounded.double() - right).norm()


@needs_triton
def test_negative_controls(interpreter: ProcessPoolExecutor) -> None:
    """A window that is wrong by a frame, a shard that is wrong by a token, and the branches exchanged: all are seen."""
    case = Case(video=WHOLE)
    actual = interpreter.submit(run, case).result()
    check(case, actual)
    longer = Case(video=Video(**{**{name: getattr(WHOLE, name) for name in WHOLE.__slots__}, "window_frames": 4}))
    shifted = Case(video=WHOLE, queries=(1, WHOLE.num_tokens))
    for wrong, result in (
        (longer, actual),
        (case, (*actual[2:], *actual[:2])),
        (shifted, tuple(x[:, :-1] for x in actual)),
        (case, (actual[0], actual[1] * 1.4427, *actual[2:])),  # lse in base 2
    ):
        with pytest.raises(AssertionError):
            check(wrong, result)


@needs_triton
@pytest.mark.parametrize(("dtype", "blocks_of_a_program"), [(torch.float32, 3), (torch.bfloat16, 1)])
def test_grams_are_those_of_the_rounded_outputs(
    interpreter: ProcessPoolExecutor, dtype: torch.dtype, blocks_of_a_program: int
) -> None:
    case = Case(video=video(5, 9, 3, 24, heads=2), dtype=dtype)
    *outs, grams = interpreter.submit(run_grams, case, blocks_of_a_program).result()
    assert grams.shape == (2, 1, 2, 24, 24)
    assert grams.dtype == torch.float64
    for out, gram in zip(outs, grams, strict=True):
        o = out.double().transpose(1, 2)
        right = o.transpose(-1, -2) @ o
        assert (gram - right).norm() < 1e-6 * right.norm()
        cut = o[:, :, :-1]  # the control: a token less is seen
        assert (gram - cut.transpose(-1, -2) @ cut).norm() > 1e-4 * right.norm()


@needs_triton
def test_a_compiled_block_has_one_graph_for_all_layers(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(count_graphs, 10).result() == (1, True)


def guards_of_a_launch() -> list[tuple[int, ...]]:
    """Shapes of the tensors whose device is made the current one, in one call."""
    seen: list[tuple[int, ...]] = []
    guard = torch.cuda.device_of

    def record(x: Tensor) -> Any:
        seen.append(tuple(x.shape))
        return guard(x)

    with mock.patch.object(torch.cuda, "device_of", record):
        run(Case(video=WHOLE))
    return seen


@needs_triton
def test_it_is_launched_on_the_device_of_its_tensors(interpreter: ProcessPoolExecutor) -> None:
    """Triton takes the current device, whatever the pointers; torch's operators take that of the tensors."""
    assert interpreter.submit(guards_of_a_launch).result() == [(2, 63, 2, 16)]


@needs_triton
def test_keys_that_miss_a_part_of_the_window_are_an_error(interpreter: ProcessPoolExecutor) -> None:
    case = Case(video=video(9, 13, 3, 16), queries=(58, 63), keys=(40, 78))
    with pytest.raises(
        ValueError, match=r"keys \[40, 78\) do not cover the window \[39, 78\) of the queries \[58, 63\)"
    ):
        interpreter.submit(run, case).result()


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "dim", "message"),
    [
        (torch.float64, 16, "bf16, fp16 or fp32, got torch.float64"),
        (torch.float32, 257, "head dims up to 256, got 257"),
    ],
)
def test_refusals(interpreter: ProcessPoolExecutor, dtype: torch.dtype, dim: int, message: str) -> None:
    case = Case(video=video(2, 2, 1, dim, heads=1), dtype=dtype)
    with pytest.raises(ValueError, match=re.escape(message)):
        interpreter.submit(run, case).result()


def test_auto_and_strided_are_the_strided_way() -> None:
    assert select_dual("auto", CPU, torch.float32) is None
    assert select_dual("strided", torch.device("cuda"), torch.bfloat16) is None


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("tritn", "cuda", torch.bfloat16, "unknown attention.dual 'tritn'; choose one of auto, strided, triton"),
        pytest.param("triton", "cpu", torch.float32, "triton does not run on cpu; use strided", marks=needs_triton),
        pytest.param("triton", "cuda", torch.float64, "not torch.float64; use strided", marks=needs_triton),
    ],
)
def test_select_dual_errors(name: str, device: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        select_dual(name, torch.device(device), dtype)


def test_a_missing_triton_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "freespec.triton_dual", None)
    with pytest.raises(ValueError, match=r"attention\.dual triton needs the triton package \(.*\); use strided"):
        select_dual("triton", torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=gpu) for dtype in DTYPES])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kept", [None, 13])
def test_on_a_gpu(dtype: torch.dtype, dim: int, kept: int | None) -> None:
    case = Case(video=video(7, 100, 3, dim, batch=2), dtype=dtype, tiles=(64, 32), kept=kept)
    check(case, run(case, "cuda"))
