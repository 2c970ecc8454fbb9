"""A profile of one dual step: trace.json.gz for a viewer, and the operators that take the most time."""

from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.sections.bench import Bench
from benchmarks.sections.model import make_subject, stepping
from freespec.methods import FreeSpec

LAYERS = 2
ROWS = 20


def run(bench: Bench) -> None:
    """Two layers, both passes; the step before is not recorded."""
    cuda = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with stepping(make_subject(bench, layers=LAYERS), FreeSpec(), kernel=bench.best_kernel()) as step:
        step()
        bench.synchronize()
        with profile(activities=activities, acc_events=True) as profiler:
            step()
            bench.synchronize()
    path = bench.out / "trace-dual.json.gz"
    profiler.export_chrome_trace(str(path))
    rows = largest(profiler.key_averages(), cuda=cuda)
    bench.record("operators", {row["name"]: row for row in rows})
    bench.record("file", path.name)
    bench.record("layers", LAYERS)


def largest(events: Iterable[Any], *, cuda: bool) -> list[dict[str, Any]]:
    """The rows that take the most time, and what share of all each is.

    On CUDA only kernels and copies count: operators and named regions include the time of the kernels that they start.
    """
    kind, key = (DeviceType.CUDA, "self_device_time_total") if cuda else (DeviceType.CPU, "self_cpu_time_total")
    counted = [event for event in events if event.device_type == kind and not event.is_user_annotation]
    counted.sort(key=lambda event: getattr(event, key), reverse=True)
    total = sum(getattr(event, key) for event in counted)
    return [
        {
            "name": event.key[:100],
            "calls": event.count,
            "ms": getattr(event, key) / 1e3,
            "share": getattr(event, key) / total,
        }
        for event in counted[:ROWS]
    ]
