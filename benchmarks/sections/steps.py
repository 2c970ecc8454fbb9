"""Whole denoising steps of Wan2.1-1.3B, 30 layers, both passes of guidance: every method beside stock diffusers.

The time of a run of 50 steps is the sum over its modes of how many steps it has of each, by the method's own plan, times the
measured step. Nothing else is in the loop but the solver, which is in the step. Rows whose `passes` is 1 are of one pass and
the solver, doubled.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.fusion import svd_fp32
from benchmarks.measure import in_turn, ratio, spread
from benchmarks.sections.bench import Bench
from benchmarks.sections.model import Subject, make_subject, stepping
from freespec.methods import Branches, Direct, FreeLong, FreePCA, FreeSpec, Layer, Method, SlidingWindow
from freespec.methods.freespec import FusionWeights

ROUNDS = 2
NEEDED = (
    "stock diffusers",
    "direct",
    "sliding_window",
    "freespec dual",
    "freespec late",
)  # what the goals are stated in
# Measured for one pass and doubled: the slowest steps, which no goal needs, would be lost where attention is slow.
HALF = ("freelong", "freepca", "freepca late")


@dataclass(frozen=True, kw_only=True)
class LiteralFreeSpec(FreeSpec):
    """The paper's fusion as it is written: two long SVDs in each layer."""

    def fuse(self, branches: Branches, weights: FusionWeights, layer: Layer) -> Tensor:
        """Eq. 4-13 by torch.linalg.svd."""
        assert branches.local is not None and branches.wide is not None
        return svd_fp32(branches.local, branches.wide, weights)


def variants() -> dict[str, Method | None]:
    """A method whose first step is of the mode that is measured; None is stock diffusers."""
    return {
        "stock diffusers": None,
        "direct": Direct(),
        "sliding_window": SlidingWindow(),
        "freespec dual": FreeSpec(),
        "freespec late": FreeSpec(domain="step", split=0.0),
        "freelong": FreeLong(),
        "freepca": FreePCA(),
        "freepca late": FreePCA(domain="step", split=1.0),
    }


def run(bench: Bench) -> None:
    """A round of all variants, the literal fusion, and a second round of what there is time for, backwards."""
    subject = make_subject(bench)
    kernel = bench.best_kernel()
    steps = variants()
    duals = dict.fromkeys(steps, "strided") | {f"freespec dual, {dual}": dual for dual in _triton_dual(bench)}
    steps |= {name: FreeSpec() for name in duals if name not in steps}
    layers = len(subject.pipe.transformer.blocks)
    bench.record("about", {"kernel": kernel, "duals": sorted(set(duals.values())), "layers": layers})
    short = make_subject(bench, layers=1)
    for name, method in steps.items():  # loads kernels and picks algorithms without the time of a whole step
        bench.attempt(
            lambda name=name, method=method: measure(bench, short, method, kernel=kernel, dual=duals[name], passes=1)
        )
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, float] = {}
    for round_ in range(ROUNDS):
        for name, method in in_turn(steps.items(), round_):
            passes = 1 if name in HALF else 2
            longest = max(max(seconds, default=0.0) for seconds in times.values())
            expected = 1.2 * max(times[name] or [2 * longest]) * passes / 2
            if not bench.has_time(expected) and (name not in NEEDED or times[name]):
                bench.record(
                    f"{name}, round {round_ + 1}",
                    f"left out: less than the {expected:.0f} s that it may take were left",
                )
                continue
            bench.empty_cache()
            measured, why = bench.attempt(
                lambda name=name, method=method, passes=passes: measure(
                    bench, subject, method, kernel=kernel, dual=duals[name], passes=passes
                )
            )
            if measured is None:
                bench.record(f"{name} does not run", why)
                continue
            times[name].append(measured["seconds"] * 2 / passes)
            peaks[name] = measured.get("peak_gib", 0.0)
            bench.record("steps", rows(times, peaks))
            bench.record("ratios", ratios(times, peaks))
            bench.record("runs", whole_runs(subject, times))
        if round_ == 0:
            bench.empty_cache()
            found, why = bench.attempt(lambda: literal(bench, short, kernel, times["freespec dual"], layers=layers))
            bench.record("literal", found or {"does not run": why})


def measure(
    bench: Bench, subject: Subject, method: Method | None, *, kernel: str, dual: str, passes: int
) -> dict[str, float]:
    """Seconds and peak memory of a step; putting the method on and taking it off is not in them."""
    with stepping(subject, method, kernel=kernel, dual=dual, passes=passes) as step:
        return bench.seconds_and_peak(step)


def literal(bench: Bench, short: Subject, kernel: str, dual: list[float], *, layers: int) -> dict[str, Any]:
    """The fusion by SVD, one pass of a model of one layer: what it takes longer than ours, for all layers and both passes."""
    if not dual:
        return {"not measured": "our step, which it is compared with, does not run"}
    seconds = {
        name: measure(bench, short, method, kernel=kernel, dual="strided", passes=1)["seconds"]
        for name, method in (("ours", FreeSpec()), ("literal", LiteralFreeSpec()))
    }
    ours = spread(dual)["median"]
    step = ours + 2 * layers * (seconds["literal"] - seconds["ours"])
    return {
        "step_s": step,
        "literal SVD / freespec dual": step / ours,
        "measured": f"one pass of one layer, {seconds['literal']:.3g} s, and ours, {seconds['ours']:.3g} s; the difference, times "
        f"{layers} layers and 2 passes, is added to our step",
    }


def rows(times: dict[str, list[float]], peaks: dict[str, float]) -> dict[str, Any]:
    """What was measured so far."""
    return {
        name: {
            "wall_s": spread(seconds),
            "rounds": len(seconds),
            "passes": 1 if name in HALF else 2,
            "peak_gib": peaks[name],
        }
        for name, seconds in times.items()
        if seconds
    }


def ratios(times: dict[str, list[float]], peaks: dict[str, float]) -> dict[str, Any]:
    """Each step over that of direct, and of direct over stock, round by round."""
    found: dict[str, Any] = {}
    for over, under in [(name, "direct") for name in times if name not in ("direct", "stock diffusers")] + [
        ("direct", "stock diffusers")
    ]:
        pairs = list(zip(times[over], times[under], strict=False))
        if pairs:
            found[f"{over} / {under}"] = ratio(*zip(*pairs, strict=True))
    if peaks.get("direct") and peaks.get("freespec dual"):
        found["peak memory, freespec dual / direct"] = peaks["freespec dual"] / peaks["direct"]
    return found


def whole_runs(subject: Subject, times: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds of 50 steps by the method's own plan, and the ratio to direct."""
    step = {name: spread(seconds)["median"] for name, seconds in times.items() if seconds}
    timesteps = subject.timesteps()
    mixes: dict[str, tuple[Method, dict[str, str]]] = {
        "direct": (Direct(), {"global": "direct"}),
        "sliding_window": (SlidingWindow(), {"local": "sliding_window"}),
        "freelong": (FreeLong(), {"dual": "freelong"}),
        "freepca": (FreePCA(), {"views_global": "freepca", "views": "freepca late"}),
        "freespec (default: timestep)": (FreeSpec(), {"dual": "freespec dual", "local": "freespec late"}),
        "freespec (step, 0.5)": (FreeSpec(domain="step"), {"dual": "freespec dual", "local": "freespec late"}),
    }
    found = {}
    for name, (method, measured) in mixes.items():
        count = Counter(plan.mode for plan in method.plan(timesteps))
        if all(measured[mode] in step for mode in count):
            seconds = sum(number * step[measured[mode]] for mode, number in count.items())
            found[name] = {"steps": dict(count), "seconds": seconds}
            if "direct" in found:
                found[name]["over direct"] = seconds / found["direct"]["seconds"]
    return found


def _triton_dual(bench: Bench) -> list[str]:
    """Triton as well, where the section `layer` found that it wins by more than 3 %."""
    ratios = bench.earlier("layer").get("wan", {}).get("ratios", {})
    won = ratios.get("dual triton / dual strided", {}).get("median", 1.0)
    return ["triton"] if won < 0.97 else []
