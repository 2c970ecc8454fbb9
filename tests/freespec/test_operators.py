"""Parts of the fusions inside a compiled block: one operator each, so that pieces are not kept until the last is done."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from freespec import components, lowpass, spectrum
from tests.inductor import buffers, code_of

SIZE = (8, 4, 4)
FRAMES, TOKENS, HEADS, DIM = 8, 128, 4, 16
MATRICES = tuple(lowpass.blur_matrix(size, 0.25).float() for size in SIZE)
Call = Callable[[Callable[..., Tensor], Tensor, Tensor], Tensor]


def small(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


MATRIX, LAM = small(1, HEADS, DIM, DIM), torch.tensor(0.3).double()
MIXING = small(1, FRAMES, FRAMES), small(1, FRAMES, FRAMES)
CALLS: dict[str, tuple[Callable[..., Tensor], Call]] = {
    "gram": (spectrum.gram, lambda function, local, _wide: function(local)),
    "gram_of_parts": (
        spectrum.gram_of_parts,
        lambda function, local, _wide: function(local, spectrum.largest_of_heads(local), 20),
    ),
    "reconstruct": (
        spectrum.reconstruct,
        lambda function, local, o_global: function(local, MATRIX, o_global, LAM, "lerp"),
    ),
    "add_low": (
        lowpass.add_low,
        lambda function, local, o_global: function(local, local, o_global, MATRICES, size=SIZE),
    ),
    "temporal_grams": (components.temporal_grams, lambda function, local, o_global: function(local, o_global, FRAMES)),
    "mix_frames": (
        components.mix_frames,
        lambda function, local, o_global: function(local, o_global, MIXING),
    ),
}


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces of 32 tokens; dynamo warns about torch's own code."""
    monkeypatch.setattr(spectrum, "CHUNK_TOKENS", 32)
    monkeypatch.setattr(spectrum, "FP64_TOKENS", 32)
    monkeypatch.setattr(components, "CHUNK_VALUES", 8 * DIM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.compiler.reset()


def branches(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two outputs [1, S, N, D] whose memory is not in that order."""
    local, o_global = small(2, 1, HEADS, TOKENS, DIM).to(dtype).transpose(2, 3).unbind(0)
    return local, o_global


@pytest.mark.parametrize("name", CALLS)
def test_generated_code_keeps_no_pieces(name: str) -> None:
    function, call = CALLS[name]
    made = tuple(x.contiguous() for x in branches(torch.bfloat16))
    with torch.no_grad():
        code = code_of(lambda local, o_global: call(function, local, o_global), *made)
        assert f"torch.ops.freespec.{name}.default(" in code
        assert sum(buffers(code)) <= made[0].numel() // 4  # of matrices that are arguments
        # The negative control: the same function as a compiler would unroll it.
        unrolled = code_of(lambda local, o_global: call(function.__wrapped__, local, o_global), *made)  # type: ignore[attr-defined]
    assert len(unrolled.splitlines()) > 2 * len(code.splitlines())
    if name in ("reconstruct", "add_low", "mix_frames"):
        assert sum(buffers(unrolled)) > 2 * made[0].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_block_has_the_same_numbers(name: str, dtype: torch.dtype) -> None:
    function, call = CALLS[name]
    made = branches(dtype)
    compiled = torch.compile(
        lambda local, o_global: call(function, local, o_global) * 1.0, fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        assert torch.equal(compiled(*made), call(function, *made))
