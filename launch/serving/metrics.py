"""Prometheus metrics of a service."""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600)


class Metrics:
    """Counters of one service, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._jobs = Gauge("freespec_jobs", "Jobs in the folder", ["status"], registry=self._registry)
        self._videos = Histogram(
            "freespec_video_seconds", "Seconds of a video", buckets=_SECONDS, registry=self._registry
        )
        self._steps = Histogram("freespec_step_seconds", "Seconds of a step", buckets=_SECONDS, registry=self._registry)
        self._memory = Gauge(
            "freespec_peak_memory_bytes",
            "Peak memory of a replica, by its last video",
            ["kind"],
            registry=self._registry,
        )
        self._failures = Counter("freespec_failed_attempts", "Attempts that failed", ["last"], registry=self._registry)
        self._cancelled = Counter("freespec_cancelled", "Jobs that were cancelled at a step", registry=self._registry)

    def done(self, seconds: float, record: Mapping[str, Any] | None) -> None:
        """Count a video, and its steps by its sidecar."""
        self._videos.observe(seconds)
        run = (record or {}).get("run", {})
        for step in run.get("steps", ()):
            self._steps.observe(step["seconds"])
        for kind, count in run.get("peak_memory", {}).items():
            self._memory.labels(kind=kind.removesuffix("_bytes")).set(count)

    def failed(self, *, again: bool) -> None:
        """Count an attempt that failed, the last of its job or not."""
        self._failures.labels(last=str(not again).lower()).inc()

    def cancelled(self) -> None:
        """Count a job that was cancelled while it ran."""
        self._cancelled.inc()

    def text(self, counts: Mapping[str, int]) -> bytes:
        """The page that Prometheus reads."""
        for status, count in counts.items():
            self._jobs.labels(status=status).set(count)
        return generate_latest(self._registry)
