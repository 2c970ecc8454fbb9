"""The methods as the engine sees them: plans, weights of every row of the ablation, errors of wrong settings."""

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

from freespec.attention import WindowedAttention
from freespec.kernels import cpu_flash
from freespec.methods import (
    METHODS,
    Branches,
    Direct,
    FreeNoise,
    FreePCA,
    FreeSpec,
    Grid,
    Layer,
    SlidingWindow,
    StepPlan,
    make_method,
)
from freespec.methods.freespec import FusionWeights
from freespec.spectrum import svd_fusion_ref
from tests.freespec.cases import Video, assert_same_math, drawn, features, seeds, videos
from tests.freespec.layers import fuse_spectra

CPU = torch.device("cpu")
TIMESTEPS = [1000.0, 900.0, 700.0, 500.0, 400.0, 100.0]
SIZES = (2, 23, 3, 8)
GRID = Grid(frames=23, rows=1, columns=1, window_frames=5)  # FreeSpec does not look at it


def weights(progress: float, dim: int = 3, **settings: Any) -> FusionWeights:
    return FreeSpec(**settings).weights(StepPlan(mode="dual", progress=progress), GRID, dim, CPU)


def test_defaults_are_the_published_numbers_and_where_none_are_public_the_documented_ones() -> None:
    """As literals: a default that changes by accident makes plausible videos of another method."""
    assert asdict(FreeSpec()) == {
        "domain": "timestep",
        "fused_share": 0.5,
        "basis": "local",
        "time": True,
        "rank": True,
        "fixed": 0.5,
        "alpha": 5.0,
        "beta": 3.0,
        "residual": "time",
        "residual_form": "lerp",
        "lam_start": 0.2,
        "lam_end": 0.05,
        "lam_fixed": 0.1,
    }
    # A quarter of the window: 5 of Wan's 21 latent frames, 4 of LTX-Video's 16, with a last view at the end.
    wan, ltx = (Grid(frames=f, rows=1, columns=1, window_frames=window) for f, window in ((81, 21), (61, 16)))
    for method in (FreeNoise(), FreePCA()):
        assert method.view_starts(wan) == tuple(range(0, 61, 5))
        assert method.view_starts(ltx) == (*range(0, 45, 4), 45)
    assert [step.mode for step in FreePCA(domain="step", fused_share=0.71).plan([0.0] * 100)].count("views") == 29


@pytest.mark.parametrize("domain", ["timestep", "step"])
@pytest.mark.parametrize("kind", [FreeSpec, FreePCA])
def test_a_larger_share_fuses_more_from_noise_on(kind: type[FreeSpec | FreePCA], domain: str) -> None:
    """The first steps fuse, none at 0 and all at 1; on equally spaced timesteps as many as the share says, by either domain."""
    times = [1000.0 - 10 * i for i in range(100)]
    for share, number in ((0.0, 0), (0.25, 25), (0.3, 30), (0.9, 90), (1.0, 100)):
        modes = [step.mode in ("dual", "views_global") for step in kind(domain=domain, fused_share=share).plan(times)]
        at_the_end = kind is FreeSpec and domain == "timestep" and 0 < share < 1  # t = s still fuses
        assert modes == [i < number + at_the_end for i in range(100)]


@pytest.mark.parametrize(
    ("name", "settings", "share"),
    [
        ("freespec", {"split": 0.4}, "fused_share 0.6"),
        ("freespec", {"split": "0.4", "domain": "step"}, "fused_share 0.4"),
        ("freepca", {"split": 0.25, "domain": "step"}, "fused_share 0.75"),
    ],
)
def test_split_of_older_versions_is_refused_with_the_equivalent(
    name: str, settings: dict[str, Any], share: str
) -> None:
    with pytest.raises(ValueError, match=f"split is now fused_share, the share .* counted from noise: {share}$"):
        make_method(name, **settings)


def test_plans() -> None:
    assert Direct().plan(TIMESTEPS) == [StepPlan(mode="global")] * 6
    assert SlidingWindow().plan(TIMESTEPS) == [StepPlan(mode="local")] * 6
    by_time, by_step = FreeSpec().plan(TIMESTEPS), FreeSpec(domain="step").plan(TIMESTEPS)
    assert [step.mode for step in by_time] == ["dual"] * 4 + ["local"] * 2
    assert [step.progress for step in by_time[:4]] == [0.0, 0.2, 0.6, 1.0]
    assert [step.mode for step in by_step] == ["dual"] * 3 + ["local"] * 3
    assert [step.progress for step in by_step[:3]] == [0.0, 1 / 3, 2 / 3]


@drawn
@given(video=videos(), seed=seeds)
def test_late_steps_are_the_sliding_window_bit_for_bit(video: Video, seed: int) -> None:
    """The plan is the same, so the call is; and in a dual step the local branch is that call as well."""
    late = [i for i, t in enumerate(TIMESTEPS) if t < 500]
    plans = FreeSpec().plan(TIMESTEPS), SlidingWindow().plan(TIMESTEPS)
    assert [plans[0][i] for i in late] == [plans[1][i] for i in late]
    assert plans[0] != plans[1]
    layer = WindowedAttention(
        num_frames=video.num_frames,
        frame_tokens=video.frame_tokens,
        window_frames=video.window_frames,
        kernel=cpu_flash,
    )
    q, k, v = video.qkv(seed, torch.float32)
    assert torch.equal(layer.both(q, k, v)[0], layer.local(q, k, v, 0, 0)[0])


@pytest.mark.parametrize("basis", ["local", "global"])
def test_native_length_is_the_base_model(basis: str) -> None:
    """F <= F0: both branches are plain attention, so a fusion that is not skipped changes nothing but the last digits."""
    video = Video(num_frames=4, frame_tokens=9, window_frames=5, batch=2, heads=2, dim=4)
    layer = WindowedAttention(num_frames=4, frame_tokens=9, window_frames=5, kernel=cpu_flash)
    qkv = video.qkv(0)
    o_local, o_global = layer.both(*qkv)
    assert torch.equal(o_local, o_global)
    fused = fuse_spectra(FreeSpec(basis=basis), o_local, o_global, weights(0.3, 4))
    assert_same_math(fused, o_global)
    shorter = WindowedAttention(num_frames=4, frame_tokens=9, window_frames=3, kernel=cpu_flash)
    with pytest.raises(AssertionError):
        assert_same_math(fuse_spectra(FreeSpec(), *shorter.both(*qkv), weights(0.3, 4)), o_global)


@pytest.mark.parametrize("method", [Direct(), SlidingWindow()])
def test_methods_of_one_branch_never_fuse(method: Direct | SlidingWindow) -> None:
    assert method.weights(StepPlan(mode="local"), GRID, 8, CPU) is None
    assert method.query_scale(GRID) == 1.0
    layer = Layer(grid=GRID, sum_tokens=lambda grams: grams, sum_heads=lambda grams: grams)
    with pytest.raises(AssertionError, match="has no step that fuses"):
        method.fuse(Branches(), None, layer)
    with pytest.raises(AssertionError, match="has no views"):
        method.view_starts(GRID)


# g_r at p = 0.5 for D = 3, alpha 2, beta 1: rank weights e^0, e^-1/2, e^-1 and time weight e^-1.
@pytest.mark.parametrize(
    ("settings", "exponents"),
    [
        ({}, (-1.0, -1.5, -2.0)),
        ({"time": False}, (0.0, -0.5, -1.0)),
        ({"rank": False}, (-1.0, -1.0, -1.0)),
        ({"time": False, "rank": False, "fixed": math.exp(-0.25)}, (-0.25, -0.25, -0.25)),
    ],
)
def test_rank_weights_of_the_ablation(settings: dict[str, Any], exponents: tuple[float, ...]) -> None:
    actual = weights(0.5, alpha=2.0, beta=1.0, **settings).rank
    assert_same_math(actual, torch.tensor([math.exp(x) for x in exponents], dtype=torch.float64))
    with pytest.raises(AssertionError):  # the control: another progress, or other decays
        assert_same_math(weights(0.6, alpha=2.1, beta=1.1, **settings | {"fixed": 0.1}).rank, actual)


@pytest.mark.parametrize("time", [True, False])
@pytest.mark.parametrize(
    ("settings", "lam"),
    [
        ({"residual": "time"}, 0.05 + 0.15 * math.exp(-1.0)),
        ({"residual": "time", "lam_start": 0.4, "lam_end": 0.1}, 0.1 + 0.3 * math.exp(-1.0)),
        ({"residual": "fixed"}, 0.1),
        ({"residual": "fixed", "lam_fixed": 0.3}, 0.3),
        ({"residual": "none"}, 0.0),
    ],
)
def test_residual_weights_of_the_ablation(settings: dict[str, Any], lam: float, time: bool) -> None:
    """The time-aware residual decays with the time weight switched off as well."""
    residual = weights(0.5, alpha=2.0, time=time, **settings).residual
    assert_same_math(residual, torch.tensor(lam, dtype=torch.float64))


@pytest.mark.parametrize("basis", ["local", "global"])
@pytest.mark.parametrize("residual", ["time", "fixed", "none"])
@pytest.mark.parametrize("residual_form", ["lerp", "add"])
@pytest.mark.parametrize(("time", "rank"), [(True, True), (True, False), (False, True), (False, False)])
def test_every_row_of_the_ablation_is_its_svd(
    basis: str, residual: str, residual_form: str, time: bool, rank: bool
) -> None:
    method = FreeSpec(basis=basis, residual=residual, residual_form=residual_form, time=time, rank=rank)
    made = method.weights(StepPlan(mode="dual", progress=0.3), GRID, 8, CPU)
    o_local, o_global = features(0, SIZES), 1.7 * features(1, SIZES)
    fused = fuse_spectra(method, o_local, o_global, made)
    exact = svd_fusion_ref(o_local, o_global, made.rank, made.residual.item(), basis=basis, form=residual_form)
    assert_same_math(fused, exact)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("fused_share", 1.5, r"freespec: fused_share must lie in \[0, 1\], got 1.5"),
        ("fixed", -0.1, r"fixed must lie in \[0, 1\], got -0.1"),
        ("lam_start", 2.0, r"lam_start must lie in \[0, 1\], got 2.0"),
        ("lam_end", float("nan"), r"lam_end must lie in \[0, 1\], got nan"),
        ("lam_fixed", -1.0, r"lam_fixed must lie in \[0, 1\], got -1.0"),
        ("alpha", -1.0, r"alpha must be a finite number, 0 or more, got -1.0"),
        ("beta", float("inf"), r"beta must be a finite number, 0 or more, got inf"),
        ("alpha", float("nan"), r"alpha must be a finite number, 0 or more, got nan"),
        ("domain", "sigma", r"domain must be one of timestep, step, got 'sigma'"),
        ("basis", "both", r"basis must be one of local, global, got 'both'"),
        ("residual", "on", r"residual must be one of time, fixed, none, got 'on'"),
        ("residual_form", "sum", r"residual_form must be one of lerp, add, got 'sum'"),
    ],
)
def test_settings_errors(setting: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FreeSpec(**{setting: value})


def test_make_method() -> None:
    assert {name: type(make_method(name)) for name in METHODS} == METHODS
    assert make_method("freespec", alpha=2.0, basis="global") == FreeSpec(alpha=2.0, basis="global")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "freespc",
            {},
            r"unknown method 'freespc' \(did you mean 'freespec'\?\); choose one of direct, sliding_window",
        ),
        ("sliding-window", {}, r"did you mean 'sliding_window'\?"),
        ("xyz", {}, r"unknown method 'xyz'; choose one of"),
        (
            "freespec",
            {"alhpa": 2.0},
            r"'freespec' does not know 'alhpa' \(did you mean 'alpha'\?\); it has the settings",
        ),
        ("direct", {"alpha": 2.0}, r"'direct' does not know 'alpha'; it has no settings"),
        ("freespec", {"alpha": -2.0}, r"alpha must be a finite number"),
    ],
)
def test_make_method_errors(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method(name, **settings)


BODIES = {
    "raise OSError(2, 'No such file', 'weights.bin')": r"does not import: FileNotFoundError: \[Errno 2\].* \(own\.py, line 1\)",
    "1 / 0": r"does not import: ZeroDivisionError: division by zero \(own\.py, line 1\)",
    "raise SystemExit(3)": r"does not import: SystemExit: 3 \(own\.py, line 1\)",
    "x = (": r"does not import: SyntaxError: ",
    "from freespec.methods import Direct\nclass Own(Direct):\n    def __init__(self):\n        raise OSError('two\\nlines')": (
        r"cannot be made: OSError: two lines \(own\.py, line 4\)"
    ),
}


@pytest.mark.parametrize("body", BODIES)
def test_a_module_that_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    (tmp_path / "own.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    with pytest.raises(ValueError, match=BODIES[body]) as caught:
        make_method("own:Own")
    assert "\n" not in str(caught.value)
