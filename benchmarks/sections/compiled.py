"""Blocks compiled once (`compile_repeated_blocks`) against eager ones: seconds of a step, and how many graphs were made."""

import time
import warnings
from contextlib import ExitStack
from typing import Any

import torch
import torch._dynamo.utils

from benchmarks.measure import in_turn, ratio, spread
from benchmarks.sections.bench import Bench
from benchmarks.sections.model import Subject, make_subject, stepping
from freespec.methods import Direct, FreeSpec, Method, SlidingWindow

LAYERS = 3  # more than one, so that a graph per layer would be seen
ROUNDS = 3


def run(bench: Bench) -> None:
    """Eager and compiled models side by side in the same rounds."""
    kernel = bench.best_kernel()
    eager, compiled = make_subject(bench, layers=LAYERS), make_subject(bench, layers=LAYERS)
    compiled.pipe.transformer.compile_repeated_blocks(backend="eager" if bench.small else "inductor")
    methods: dict[str, Method] = {"direct": Direct(), "sliding_window": SlidingWindow(), "freespec dual": FreeSpec()}
    for name, method in methods.items():
        bench.record(name, compare(bench, {"eager": eager, "compiled": compiled}, method, kernel=kernel))


def compare(bench: Bench, subjects: dict[str, Subject], method: Method, *, kernel: str) -> dict[str, Any]:
    """Seconds of a step of each, and the graphs that were made for it."""
    with ExitStack() as stack:
        calls = {
            kind: stack.enter_context(stepping(subject, method, kernel=kernel)) for kind, subject in subjects.items()
        }
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of dynamo about torch's code
            for call in calls.values():
                call()
        bench.synchronize()
        first = time.perf_counter() - started
        times: dict[str, list[float]] = {kind: [] for kind in calls}
        for round_ in range(ROUNDS):
            for kind, call in in_turn(calls.items(), round_):
                times[kind].append(bench.seconds_and_peak(call)["seconds"])
    return {
        "layers": LAYERS,
        "kernel": kernel,
        "seconds_of_the_first_calls": first,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] - before,
        **{kind: spread(seconds) for kind, seconds in times.items()},
        "compiled / eager": ratio(times["compiled"], times["eager"]),
    }
