"""batch.py: prompts x seeds x methods to videos, on replicas that may die, with nothing lost and nothing made twice."""

import contextlib
import dataclasses
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.batch.driver import Driver
from engine.batch.files import MANIFEST, BatchFiles
from engine.batch.forecast import arrange_replica
from engine.batch.items import Batch, Item, check_folder, claim_folder, plan_batch
from engine.batch.journal import FileJournal
from engine.batch.locks import own_shard
from engine.batch.queue import Queue
from engine.batch.variants import Variant
from engine.config import RunConfig
from engine.decode.tiling import check_tiles
from engine.denoise.saved import kept_steps
from engine.errors import UserError
from engine.files.storage import writing_to
from engine.load.checkpoint import open_checkpoint
from launch.arguments.batch import Arguments, Status, read
from launch.batching.devices import check_devices, fix_degrees, resolve_model
from launch.batching.options import Options
from launch.batching.replicas import open_replicas
from launch.batching.report import SUPPORT, check_room, halted, say_end, say_given_up, say_plan, say_start
from launch.batching.terminal import Terminal
from launch.batching.work import Prepare, Work
from launch.commands import status
from launch.process.stopping import Stopped
from launch.prompts import look_at_prompts


def main(argv: list[str]) -> int:
    """Read the command line and make the batch, or say how it goes; returns the exit code."""
    given = read(argv)
    return status.run(given) if isinstance(given, Status) else run(given)


def run(given: Arguments) -> int:
    """Plan, claim the output folder, make what is missing, and say what became of it; returns the exit code."""
    options = given.options
    config = resolve_model(given.config, options)
    variants = [variant.sharing(config) for variant in given.variants]
    device = torch.device(config.model.device)
    arrangement = arrange_replica(variants, options.ranks, device, gpu=options.gpu, nodes=options.nodes)
    config = fix_degrees(config, arrangement.degrees)
    batch = read_batch(config, [variant.sharing(config) for variant in variants], given)
    mine = [item for item in batch.items if options.shard.owns(item.item_id)]
    files = BatchFiles(root=options.out)
    check_devices(config, options)
    files.check()
    check_folder(options.out, batch)
    look_at_prompts(config, [(prompt.where(batch.suite.name), prompt.text) for prompt in batch.suite.prompts])
    if given.dry_run:
        say_plan(config, options, batch, mine, f"{arrangement.degrees}: {arrangement.why}")
        return 0
    make_folder(options.out)
    with (
        writing_to(options.out, after=SUPPORT),
        own_shard(options.out, options.shard),
    ):
        work = find_work(files, mine, options)
        if work.todo:
            check_room(files, config, work.todo, replicas=options.replicas, keep_latents=options.keep_latents)
        say_start(options, files, batch, mine, work)
        if work.todo:
            return make(config, options, batch, files, work)
        claim_folder(options.out, batch)
        return finish(options, files, config, work, None)


def read_batch(config: RunConfig, variants: Sequence[Variant], given: Arguments) -> Batch:
    """The items, named by what decides them."""
    checkpoint = open_checkpoint(config.model)
    # What the engine would refuse once it is loaded, now.
    spec = checkpoint.spec
    spec.check_video(config.video.num_frames, config.video.height, config.video.width)
    check_tiles(config.decode, spec)
    return plan_batch(
        variants,
        given.suite,
        seeds=given.options.seeds,
        checkpoint=checkpoint.digest,
        dtype=config.model.dtype,
    )


def make_folder(root: Path) -> None:
    """Make the output folder; UserError if it cannot be written to."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".{os.getpid()}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to --out {root}: {error.strerror}") from error


def find_work(files: BatchFiles, mine: Sequence[Item], options: Options) -> Work:
    """Look at every item's files; delete what killed processes left of it."""
    done, given_up, todo = [], [], []
    for item in mine:
        if files.is_done(item, options.verify):
            done.append(item)
        elif files.quarantined(item) is None:
            todo.append(item)
        elif options.retry_quarantined:
            files.release(item)
            todo.append(item)
        else:
            given_up.append(item)
    files.tidy(done=done, todo=todo)
    return Work(done=tuple(done), given_up=tuple(given_up), todo=tuple(todo))


def make(config: RunConfig, options: Options, batch: Batch, files: BatchFiles, work: Work) -> int:
    """Make what is to be made; returns the exit code."""
    wake = threading.Event()
    setup = {
        "configs": {variant.label: dataclasses.asdict(variant.config) for variant in batch.variants},
        "root": str(options.out),
        "checkpoint_every": options.checkpoint_every,
        "keep_latents": options.keep_latents,
    }
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
        # Not before the replicas' devices are known to be those that the configuration is for.
        claim_folder(options.out, batch)
        driver = Driver(
            queue=Queue.of(work.todo),
            replicas=replicas,
            prepare=prepare,
            hopeless=lambda item, failure: failure.kind == "mistake" and not files.drop_checkpoint(item),
            keep=lambda item, attempts: keep(files, item, attempts),
            release=files.release,
            kept=lambda item: kept_steps(files.of(item).checkpoint),
            journal=journal,
            limits=options.limits,
            wait=lambda: _wait(wake),
        )
        journal.event("begin", host=socket.gethostname(), pid=os.getpid(), items=len(work.todo), replicas=count)
        try:
            driver.run()
        except KeyboardInterrupt as error:
            driver.stop(gently=True)
            journal.event("stopped")
            journal.write(driver, "stopped")
            with contextlib.suppress(OSError):  # the next start writes it again
                files.write_manifest()
            left = len(work.todo) - len(driver.queue.done)
            raise Stopped(f"{left} of {len(work.todo)} items are left; {SUPPORT}") from error
        except BaseException:
            driver.stop(gently=False)
            raise
        driver.stop(gently=False)
        journal.event("end", done=len(driver.queue.done), quarantined=len(driver.queue.given_up))
        journal.write(driver, "stopped" if driver.halted else "done")
    return finish(options, files, config, work, driver)


def keep(files: BatchFiles, item: Item, attempts: list[dict[str, Any]]) -> None:
    """Put an item into quarantine."""
    files.put_into_quarantine(item, error=attempts[-1]["message"], attempts=attempts)


def finish(options: Options, files: BatchFiles, config: RunConfig, work: Work, driver: Driver | None) -> int:
    """Compile the manifest and say how it went: 0 if every item of this shard is done, 1 or an error if not."""
    cause = driver.halted if driver is not None else None
    try:
        given_up = summarise(files, work, driver)
    except (OSError, UserError):
        if cause is None or cause.kind != "disk":
            raise  # else the storage that halted the batch does not let itself be read either
    if driver is not None and cause is not None:
        raise halted(driver, files, config, keep_latents=options.keep_latents)
    if given_up:
        say_given_up(files, given_up)
    return 1 if given_up else 0


def summarise(files: BatchFiles, work: Work, driver: Driver | None) -> list[Item]:
    """Tidy up, compile the manifest and print what was made; returns the items that were given up, before or now."""
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
