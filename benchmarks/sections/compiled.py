"""Blocks compiled once (`compile_repeated_blocks`) against eager ones: seconds of a step, and how many graphs were made."""

import time
import warnings

import torch
import torch._dynamo.utils

from benchmarks.measure import ratio, spread
from benchmarks.sections.bench import Bench
from benchmarks.sections.model import make_subject, stepper
from freespec.methods import Direct, FreeSpec, Method, SlidingWindow

LAYERS = 3  # more than one, so that a graph per layer would show; a whole model takes no longer to compile
ROUNDS = 3


def run(bench: Bench) -> None:
    """Eager and compiled models side by side in the same rounds."""
    kernel = bench.best_kernel()
    eager, compiled = make_subject(bench, layers=LAYERS), make_subject(bench, layers=LAYERS)
    compiled.pipe.transformer.compile_repeated_blocks(backend="eager" if bench.small else "inductor")
    methods: dict[str, Method] = {"direct": Direct(), "sliding_window": SlidingWindow(), "freespec dual": FreeSpec()}
    for name, method in methods.items():
        calls = {
            f"{name}, {kind}": stepper(subject, method, kernel=kernel)
            for kind, subject in (("eager", eager), ("compiled", compiled))
        }
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dynamo's about torch's own code
            for call in calls.values():
                call()
        bench.synchronize()
        first = time.perf_counter() - started
        times: dict[str, list[float]] = {variant: [] for variant in calls}
        for _ in range(ROUNDS):
            for variant, call in calls.items():
                times[variant].append(bench.seconds_and_peak(call)["seconds"])
        bench.record(
            name,
            {
                "layers": LAYERS,
                "kernel": kernel,
                "seconds_of_the_first_calls": first,
                "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] - before,
                **{variant: spread(seconds) for variant, seconds in times.items()},
                "compiled / eager": ratio(times[f"{name}, compiled"], times[f"{name}, eager"]),
            },
        )
