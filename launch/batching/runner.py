"""Make the items of a batch on replicas, and report the results."""

import contextlib
import dataclasses
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from engine.batch.driver import Driver
from engine.batch.files import MANIFEST, BatchFiles
from engine.batch.items import Batch, Item, claim_folder
from engine.batch.journal import FileJournal
from engine.batch.queue import Queue
from engine.config import RunConfig
from engine.denoise.snapshot import kept_steps
from engine.errors import UserError
from launch.arguments.replicas import Replicas
from launch.batching.messages import SUPPORT, describe_given_up, halted, say_end
from launch.batching.replicas import open_replicas
from launch.batching.terminal import Terminal
from launch.batching.work import Prepare, Work
from launch.process.exit_codes import GivenUpError
from launch.process.stopping import Stopped


def make(config: RunConfig, options: Replicas, batch: Batch, files: BatchFiles, work: Work) -> None:
    """Make the items of `work.todo`, and report; see `finish`."""
    wake = threading.Event()
    setup = worker_setup(options, batch)
    count = min(options.replicas, len(work.todo))
    journal = FileJournal(
        log=files.log(options.shard),
        status=files.status(options.shard),
        already=(len(work.done), len(work.given_up)),
        terminal=Terminal(total=len(work.todo)),
    )
    suite = batch.suite
    prepare = Prepare(suite={"name": suite.name, "sha256": suite.sha256, **suite.source})
    with open_replicas(options, files, count=count, setup=setup, wake=wake) as replicas, journal:
        # Only now: the replicas' devices have been checked against the configuration.
        claim_folder(options.out, batch)
        driver = make_driver(
            files,
            options,
            queue=Queue.of(work.todo),
            replicas=replicas,
            prepare=prepare,
            journal=journal,
            wait=lambda: _wait(wake),
        )
        journal.event("begin", host=socket.gethostname(), pid=os.getpid(), items=len(work.todo), replicas=count)
        total = len(work.todo)
        run_driver(driver, journal, files, left=lambda: f"{total - len(driver.queue.done)} of {total} items are left")
    finish(options, files, config, work, driver)


def make_driver(files: BatchFiles, options: Replicas, **parts: Any) -> Driver:
    """Make a driver that keeps what it gives up and saves in the files of a batch; `parts` are the others of `Driver`."""
    return Driver(
        is_permanent=lambda item, failure: failure.kind == "mistake" and not files.drop_snapshot(item),
        keep=lambda item, attempts: files.put_into_quarantine(item, error=attempts[-1]["message"], attempts=attempts),
        release=files.release,
        kept=lambda item: kept_steps(files.of(item).snapshot),
        limits=options.limits,
        **parts,
    )


def worker_setup(options: Replicas, batch: Batch) -> dict[str, Any]:
    """The first line of every worker; see `launch.batching.worker`."""
    return {
        "configs": {variant.label: dataclasses.asdict(variant.config) for variant in batch.variants},
        "root": str(options.out),
        "snapshot_every": options.snapshot_every,
        "keep_latents": options.keep_latents,
        "sheets": options.sheets,
        "given": None if options.given is None else options.given.arguments,
        "given_settings": batch.given,
        "preview_every": options.preview_every,
        "preview_factors": None if options.preview_factors is None else str(options.preview_factors),
    }


def run_driver(driver: Driver, journal: FileJournal, files: BatchFiles, *, left: Callable[[], str]) -> None:
    """Run until the driver ends, and end its replicas; an interruption lets them save their steps, and raises Stopped with `left()`."""
    try:
        driver.run()
    except KeyboardInterrupt as error:
        driver.stop(gently=True)
        journal.event("stopped")
        journal.write(driver, "stopped")
        with contextlib.suppress(OSError):  # the next start writes it again
            files.write_manifest()
        raise Stopped(f"{left()}; {SUPPORT}") from error
    except BaseException:
        driver.stop(gently=False)
        raise
    driver.stop(gently=False)
    journal.event("end", done=len(driver.queue.done), quarantined=len(driver.queue.given_up))
    journal.write(driver, "stopped" if driver.halted else "done")


def finish(options: Replicas, files: BatchFiles, config: RunConfig, work: Work, driver: Driver | None) -> None:
    """Write the manifest and print a summary; GivenUpError if items were given up, and another error if the batch has halted."""
    cause = driver.halted if driver is not None else None
    try:
        given_up = summarise(files, work, driver)
    except (OSError, UserError):
        if cause is None or cause.kind != "disk":
            raise  # otherwise the storage fault that halted the batch prevents reading too
    if driver is not None and cause is not None:
        raise halted(driver, files, config, keep_latents=options.keep_latents)
    if given_up:
        raise GivenUpError(describe_given_up(files, given_up))


def summarise(files: BatchFiles, work: Work, driver: Driver | None) -> list[Item]:
    """Tidy up, write the manifest and print what was made; returns all items that were given up."""
    files.tidy(done=work.done, todo=work.todo)  # of attempts that were killed in this run
    manifest = files.write_manifest()
    for line in manifest.left_out:
        print(f"left out of {MANIFEST}: {line}")
    queue = driver.queue if driver else Queue.of(())
    everything = (*work.done, *(item for item in work.todo if item.item_id in queue.done))
    given_up = [*work.given_up, *(item for item in work.todo if item.item_id in queue.given_up)]
    if driver is None or driver.halted is None or driver.halted.kind != "mistake":
        say_end(files, driver, done=everything, given_up=given_up, num_lines=manifest.rows)
    return given_up


def _wait(wake: threading.Event) -> None:
    wake.wait(0.2)
    wake.clear()
