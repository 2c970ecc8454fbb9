"""Whole denoising steps of Wan2.1-1.3B, 30 layers, both passes of guidance: every method beside stock diffusers.

The time of a run of 50 steps is the number of steps of each mode, by the method's plan, times the measured step, which includes the solver.
Rows whose `passes` is 1 are one pass and the solver, doubled.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.fusion import svd_fp32
from benchmarks.measure import in_turn, ratio, relative_error, spread
from benchmarks.sections.bench import Bench
from benchmarks.sections.model import Subject, make_subject, stepping
from engine.ranks.group_of_one import GROUP_OF_ONE
from engine.ranks.layouts import Ranks
from freespec.methods import Branches, Direct, FreeLong, FreePCA, FreeSpec, Layer, Method, SlidingWindow
from freespec.methods.freespec import FusionWeights
from parallel.mesh import SeqMesh
from parallel.shards import SequencePlan
from parallel.xfuser import XfuserAttention, check_xfuser, xfuser_attention

ROUNDS = 2
NEEDED = (
    "stock diffusers",
    "direct",
    "sliding_window",
    "freespec dual",
    "freespec late",
)  # for the goals
# With torch's FlashAttention, which needs no package besides xfuser; `direct` has the fastest kernel.
XFUSER = "direct, xfuser"
XFUSER_KERNEL = "cuda_flash"
# Measured for one pass and doubled: the slowest steps, which no goal needs.
HALF = ("freelong", "freepca", "freepca late")


@dataclass(frozen=True, kw_only=True)
class LiteralFreeSpec(FreeSpec):
    """The paper's fusion by two long SVDs in each layer."""

    def fuse(self, branches: Branches, weights: FusionWeights, layer: Layer) -> Tensor:
        """Eq. 4-13 by torch.linalg.svd."""
        assert branches.o_local is not None and branches.o_global is not None
        return svd_fp32(branches.o_local, branches.o_global, weights)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A measured step: a method, whose first step has the mode to measure; None is stock diffusers.

    Attributes:
        method: the method.
        dual: how a dual step computes both branches.
        ranks: the mesh, if another package computes the attention of `direct`.
    """

    method: Method | None
    dual: str = "strided"
    ranks: Ranks | None = None


def variants() -> dict[str, Step]:
    """The steps that every machine can measure."""
    methods = {
        "stock diffusers": None,
        "direct": Direct(),
        "sliding_window": SlidingWindow(),
        "freespec dual": FreeSpec(),
        "freespec late": FreeSpec(domain="step", fused_share=0.0),
        "freelong": FreeLong(),
        "freepca": FreePCA(),
        "freepca late": FreePCA(domain="step", fused_share=0),
    }
    return {name: Step(method=method) for name, method in methods.items()}


def run(bench: Bench) -> None:
    """A round of all variants, the literal fusion, a second round as time allows; then xfuser and Triton."""
    subject = make_subject(bench)
    mesh = GROUP_OF_ONE.acquire()
    runs = StepRuns(bench=bench, subject=subject, short=make_subject(bench, layers=1), kernel=bench.best_kernel())
    try:
        in_rounds(runs, variants())
        for find in (lambda: _xfuser(bench, subject, mesh), lambda: _triton_dual(bench)):
            one_by_one(runs, find())
    finally:
        GROUP_OF_ONE.release()


@dataclass(kw_only=True)
class StepRuns:
    """Results so far, recorded after every step.

    Attributes:
        bench: the section.
        subject: the model.
        short: the model with one layer, for warming up.
        kernel: of the methods.
        times: seconds of a step with both passes, by variant.
        peaks: GiB, by variant.
    """

    bench: Bench
    subject: Subject
    short: Subject
    kernel: str
    times: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)

    def warm_up(self, step: Step) -> None:
        """One pass of one layer."""
        self.bench.attempt(lambda: measure(self.bench, self.short, step, kernel=self.kernel, passes=1))

    def take(self, name: str, step: Step, round_: int) -> None:
        """Measure one step, if there is time or a goal needs it."""
        bench, passes, times = self.bench, 1 if name in HALF else 2, self.times.setdefault(name, [])
        longest = max(max(seconds, default=0.0) for seconds in self.times.values())
        expected = 1.2 * max(times or [2 * longest]) * passes / 2
        if not bench.has_time(expected) and (name not in NEEDED or times):
            bench.record(
                f"{name}, round {round_ + 1}",
                f"left out: less than the {expected:.0f} s that it may take were left",
            )
            return
        bench.empty_cache()
        measured, why = bench.attempt(lambda: measure(bench, self.subject, step, kernel=self.kernel, passes=passes))
        if measured is None:
            bench.record(f"{name} does not run", why)
            return
        times.append(measured["seconds"] * 2 / passes)
        self.peaks[name] = measured.get("peak_gib", 0.0)
        bench.record("steps", rows(self.times, self.peaks))
        bench.record("ratios", ratios(self.times, self.peaks))
        bench.record("runs", whole_runs(self.subject, self.times))


def in_rounds(runs: StepRuns, steps: Mapping[str, Step]) -> None:
    """Every variant once a round, backwards in every other one; the literal fusion after the first."""
    bench, layers = runs.bench, len(runs.subject.pipe.transformer.blocks)
    bench.record("about", {"kernel": runs.kernel, "layers": layers})
    for step in steps.values():
        runs.warm_up(step)
    for round_ in range(ROUNDS):
        for name, step in in_turn(steps.items(), round_):
            runs.take(name, step, round_)
        if round_ == 0:
            bench.empty_cache()
            dual = runs.times.get("freespec dual", [])
            found, why = bench.attempt(lambda dual=dual: literal(bench, runs.short, runs.kernel, dual, layers=layers))
            bench.record("literal", found or {"does not run": why})


def one_by_one(runs: StepRuns, steps: Mapping[str, Step]) -> None:
    """Steps that may not run or compile for long, after all others."""
    for name, step in steps.items():
        runs.warm_up(step)
        for round_ in range(ROUNDS):
            runs.take(name, step, round_)


def measure(bench: Bench, subject: Subject, step: Step, *, kernel: str, passes: int) -> dict[str, float]:
    """Seconds and peak memory of a step; applying and removing the method is not included."""
    with stepping(subject, step.method, kernel=kernel, dual=step.dual, passes=passes, ranks=step.ranks) as call:
        return bench.seconds_and_peak(call)


def literal(bench: Bench, short: Subject, kernel: str, dual: list[float], *, layers: int) -> dict[str, Any]:
    """The fusion by SVD: its excess in one pass of one layer, for all layers and both passes."""
    if not dual:
        return {"not measured": "our step, which it is compared with, does not run"}
    seconds = {
        name: measure(bench, short, Step(method=method), kernel=kernel, passes=1)["seconds"]
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
        pairs = list(zip(times.get(over, []), times.get(under, []), strict=False))
        if pairs:
            found[f"{over} / {under}"] = ratio(*zip(*pairs, strict=True))
    if peaks.get("direct") and peaks.get("freespec dual"):
        found["peak memory, freespec dual / direct"] = peaks["freespec dual"] / peaks["direct"]
    return found


def whole_runs(subject: Subject, times: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds of 50 steps by the method's plan, and the ratio to direct."""
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


def _triton_dual(bench: Bench) -> dict[str, Step]:
    """Triton as well, where the section `layer` found that it wins by more than 3 %."""
    ratios = bench.earlier("layer").get("wan", {}).get("ratios", {})
    won = ratios.get("dual triton / dual strided", {}).get("median", 1.0)
    return {"freespec dual, triton": Step(method=FreeSpec(), dual="triton")} if won < 0.97 else {}


def _xfuser(bench: Bench, subject: Subject, mesh: SeqMesh) -> dict[str, Step]:
    """`direct` with xfuser's attention, where it is installed."""
    config, latents = subject.pipe.transformer.config, subject.latents
    tokens = latents[0, 0].numel() // math.prod(config.patch_size)
    plan = SequencePlan(tokens=tokens, heads=config.num_attention_heads, ring=1, ulysses=1)

    def load() -> XfuserAttention:
        check_xfuser(plan, device_type=bench.device.type, kernel=XFUSER_KERNEL)
        return xfuser_attention(mesh, kernel=XFUSER_KERNEL)

    hybrid, why = bench.attempt(load)
    if hybrid is None:
        bench.record(XFUSER, f"not available: {why}")
        return {}
    step = Step(method=Direct(), ranks=Ranks(mesh=mesh, hybrid=hybrid))
    bench.record(f"{XFUSER}, relative difference of a layer's attention", _difference(bench, step))
    return {XFUSER: step}


def _difference(bench: Bench, step: Step) -> float | str:
    """Relative difference of the first layer's attention from `direct`'s, or why it does not run."""
    subject = make_subject(bench, layers=1)
    outs: list[Tensor] = []
    hook = subject.pipe.transformer.blocks[0].attn1.register_forward_hook(lambda _attn, _args, out: outs.append(out))

    def both() -> float:
        for each in (step, Step(method=Direct())):
            with stepping(subject, each.method, kernel=XFUSER_KERNEL, passes=1, ranks=each.ranks) as call:
                call()
        return relative_error(*outs)

    found, why = bench.attempt(both)
    hook.remove()
    return why if found is None else found
