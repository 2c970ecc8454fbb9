"""Messages before and after a batch: its plan, its start, its result, and why it halted."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from engine.batch.driver import Driver
from engine.batch.files import MANIFEST, SIDECAR, BatchFiles
from engine.batch.forecast import disk_forecast, gpu_hours
from engine.batch.items import Batch, Item
from engine.batch.journal import columns, report
from engine.batch.locks import Shard
from engine.config import RunConfig
from engine.errors import UserError
from engine.files.storage import REMEDY_FULL, describe_remedy
from engine.files.trees import DamagedError, Shape, read_tree
from engine.shown import describe_size
from launch.arguments.batch import Options
from launch.batching.work import Work
from launch.process.exit_codes import LostRankError

SUPPORT = "the same command continues"

# Fields of a sidecar that the summary reads.
REPORTED: Shape = SIDECAR | {
    "run.seconds.text": int | float,
    "run.seconds.denoise": int | float,
    "run.seconds.decode": int | float,
    "run.resumed_at": int,
}


def say_plan(config: RunConfig, options: Options, batch: Batch, mine: Sequence[Item], arrangement: str) -> None:
    """Print the plan of `--dry_run`."""
    files = BatchFiles(root=options.out)
    finished = {item: files.is_done(item, options.verify) for item in mine}
    done, undone = ([item for item in mine if finished[item] is wanted] for wanted in (True, False))
    left = [item for item in undone if options.retry_quarantined or files.quarantined(item) is None]
    disk = disk_forecast(files, config, left, replicas=options.replicas, keep_latents=options.keep_latents)
    given_up = f", {len(undone) - len(left)} failed before (--retry_quarantined)" if len(undone) > len(left) else ""
    hours, how = gpu_hours(config, batch.variants, left, gpu=options.gpu, ranks=options.ranks, given=options.given)
    video = config.video
    where = "this machine" if options.ray is None else f"Ray at {options.ray}"
    frames = len(left) * video.num_frames
    rows = [
        ["suite", f"{batch.suite.name}, {len(batch.suite.prompts)} prompts, sha256 {batch.suite.sha256[:12]}"],
        ["items", f"{len(batch.items)} = prompts x {len(options.seeds)} seeds x {len(batch.variants)} methods"],
        [
            "this shard",
            f"{len(mine)} items in {options.shard.name}, {len(mine) - len(undone)} done, {len(left)} to make{given_up}"
            + _others(batch, options.shard),
        ],
        ["video", f"{video.num_frames} frames of {video.height} x {video.width}, {frames} frames in all"],
        [
            "replicas",
            f"{options.replicas} of {options.ranks} ranks on {where}, {config.model.device}, {config.model.dtype}",
        ],
        ["plan of each", f"cfg x ring x ulysses {arrangement}"],
        ["GPU-hours", f"{hours:.2f} ({how})" if hours is not None else how],
        [
            "bytes",
            f"{describe_size(disk.needed)} ({disk.how}), {describe_size(disk.texts)} of it text; {describe_size(disk.free)} free",
        ],
    ]
    rows += [["configuration", f"{label} {config_id}"] for label, config_id in batch.config_ids.items()]
    rows += [["note", note] for note in [*batch.suite.notes, *_without_latents(files, done, options)]]
    print("\n".join(columns(rows)))


def say_start(options: Options, files: BatchFiles, batch: Batch, mine: Sequence[Item], work: Work) -> None:
    """Print what is about to be made."""
    for note in _without_latents(files, work.done, options):
        print(note)
    for note in batch.suite.notes:
        print(f"{batch.suite.name}: {note}")
    before = f"; {len(work.given_up)} failed before and are left out (--retry_quarantined)" if work.given_up else ""
    replicas = min(options.replicas, len(work.todo))
    print(
        f"{len(mine)} items: {len(work.done)} done, {len(work.todo)} to make on {replicas} replicas of {options.ranks} "
        f"ranks{before}",
        flush=True,
    )


def check_room(
    files: BatchFiles, config: RunConfig, left: Sequence[Item], *, replicas: int, keep_latents: bool
) -> None:
    """Raise UserError for a disk without room for the first items; print a note if the later items may fill it."""
    disk = disk_forecast(files, config, left, replicas=replicas, keep_latents=keep_latents)
    if disk.free < disk.least:
        raise UserError(
            f"{files.root} has {describe_size(disk.free)} free, and at least {describe_size(disk.least)} are needed for the "
            f"items in progress; {REMEDY_FULL}, or choose another folder; {SUPPORT}"
        )
    if disk.free < disk.needed:
        print(
            f"{files.root} has {describe_size(disk.free)} free, and {len(left)} items take about "
            f"{describe_size(disk.needed)} ({disk.how})",
            flush=True,
        )


def say_end(
    files: BatchFiles, driver: Driver | None, *, done: Sequence[Item], given_up: Sequence[Item], num_lines: int
) -> None:
    """Print the result: times, replicas that were given up, and counts; `num_lines` is that of the manifest."""
    made = [tree for item in done if (tree := _sidecar(files, item)) is not None]
    for line in report(made) if made else []:
        print(line)
    for entry in driver.entries if driver else ():
        if entry.state == "gone" and entry.failure is not None:
            print(f"{entry.replica.name} was given up after {entry.starts} starts: {entry.failure.message}")
    left, now = (driver.queue.left, len(driver.queue.done)) if driver else (0, 0)
    print(
        f"{len(done)} of {len(done) + len(given_up) + left} items done ({now} now), "
        f"{len(given_up)} in quarantine; {files.root / MANIFEST} has {num_lines} lines",
        flush=True,
    )


def describe_given_up(files: BatchFiles, given_up: Sequence[Item]) -> str:
    """The line about items in quarantine (at least one)."""
    first = files.quarantined(given_up[0])
    assert first is not None
    return (
        f"{len(given_up)} items failed for good, first {given_up[0].label}: {first['error']}; tracebacks are in "
        f"{files.quarantine}; add --retry_quarantined to try them again"
    )


def halted(driver: Driver, files: BatchFiles, config: RunConfig, *, keep_latents: bool) -> Exception:
    """Return the error that a halted batch ends with."""
    failure, left = driver.halted, driver.queue.left
    assert failure is not None
    message = f"{failure.message}; {left} items are left"
    match failure.kind:
        case "mistake":
            return UserError(failure.message)
        case "disk":
            remedy = describe_remedy(failure.message)
            with contextlib.suppress(OSError, UserError):  # the free space may be unreadable too
                if remedy == REMEDY_FULL:
                    remedy = f"{describe_disk(files, driver, config, keep_latents=keep_latents)}: {remedy}"
            return UserError(f"{message}; {remedy}; {SUPPORT}")
        case "alike":
            return LostRankError(f"{message}; {files.root / 'logs'} has the traceback; fix the cause; {SUPPORT}")
        case _:
            return LostRankError(f"{message}; {SUPPORT}")


def describe_disk(files: BatchFiles, driver: Driver, config: RunConfig, *, keep_latents: bool) -> str:
    """Describe the space that the remaining items need, and what is free."""
    left = [*driver.queue.waiting, *driver.queue.running.values()]
    disk = disk_forecast(files, config, left, replicas=len(driver.entries), keep_latents=keep_latents)
    return (
        f"they need about {describe_size(disk.videos + disk.texts)} ({disk.how}) and {describe_size(disk.work)} for snapshots, and {files.root} has "
        f"{describe_size(disk.free)}"
    )


def _others(batch: Batch, shard: Shard) -> str:
    """Describe the smallest and the largest shard: ids decide, so sizes differ slightly."""
    if shard.count == 1:
        return ""
    shards = [dataclasses.replace(shard, index=index + 1) for index in range(shard.count)]
    sizes = [sum(each.owns(item.item_id) for item in batch.items) for each in shards]
    return f"; the {shard.count} shards have {min(sizes)} to {max(sizes)} items"


def _without_latents(files: BatchFiles, done: Sequence[Item], options: Options) -> list[str]:
    """Note finished items that were made without latents, if --keep_latents is given."""
    count = sum(files.lacks_latents(item) for item in done) if options.keep_latents else 0
    if not count:
        return []
    return [
        f"{count} of {len(done)} finished items were made without --keep_latents and stay without latents; "
        "to have them, choose another folder"
    ]


def _sidecar(files: BatchFiles, item: Item) -> dict[str, Any] | None:
    """Read the sidecar of a finished item; print a line and return None if it is damaged."""
    try:
        return read_tree(files.of(item).sidecar, REPORTED, what="the sidecar of a video")
    except DamagedError as error:
        print(f"left out of the summary: {error}")
        return None
