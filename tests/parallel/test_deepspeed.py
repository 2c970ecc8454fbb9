"""DeepSpeed's all-to-all gives the bits of torch's, and what it cannot serve is refused before any rank communicates."""

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from parallel.attention import TORCH_EXCHANGE
from parallel.deepspeed import DeepSpeedExchange, deepspeed_exchange
from parallel.shards import LayerShape, SequencePlan, layer_bytes, length
from tests.parallel.worlds import ByteCount, seeded, small_mesh
from tests.ranks import run_ranks

EVEN = SequencePlan(tokens=12, heads=4, ring=1, ulysses=4)


@pytest.mark.parametrize(
    ("tokens", "heads", "reason"),
    [
        (13, 4, r"13 tokens over 4 ranks are not: \[3, 3, 3, 4\]"),
        (12, 6, r"6 heads over 4 ranks are not: \[1, 2, 1, 2\]"),
    ],
)
def test_uneven_shares_are_refused(tokens: int, heads: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        deepspeed_exchange(SequencePlan(tokens=tokens, heads=heads, ring=1, ulysses=4))
    sizes = {"token_sizes": [tokens // 4, tokens - tokens // 4], "head_sizes": [heads // 4, heads - heads // 4]}
    with pytest.raises(ValueError, match="DeepSpeed's all-to-all takes even shares only"):
        DeepSpeedExchange(layer=sys).heads_to_tokens(torch.ones(1), group=mock.Mock(), trace=mock.Mock(), **sizes)


def test_a_missing_package_is_one_clear_line() -> None:
    with (
        mock.patch.dict(sys.modules, {"deepspeed": None}),
        pytest.raises(ImportError, match="needs the optional package deepspeed"),
    ):
        deepspeed_exchange(EVEN)


def compare_providers(rank: int, batch: int) -> None:
    mesh, plan, theirs, ours = small_mesh(ulysses=4), EVEN, ByteCount(), ByteCount()
    exchange = deepspeed_exchange(plan)
    qkv = [seeded(batch, plan.tokens, plan.heads, 2, seed=seed)[:, slice(*plan.shards[rank])] for seed in range(3)]
    link = {
        "group": mesh.ulysses.group,
        "token_sizes": [length(shard) for shard in plan.shards],
        "head_sizes": [length(share) for share in plan.head_shares],
    }
    expected = TORCH_EXCHANGE.tokens_to_heads(qkv, trace=ours.trace(), **link)
    inner = exchange.tokens_to_heads(qkv, trace=theirs.trace(), **link)
    assert all(torch.equal(a, b) for a, b in zip(inner, expected, strict=True))
    TORCH_EXCHANGE.heads_to_tokens(inner[0], trace=ours.trace(), **link)
    assert torch.equal(exchange.heads_to_tokens(inner[0], trace=theirs.trace(), **link), qkv[0])
    shape = LayerShape(batch=batch, head_dim=2, itemsize=8)
    sent = layer_bytes(plan, rank, "global", shape=shape, halo=lambda start, stop: (0, plan.tokens))["all_to_all"]
    assert theirs.sent == ours.sent == {"all_to_all": sent}


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the optional package deepspeed is not installed"
)
def test_both_providers_move_the_same_bits(tmp_path: Path) -> None:
    run_ranks(4, compare_providers, [1, 2], tmp_path)
