"""Attention inside a compiled block: one operator for each branch, with the numbers of eager attention and no window written out."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from freespec import attention
from freespec.attention import WindowedAttention
from freespec.kernels import KERNELS, cpu_flash, kernel_at, key_of, plain
from tests.freespec.cases import Video
from tests.inductor import buffers, code_of

VIDEO = Video(num_frames=20, frame_tokens=16, window_frames=5, batch=1, heads=2, dim=8)
LAYER = WindowedAttention(num_frames=20, frame_tokens=16, window_frames=5, kernel=cpu_flash)
SEEN = attention.table_of([range(max(0, frame - 3), frame + 1) for frame in range(20)])
QKV = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def no_remarks() -> Iterator[None]:
    """Dynamo warns about torch's own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.compiler.reset()


def scaled(qkv: QKV) -> QKV:
    """As tensors that the graph makes, which a compiler may lay out as it likes."""
    q, k, v = (x * 1.5 for x in qkv)
    return q, k, v


CALLS: dict[str, Callable[[QKV], Any]] = {
    "dense": lambda qkv: LAYER.dense(*scaled(qkv)),
    "far": lambda qkv: LAYER.far(*scaled(qkv)),
    "local": lambda qkv: LAYER.local(*scaled(qkv), 0, 0),
    "dual": lambda qkv: LAYER.dual(*scaled(qkv), 0, 0, dtype=torch.float32),
    "frames": lambda qkv: LAYER.frames(*scaled(qkv), SEEN),
    "views": lambda qkv: list(LAYER.views(*scaled(qkv), (0, 2, 15))),
}


@pytest.mark.parametrize("name", CALLS)
def test_generated_code_has_no_buffer_larger_than_its_inputs(name: str) -> None:
    qkv = tuple(x.float() for x in VIDEO.qkv(0))
    code = code_of(CALLS[name], qkv)
    operator = {"dual": "branches", "far": "dense", "views": "dense"}.get(name, name)
    assert f"torch.ops.freespec.{operator}.default(" in code
    assert max(buffers(code)) <= qkv[0].numel()


def test_windows_that_overlap_would_be_written_out() -> None:
    """The negative control: 16 windows of 5 frames as strided views of 20 frames, without an operator around them."""

    def windows(qkv: QKV) -> tuple[Tensor, Tensor]:
        q, k, v = scaled(qkv)
        k, v = (x[0].unfold(0, 80, 16).transpose(-1, -2) for x in (k, v))
        return cpu_flash(q[0, :256].unflatten(0, (16, 16)).transpose(1, 2), k, v)

    qkv = tuple(x.float() for x in VIDEO.qkv(0))
    code = code_of(windows, qkv)
    assert "_scaled_dot_product_flash_attention_for_cpu" in code
    assert max(buffers(code)) == 4 * qkv[0].numel()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_eager_attention(name: str, dtype: torch.dtype) -> None:
    qkv = tuple(x.to(dtype) for x in VIDEO.qkv(1))
    expected = torch.utils._pytree.tree_leaves(CALLS[name](qkv))
    actual = torch.utils._pytree.tree_leaves(torch.compile(CALLS[name], backend="aot_eager", fullgraph=True)(qkv))
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_keys_of_a_ring_and_another_kernel_for_the_rest() -> None:
    """Keys as they lie in a message, kv [r, 2, B, n, D]; queries of some frames; the complement by another kernel."""
    q, k, v = (x.float() for x in VIDEO.qkv(2))
    kv = torch.stack((k.transpose(0, 1), v.transpose(0, 1)), dim=1)
    layer = WindowedAttention(num_frames=20, frame_tokens=16, window_frames=5, kernel=cpu_flash, rest_kernel=plain)

    def both(q: Tensor, kv: Tensor) -> Any:
        k, v = (x.transpose(0, 1) for x in kv.unbind(1))
        near = layer.dual(q[:, 40:100], k, v, 40, 0, dtype=torch.float64)
        return near, layer.far(q, k[:, :30], v[:, :30])

    expected = torch.utils._pytree.tree_leaves(both(q, kv))
    actual = torch.utils._pytree.tree_leaves(torch.compile(both, backend="aot_eager", fullgraph=True)(q, kv))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("heads", [2, 0])
def test_operators_say_their_shapes(heads: int) -> None:
    q, k, v = (x.float()[:, :, :heads] for x in VIDEO.qkv(3))
    numbers = [20, 16, 5, 0, 0, 0]
    torch.library.opcheck(attention.dense_op, (q, k, v, "cpu_flash"))
    torch.library.opcheck(attention.local_op, (q, k, v, "cpu_flash", numbers))
    for far in ([], [k[:, ::2], v[:, ::2]]):
        torch.library.opcheck(attention.dual_op, (q, k, v, far, "cpu_flash", "plain", numbers, torch.float64))


def test_a_kernel_is_found_again_by_its_key() -> None:
    assert {key_of(kernel): kernel for kernel in KERNELS.values()} == KERNELS

    def made() -> Callable[..., Any]:
        def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return plain(q, k, v)

        return kernel

    one, other = made(), made()
    assert kernel_at(key_of(one)) is one
    assert kernel_at(key_of(other)) is other
    key = key_of(one)
    del one
    with pytest.raises(KeyError):
        kernel_at(key)
