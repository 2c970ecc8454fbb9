"""A profile of one dual step: trace.json.gz for a viewer, and the operators that take the most time."""

from torch.profiler import ProfilerActivity, profile

from benchmarks.sections.bench import Bench
from benchmarks.sections.model import make_subject, stepper
from freespec.methods import FreeSpec

LAYERS = 2
ROWS = 20


def run(bench: Bench) -> None:
    """Two layers, both passes; the step before is not recorded."""
    step = stepper(make_subject(bench, layers=LAYERS), FreeSpec(), kernel=bench.best_kernel())
    step()
    cuda = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        step()
        bench.synchronize()
    path = bench.out / "trace-dual.json.gz"
    profiler.export_chrome_trace(str(path))
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: getattr(event, key), reverse=True)
    total = sum(getattr(event, key) for event in events)
    bench.record(
        "operators",
        [
            {
                "name": event.key[:100],
                "calls": event.count,
                "ms": getattr(event, key) / 1e3,
                "share": getattr(event, key) / total,
            }
            for event in events[:ROWS]
        ],
    )
    bench.record("file", path.name)
    bench.record("layers", LAYERS)
