"""Whole denoising steps of Wan2.1-1.3B, 30 layers, both passes of guidance: every method beside stock diffusers.

The time of a run of 50 steps is the sum over its modes of how many steps it has of each, by the method's own plan, times the
measured step. Nothing else is in the loop but the solver, which is in the step.
"""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.fusion import svd_fp32
from benchmarks.measure import ratio, spread
from benchmarks.sections.bench import Bench
from benchmarks.sections.model import Subject, make_subject, stepper
from freespec.methods import Branches, Direct, FreeLong, FreePCA, FreeSpec, Layer, Method, SlidingWindow
from freespec.methods.freespec import FusionWeights

ROUNDS = 2
NEEDED = ("stock diffusers", "direct", "sliding_window", "freespec dual")  # what the goals are stated in


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
    """Rounds of all variants, as many as there is time for; then the literal fusion, for one pass, if it still fits."""
    subject = make_subject(bench)
    kernel = bench.best_kernel()
    duals = ["strided", *_triton_dual(bench)]
    bench.record("about", {"kernel": kernel, "duals": duals, "layers": len(subject.pipe.transformer.blocks)})
    calls = {name: stepper(subject, method, kernel=kernel, dual="strided") for name, method in variants().items()}
    for dual in duals[1:]:
        calls[f"freespec dual, {dual}"] = stepper(subject, FreeSpec(), kernel=kernel, dual=dual)
    times: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, float] = {}
    short = make_subject(bench, layers=1)  # loads kernels and picks algorithms without the time of a whole step
    for method in variants().values():
        stepper(short, method, kernel=kernel, passes=1)()
    del short
    for _ in range(ROUNDS):
        for name, call in calls.items():
            expected = 1.2 * max(times[name] or [max(max(x, default=0.0) for x in times.values())])
            if not bench.has_time(expected) and (name not in NEEDED or times[name]):
                continue
            bench.empty_cache()
            measured, why = bench.attempt(lambda call=call: bench.seconds_and_peak(call))
            if measured is None:
                bench.record(f"{name} does not run", why)
                continue
            times[name].append(measured["seconds"])
            peaks[name] = measured.get("peak_gib", 0.0)
            bench.record("steps", rows(times, peaks))
            bench.record("ratios", ratios(times, peaks))
            bench.record("runs", whole_runs(subject, times))
    literal(bench, subject, kernel, times)


def literal(bench: Bench, subject: Subject, kernel: str, times: dict[str, list[float]]) -> None:
    """One pass with the fusion by SVD; its layers take as long as the section `layer` found."""
    svd = bench.earlier("layer").get("wan", {}).get("svd")
    if svd:
        heads, layers = subject.pipe.transformer.config.num_attention_heads, len(subject.pipe.transformer.blocks)
        expected = layers * svd["literal SVD"]["median"] * heads / svd["heads"] + max(
            times["freespec dual"], default=0.0
        )
        if not bench.has_time(expected):
            bench.record("literal", {"not measured": f"one pass would take about {expected:.0f} s"})
            return
    started = time.perf_counter()
    stepper(subject, LiteralFreeSpec(), kernel=kernel, dual="strided", passes=1)()
    bench.synchronize()
    seconds = 2 * (time.perf_counter() - started)
    ours = spread(times["freespec dual"])["median"] if times["freespec dual"] else float("nan")
    bench.record("literal", {"step_s": seconds, "passes measured": 1, "literal SVD / freespec dual": seconds / ours})


def rows(times: dict[str, list[float]], peaks: dict[str, float]) -> dict[str, Any]:
    """What was measured so far."""
    return {
        name: {"wall_s": spread(seconds), "rounds": len(seconds), "peak_gib": peaks[name]}
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
