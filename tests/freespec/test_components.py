"""FreePCA against the published algorithm, written out with its long projections."""

import math
from typing import Any

import pytest
import torch

from freespec import components
from freespec.methods import FreePCA, Grid, StepPlan
from tests.freespec.cases import assert_low_precision, assert_same_math
from tests.freespec.layers import attend, draw_qkv, run_layer
from tests.freespec.published import freepca as published
from tests.freespec.published import token_scale

# frames, window, stride: divides, misses frames, odd and even windows, windows of few components, of one frame and none
CASES = [(14, 5, 3), (11, 4, 3), (12, 6, 2), (7, 3, 1), (5, 2, 1), (5, 1, 1)]
FUSED, LATE = StepPlan(mode="views_global"), StepPlan(mode="views")


def grid_of(frames: int, window: int) -> Grid:
    return Grid(frames=frames, rows=2, columns=3, window_frames=window)


@pytest.mark.parametrize(("frames", "window", "stride"), CASES)
@pytest.mark.parametrize("compat", [False, True])
def test_freepca_is_the_published_algorithm(frames: int, window: int, stride: int, compat: bool) -> None:
    grid = grid_of(frames, window)
    qkv = draw_qkv(grid, seed=frames)
    made = run_layer(FreePCA(stride=stride, compat=compat), grid, qkv, FUSED)
    assert_same_math(made, published(qkv, grid, stride, compat=compat, scale=token_scale(grid)))
    late = run_layer(FreePCA(stride=stride, compat=compat), grid, qkv, LATE)
    assert_same_math(late, published(qkv, grid, stride, compat=compat, fused=False))


@pytest.mark.parametrize(
    "wrong", [{"scale": 1.0}, {"most": 2}, {"fused": False}, {"compat": True}], ids=lambda wrong: next(iter(wrong))
)
def test_negative_control_wrong_detail(wrong: dict[str, Any]) -> None:
    grid = grid_of(14, 5)
    qkv = draw_qkv(grid)
    made = run_layer(FreePCA(stride=4), grid, qkv, FUSED)
    right: dict[str, Any] = {"scale": token_scale(grid)}
    assert_same_math(made, published(qkv, grid, 4, **right))
    with pytest.raises(AssertionError):
        assert_same_math(made, published(qkv, grid, 4, **right | wrong))


def test_the_first_view_is_local_and_the_mean_of_the_others_global() -> None:
    grid = grid_of(14, 5)
    q, k, v = draw_qkv(grid)
    window = 5 * grid.frame_tokens
    made = run_layer(FreePCA(stride=5), grid, (q, k, v), FUSED)  # views at 0, 5 and 9: frames 0 to 4 are in one only
    assert_same_math(made[:, :window], attend(q[:, :window], k[:, :window], v[:, :window]))
    alone = run_layer(FreePCA(stride=9), grid, (q, k, v), FUSED)[:, -window:]  # views at 0 and 9
    o_global = attend(q, k, v, token_scale(grid))[:, -window:]
    assert_same_math(alone.unflatten(1, (5, -1)).mean(1), o_global.unflatten(1, (5, -1)).mean(1))


def test_all_components_are_the_global_branch_and_none_the_local_one() -> None:
    grid = grid_of(9, 4)
    q, k, _ = draw_qkv(grid)
    rows = slice(5 * grid.frame_tokens, None)
    grams = components.temporal_grams(q[:, rows], k[:, rows], 4)[:, None]
    for count, expected in ((9, k[:, rows]), (0, q[:, rows])):
        projection = components.shared_projection(grams, torch.tensor([count]))
        local, far = components.mixing_matrices(projection)
        mixed = components.mix_frames(q[:, rows], k[:, rows], (local[0], far[0]))
        moved = (k - q)[:, rows].unflatten(1, (4, -1)).mean(1, keepdim=True).expand(-1, 4, -1, -1, -1).flatten(1, 2)
        assert_same_math(mixed, expected + (moved if count == 0 else 0.0))


def test_the_null_direction_is_never_taken_nor_counted() -> None:
    """All cosines negative: the published order would take the null direction, cosine 0, and one component less."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5 * 6, 2, 3, generator=generator, dtype=torch.float64)
    grams = components.temporal_grams(x, -x, 5)[:, None]
    counts = torch.tensor([2])
    ranks = [
        torch.linalg.matrix_rank(components.shared_projection(grams, counts, compat=each)) for each in (False, True)
    ]
    assert [int(rank) for rank in ranks] == [2, 1]
    projection = components.shared_projection(grams, counts)
    assert projection.sum(-1).abs().max().item() < 1e-12


def test_constant_branch_has_no_components() -> None:
    x = torch.randn(1, 1, 6, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    still, moving = x.expand(-1, 4, -1, -1, -1).flatten(1, 2), torch.randn(1, 24, 2, 3, dtype=torch.float64)
    for pair in ((still, moving), (moving, still), (still, still)):
        projection = components.shared_projection(components.temporal_grams(*pair, 4)[:, None], torch.tensor([3]))
        assert torch.equal(projection, torch.zeros_like(projection))


def test_heads_add_up() -> None:
    """What ranks with a share of the heads each contribute: any split gives the matrices of all heads."""
    x, y, _ = draw_qkv(grid_of(5, 5), heads=5)
    whole = components.temporal_grams(x, y, 5)
    parts = [components.temporal_grams(x[:, :, a:b], y[:, :, a:b], 5) for a, b in ((0, 2), (2, 2), (2, 5))]
    assert_same_math(sum(parts), whole)
    with pytest.raises(AssertionError):
        assert_same_math(sum(parts[1:]), whole)


def test_a_low_precision_is_as_good_as_the_published_form_in_it() -> None:
    grid = grid_of(14, 5)
    triples = []  # of eight draws, so that chance does not decide
    for seed in range(8):
        qkv = draw_qkv(grid, seed=seed)
        q, k, v = (x.float() for x in qkv)
        plain, exact = (published(each, grid, 3, scale=token_scale(grid)) for each in ((q, k, v), qkv))
        triples.append((run_layer(FreePCA(stride=3), grid, (q, k, v), FUSED), plain, exact))
    made, plain, exact = (torch.stack(each) for each in zip(*triples, strict=True))
    assert_low_precision(made, plain, exact)
    with pytest.raises(AssertionError):  # the control: 1e-5 is seen
        assert_low_precision(made * (1 + 1e-5), plain, exact)


def test_plans_scale_and_settings() -> None:
    times = [1000.0, 600.0, 251.0, 250.0, 100.0]
    assert [step.mode for step in FreePCA().plan(times)] == ["views_global"] * 3 + ["views"] * 2
    by_step = FreePCA(domain="step", fused_share=0.6).plan(times)
    assert [step.mode for step in by_step] == ["views_global"] * 3 + ["views"] * 2
    assert [step.mode for step in FreePCA(fused_share=1.0).plan([1.0])] == ["views_global"]
    assert FreePCA.noise == "mean_reuse"
    assert FreePCA().refused_axes.keys() == {"ring"}
    grid = Grid(frames=81, rows=30, columns=52, window_frames=21)
    scales = {by: FreePCA(query_scale_by=by).query_scale(grid) for by in ("tokens", "frames", "none")}
    assert scales == pytest.approx({"tokens": 1.0629, "frames": 1.2014, "none": 1.0}, abs=1e-4)
    published_grid = Grid(frames=64, rows=1, columns=1, window_frames=16)
    assert FreePCA(query_scale_by="frames").query_scale(published_grid) == pytest.approx(math.sqrt(1.5))
    assert FreePCA().query_scale(Grid(frames=4, rows=1, columns=1, window_frames=1)) == 1.0
    for settings, message in (
        ({"stride": 0}, "freepca: stride must be 1 or more frames, got 0"),
        ({"domain": "sigma"}, "freepca: domain must be one of timestep, step, got 'sigma'"),
        ({"query_scale_by": "pixels"}, "freepca: query_scale_by must be one of tokens, frames, none"),
        ({"fused_share": 1.5}, r"freepca: fused_share must lie in \[0, 1\], got 1.5"),
        ({"components": -1}, "freepca: components must be 0 or more, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            FreePCA(**settings)


def test_sums_over_pixels_are_of_fp32_products_and_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of half-precision outputs the sums are those of the same values in fp64; bf16 products would be off by 1e-3."""
    local, o_global = (torch.randn(1, 5 * 12, 2, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    half = [x.to(torch.bfloat16) for x in (local, o_global)]
    exact = components.temporal_grams(*(x.double() for x in half), 5)
    torch.testing.assert_close(components.temporal_grams(*half, 5), exact, rtol=1e-5, atol=1e-4)
    monkeypatch.setattr(components, "CHUNK_VALUES", 5 * 8)  # 5 of the 12 pixels at a time
    torch.testing.assert_close(
        components.temporal_grams(local.double(), o_global.double(), 5),
        _grams_of_rows(local, o_global),
        rtol=1e-12,
        atol=1e-12,
    )


def _grams_of_rows(local: torch.Tensor, o_global: torch.Tensor) -> torch.Tensor:
    """The literal form: rows of 5 frames, one per pixel, head and channel."""
    x, y = (each.double().unflatten(1, (5, -1)).flatten(2) for each in (local, o_global))
    x, y = (each - each.mean(1, keepdim=True) for each in (x, y))
    return torch.stack((x @ x.mT, x @ y.mT, y @ y.mT))
