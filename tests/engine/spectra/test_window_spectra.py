"""Spectra of windows: those of an SVD of masked attention, the same on any ranks, and beside an unchanged video."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.spectra.windows import WindowSpectra
from freespec.attention import WindowedAttention, masked_ref
from freespec.kernels import plain
from parallel.attention import TORCH_EXCHANGE, SequenceLayout
from parallel.collectives import CollectiveTrace, ignore_bytes
from parallel.mesh import build_mesh
from parallel.shards import SequencePlan, length
from tests.ranks import PATIENCE, run_ranks
from tests.tiny_pipelines import save_random_wan

FRAMES, FRAME_TOKENS, WINDOW, HEADS, DIM = 7, 5, 2, 3, 4


def qkv(heads: int = HEADS) -> tuple[torch.Tensor, ...]:
    shape = (3, 1, FRAMES * FRAME_TOKENS, heads, DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind(0)


def svd_twin(window_frames: int | None) -> list[tuple[float, float]]:
    """(effective rank, share of the first) of each head by SVD of attention with an explicit mask."""
    q, k, v = qkv()
    out = masked_ref(q, k, v, frame_tokens=FRAME_TOKENS, window_frames=window_frames)[0]
    found = []
    for head in range(HEADS):
        p = torch.linalg.svdvals(out[:, head])
        p = p / p.sum()
        found.append((float(torch.exp(-(p * p.log()).sum())), float(p[0])))
    return found


class Case(NamedTuple):
    ring: int
    ulysses: int
    on_shards: bool = False
    shift: int = 0


def rows_on_ranks(rank: int, case: Case) -> list[dict]:
    """What this rank records of one layer; its tokens and heads are those that the layout gives it."""
    mesh = build_mesh(cfg=1, ring=case.ring, ulysses=case.ulysses, device=torch.device("cpu"), timeout=PATIENCE)
    plan = SequencePlan(tokens=FRAMES * FRAME_TOKENS, heads=HEADS, ring=case.ring, ulysses=case.ulysses)
    layout = SequenceLayout(
        mesh=mesh, plan=plan, exchange=TORCH_EXCHANGE, trace=CollectiveTrace(label="test", on_bytes=ignore_bytes)
    )
    layout = layout.on_shards() if case.on_shards else layout
    shard = slice(layout.shard[0], layout.shard[0] + length(layout.shard))
    attention = WindowedAttention(num_frames=FRAMES, frame_tokens=FRAME_TOKENS, window_frames=WINDOW, kernel=plain)
    spectra = WindowSpectra()
    q, k, v = (x[:, shard] for x in qkv())
    spectra.observe(2, 5, layout.scatter(q, k, v.roll(case.shift, dims=1)), attention, layout)
    return spectra.rows


@pytest.mark.parametrize(
    "cases",
    [
        [Case(1, 1)],
        [Case(1, 2), Case(2, 1), Case(1, 2, on_shards=True)],
        [Case(1, 4), Case(4, 1), Case(2, 2), Case(2, 2, on_shards=True)],  # four ranks for three heads: one has none
    ],
    ids=["one rank", "two ranks", "four ranks"],
)
def test_every_layout_has_the_spectra_of_an_explicit_svd(cases: list[Case], tmp_path: Path) -> None:
    for by_rank in run_ranks(cases[0].ring * cases[0].ulysses, rows_on_ranks, cases, tmp_path):
        assert all(rows == by_rank[0] for rows in by_rank)
        rows = by_rank[0]
        assert {(row["layer"], row["step"]) for row in rows} == {(2, 5)}
        # Native 2 of 7 frames: 2, 4, 6, and the fourth window is the whole video.
        assert sorted({(row["multiple"], row["window_frames"]) for row in rows}) == [(1, 2), (2, 4), (3, 6), (3.5, 7)]
        for multiple, window in ((1, 2), (2, 4), (3, 6), (3.5, None)):
            found = [(row["effective_rank"], row["first_share"]) for row in rows if row["multiple"] == multiple]
            assert [row["head"] for row in rows if row["multiple"] == multiple] == [0, 1, 2]
            torch.testing.assert_close(torch.tensor(found), torch.tensor(svd_twin(window)), rtol=0, atol=1e-6)


def test_negative_control_values_that_are_one_token_off_are_caught(tmp_path: Path) -> None:
    (rows,) = run_ranks(1, rows_on_ranks, [Case(1, 1, shift=1)], tmp_path)[0]
    found = torch.tensor([row["effective_rank"] for row in rows if row["multiple"] == 1])
    assert (found - torch.tensor([rank for rank, _ in svd_twin(2)])).abs().max() > 1e-3


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LongVideoEngine:
    config = RunConfig(
        model=ModelConfig(path=str(save_random_wan(tmp_path_factory.mktemp("wan"))), device="cpu"),
        video=VideoConfig(num_frames=21, height=32, width=32),
        sampler=SamplerConfig(num_steps=3, guidance_scale=4.0, max_text_tokens=20),
        method=MethodConfig(name="direct", window_frames=2),
        output=OutputConfig(progress="off"),
    )
    made = LongVideoEngine(config)
    yield made
    made.close()


@pytest.mark.parametrize("name", ["direct", "sliding_window", "freespec", "freepca"])
def test_the_video_beside_which_it_looks_does_not_change(engine: LongVideoEngine, name: str) -> None:
    engine.use_method(dataclasses.replace(engine.config.method, name=name))
    plain_run = engine.denoise("a red circle").latents
    spectra = WindowSpectra(steps=frozenset({0, 2}))
    assert torch.equal(engine.denoise("a red circle", trace=spectra).latents, plain_run)
    # 6 latent frames of a native 2: windows of 2, 4 and 6; a fourth would be no wider.
    seen = {(row["step"], row["layer"], row["head"], row["multiple"]) for row in spectra.rows}
    assert seen == {(s, i, h, m) for s in (0, 2) for i in range(2) for h in range(4) for m in (1, 2, 3)}
    assert len(spectra.rows) == len(seen)  # the conditional pass alone
    assert all(1 <= row["effective_rank"] <= 12 and 0 < row["first_share"] <= 1 for row in spectra.rows)


def test_low_rank_with_every_direction_is_direct(engine: LongVideoEngine) -> None:
    def latents(name: str, **settings: float) -> torch.Tensor:
        engine.use_method(dataclasses.replace(engine.config.method, name=name, settings=settings))
        return engine.denoise("a red circle").latents

    direct = latents("direct")
    whole = latents("freespec.methods.low_rank:LowRank", ratio=1.0)
    half = latents("freespec.methods.low_rank:LowRank", ratio=0.25)
    assert float((whole - direct).norm() / direct.norm()) < 1e-5
    assert float((half - direct).norm() / direct.norm()) > 1e-3
