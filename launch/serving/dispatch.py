"""Dispatch the jobs of a service to replicas, and record their state."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.batch.driver import Driver
from engine.batch.items import Item
from engine.batch.journal import FileJournal
from engine.batch.queue import Queue
from engine.shown import describe_seconds, printable
from launch.arguments.replicas import Replicas
from launch.batching import runner
from launch.batching.group import Group
from launch.batching.work import Prepare
from launch.process.stopping import show
from launch.serving.jobs import Jobs
from launch.serving.metrics import Metrics
from launch.serving.planner import SUITE


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Updates jobs and metrics from the driver's events, and prints a line for each job that ends."""

    jobs: Jobs
    metrics: Metrics

    def event(self, event: Mapping[str, Any]) -> None:
        """Note one event."""
        name, jobs = event["event"], self.jobs
        if name == "done":
            jobs.pace = event["seconds"]
            job = jobs.job_of(event["id"])
            self.metrics.done(event["seconds"], None if job is None else jobs.record(job))
            jobs.end(event["id"])
            left = f"{jobs.num_open} jobs left" if jobs.num_open else "no job left"
            print(f"{event['id']}: done in {describe_seconds(event['seconds'])}; {left}", flush=True)
        elif name == "failed":
            again = event["verdict"] != "quarantine"
            self.metrics.failed(again=again)
            jobs.end(event["id"], error=event["message"], again=again)
            after = "will be tried again" if again else "given up"
            print(f"{event['id']}: failed, {after}: {event['message']}", flush=True)
        elif name == "cancelled":
            self.metrics.cancelled()
            jobs.end(event["id"])
        elif name == "ready":
            print(f"{event['replica']} has loaded the model in {describe_seconds(event['seconds'])}", flush=True)
        elif name in ("ended", "note"):
            print(f"{event['replica']}: {event['message']}", flush=True)

    def status(self, tree: Mapping[str, Any]) -> None:
        """The status is for `batch.py --status`, and for `/health`."""

    def warn(self, message: str) -> None:
        """Print a warning."""
        show(f"warning: {printable(message)}")


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Makes the task of an attempt, with the settings of its job."""

    jobs: Jobs
    prepare: Prepare

    def __call__(self, item: Item, attempt: int, replica: str) -> dict[str, Any]:
        """See `launch.batching.worker`."""
        job = self.jobs.job_of(item.item_id)
        assert job is not None, "a job stays until its item has ended"
        cancel = {"cancel": str(self.jobs.cancel_file(item.item_id))}
        return self.prepare(item, attempt, replica) | job.planned.task | cancel


def make_driver(
    jobs: Jobs, replicas: list[Group], journal: FileJournal, options: Replicas, is_open: Callable[[], bool]
) -> Driver:
    """Make the driver; its run goes on until `is_open` is false, it halts, or it is interrupted."""
    driver = runner.make_driver(
        jobs.files,
        options,
        queue=Queue(waiting=deque(), halts=False),
        replicas=replicas,
        prepare=Tasks(jobs=jobs, prepare=Prepare(suite={"name": SUITE.name, "sha256": SUITE.sha256})),
        journal=journal,
        wait=lambda: turn(driver, jobs),
        open=is_open,
    )
    return driver


def turn(driver: Driver, jobs: Jobs) -> None:
    """Between two turns of the driver: wait briefly, queue new jobs, and update the progress of running ones."""
    jobs.wake.wait(0.1)
    jobs.wake.clear()
    for job in jobs.take_new():
        driver.queue.add(job.planned.item)
    for item_id, job in list(jobs.leaving.items()):
        if item_id not in driver.queue.running:
            driver.queue.drop(job.planned.item)
            jobs.end(item_id)
    for entry in driver.entries:
        if entry.item is not None:
            jobs.move(entry.item.item_id, entry.step, entry.total)
