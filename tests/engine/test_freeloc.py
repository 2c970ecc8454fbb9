"""A whole run of FreeLOC on each family equals a run whose layers are written out pair by pair; layers that do not exist are refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import apply_method
from engine.adapters import ModelAdapter
from engine.errors import UserError
from freespec.methods import FreeLOC, Grid
from tests.freespec.freeloc_twin import anchored, attend, positions, seen_when_sparse
from tests.tiny_pipelines import random_ltx, random_wan

CALL = {"prompt": "a red circle", "num_inference_steps": 2, "guidance_scale": 4.0, "max_sequence_length": 20}
FAMILIES = {
    "Wan": (
        random_wan,
        {"height": 32, "width": 48, "num_frames": 29},
        Grid(frames=8, rows=4, columns=6, window_frames=3),
    ),
    "LTX": (
        random_ltx,
        {"height": 64, "width": 32, "num_frames": 57},
        Grid(frames=8, rows=4, columns=2, window_frames=3),
    ),
}
METHOD = FreeLOC(sparse_layers=(1,), striped_frames=4, last_frames=1)


class PairByPair:
    """Attention of one layer by the twin, from q and k that the model did not rotate."""

    def __init__(self, adapter: ModelAdapter, grid: Grid, method: FreeLOC, layer: int) -> None:
        self.adapter, self.grid = adapter, grid
        sparse = layer in method.sparse_layers
        self.relative = anchored(grid, method) if sparse else positions(grid, method)
        self.mask = seen_when_sparse(grid, method) if sparse else None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert rotary_emb is not None
        cos, sin = rotary_emb
        q, k, v = self.adapter.qkv(attn, hidden_states, (torch.ones_like(cos), torch.zeros_like(sin)))
        tables = tuple(x[0].flatten(1).unflatten(-1, (-1, q.shape[-1])) for x in (cos, sin))
        return self.adapter.project_out(
            attn, attend((q, k, v), tables, self.grid, self.relative, self.mask).to(q.dtype)
        )


def latents_of(pipe: Any, size: dict[str, int]) -> Tensor:
    return pipe(**(CALL | size), generator=torch.Generator().manual_seed(3), output_type="latent").frames


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_equals_one_written_out_pair_by_pair(family: str) -> None:
    make, size, grid = FAMILIES[family]
    ours = make().to(torch.float64)
    with apply_method(ours, method=METHOD, window_frames=grid.window_frames) as handle:
        made = latents_of(ours, size)
        assert handle.state.last.grid == grid

    def written_out(method: FreeLOC) -> Tensor:
        pipe = make().to(torch.float64)
        adapter = handle.state.setup.adapter
        for layer, attn in enumerate(adapter.attention_modules(pipe.transformer)):
            attn.set_processor(PairByPair(adapter, grid, method, layer))
        return latents_of(pipe, size)

    def error(method: FreeLOC) -> float:
        theirs = written_out(method)
        return float((made - theirs).norm() / theirs.norm())

    assert error(METHOD) < 1e-5  # the model's table is in fp32
    assert error(replace(METHOD, near_frames=1)) > 1e-4  # the negative control: one position another


def test_layers_that_a_model_lacks_are_refused() -> None:
    with pytest.raises(UserError, match="freeloc: sparse_layers has layer 2, and the model has 2, 0 to 1"):
        apply_method(random_wan(), method="freeloc", window_frames=3, sparse_layers=(2,))
