"""batch.py: prompts x seeds x methods to videos, on replicas that may die, with nothing lost and nothing made twice."""

import contextlib
import dataclasses
import os
import secrets
import shutil
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from engine.batch.driver import Driver, Limits
from engine.batch.files import MANIFEST, SIDECAR, BatchFiles, identity_of
from engine.batch.forecast import arrange_replica, disk_forecast, gpu_hours
from engine.batch.journal import FileJournal, columns, describe_seconds, read_status, report, table
from engine.batch.locks import Shard, own_shard
from engine.batch.plan import Batch, Item, check_folder, claim_folder, plan_batch
from engine.batch.queue import Queue
from engine.batch.store import Shape, Verify, read_tree, writing_to
from engine.batch.suite import Suite, read_suite
from engine.config import RunConfig
from engine.decode_plan import check_tiles
from engine.errors import UserError
from engine.load import fetch, find_checkpoint, pick_device, pick_dtype, read_spec
from engine.paths import expand
from engine.ranks import fingerprints
from evaluation.suites import PREFIX, read_vbench_suite, to_batch
from launch.cli import parse_run
from launch.command import LostRankError
from launch.replicas.group import Group
from launch.replicas.local import WORKER, LocalRanks
from launch.replicas.ray_pool import NoRayError, RayPool, RayRanks, check_ray
from launch.stopping import Stopped

DESCRIPTION = "Make every prompt of a suite with every method and seed. Started again, it makes only what is missing."
SUPPORT = "the same command goes on"

# What the summary of a batch reads of every sidecar.
REPORTED: Shape = SIDECAR | {
    "run.seconds.text": int | float,
    "run.seconds.denoise": int | float,
    "run.seconds.decode": int | float,
    "run.resumed_at": int,
}


def main(argv: list[str]) -> int:
    """Plan, claim the output folder, make what is missing, and say what became of it; returns the exit code."""
    namespace, config = parse_run(argv, name="batch.py", description=DESCRIPTION, add_arguments=_add_arguments)
    if namespace.status is not None:
        if not namespace.status.strip():
            raise UserError("--status is empty; give the folder that was --out")
        return show_status(expand(namespace.status))
    options = Options.of(namespace, config)
    config = resolve_model(config, options)
    batch = read_batch(config, options)
    mine = [item for item in batch.items if options.shard.owns(item.item_id)]
    device = torch.device(config.model.device)
    arrangement = arrange_replica(config, options.methods, options.ranks, device, gpu=options.gpu)
    config = fix_degrees(config, arrangement.degrees)
    files = BatchFiles(root=options.out)
    check_devices(config, options)
    files.check()
    check_folder(options.out, batch)
    if namespace.dry_run:
        say_plan(config, options, batch, mine, f"{arrangement.degrees}: {arrangement.why}")
        return 0
    make_folder(options.out)
    with (
        writing_to(options.out, after=f"free some space or choose another --out; {SUPPORT}"),
        own_shard(options.out, options.shard),
    ):
        work = find_work(files, mine, options)
        say_start(options, files, batch, mine, work)
        if work.todo:
            return run(config, options, batch, files, work)
        claim_folder(options.out, batch)
        return finish(options, files, config, work, None)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's own settings, checked; their meaning is in `_add_arguments`."""

    suite: Path
    vbench: Path | None
    out: Path
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    ranks: int
    replicas: int
    gpus: bool
    on_cpu: bool
    shard: Shard
    ray: str | None
    limits: Limits
    checkpoint_every: int
    keep_latents: bool
    verify: Verify
    retry_quarantined: bool
    gpu: str | None

    @classmethod
    def of(cls, given: Namespace, config: RunConfig) -> "Options":
        """Check them one by one and against each other; UserError for what cannot be."""
        check_texts(given)
        for name in ("nproc", "replicas", "gpus_per_replica"):
            if given[name] is not None and given[name] < 1:
                raise UserError(f"--{name} must be 1 or more, got {given[name]}")
        if given.checkpoint_every < 0:
            raise UserError(f"--checkpoint_every must be 0 (never) or more, got {given.checkpoint_every}")
        if given.nproc and given.gpus_per_replica and given.nproc != given.gpus_per_replica:
            raise UserError(
                f"--nproc {given.nproc} and --gpus_per_replica {given.gpus_per_replica} contradict each other: every rank "
                "has one GPU; give one of them"
            )
        for name in ("item_timeout", "start_timeout"):
            if given[name] is not None and not given[name] > 0:
                raise UserError(f"--{name} must be more than 0 seconds, got {given[name]}")
        return cls(
            suite=expand(given.suite),
            vbench=expand(given.vbench) if given.vbench is not None else None,
            out=expand(given.out).absolute(),
            methods=tuple(_words(given.methods if given.methods is not None else config.method.name)),
            seeds=tuple(_numbers(given.seeds)) if given.seeds is not None else (config.sampler.seed,),
            ranks=given.nproc or given.gpus_per_replica or 1,
            replicas=given.replicas,
            gpus=given.gpus_per_replica is not None,
            on_cpu=config.model.device == "cpu",
            shard=Shard.parse(given.shard),
            ray=given.ray,
            limits=Limits(item=given.item_timeout, start=given.start_timeout),
            checkpoint_every=given.checkpoint_every,
            keep_latents=given.keep_latents,
            verify=given.verify,
            retry_quarantined=given.retry_quarantined,
            gpu=given.gpu,
        )


def check_texts(given: Namespace) -> None:
    """Raise UserError for a setting that is missing, or there without a value."""
    for name in ("suite", "out"):
        if given[name] is None:
            raise UserError(f"--{name} is missing; see --help")
    for name in ("suite", "vbench", "out", "methods", "seeds", "shard", "ray", "gpu"):
        if given[name] is not None and not given[name].strip():
            raise UserError(f"--{name} is empty; give a value, or leave it out")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What of a shard is done already, was given up before, and is to be made."""

    done: tuple[Item, ...]
    given_up: tuple[Item, ...]
    todo: tuple[Item, ...]


def resolve_model(config: RunConfig, options: Options) -> RunConfig:
    """The same run with device and dtype by name: a driver need not have the GPUs that its replicas have."""
    name = config.model.device
    if name == "auto":
        here = options.ray is None and torch.cuda.is_available()
        name = "cuda" if here or (options.ray is not None and options.gpus) else "cpu"
    if options.gpus and name == "cpu":
        raise UserError(
            "--gpus_per_replica asks for GPUs, but the model would run on the CPU "
            + ("(model.device cpu); leave one of them out" if config.model.device == "cpu" else "here: torch sees none")
        )
    if name == "cuda" and options.ray is not None and not options.gpus:
        raise UserError("model.device is cuda: give --gpus_per_replica, so that Ray reserves the GPUs")
    dtype = str(pick_dtype(config.model.dtype, torch.device(name))).removeprefix("torch.")
    model = dataclasses.replace(config.model, device=name, dtype=dtype)
    # Bars of several replicas would be written over each other; the table shows the steps.
    output = dataclasses.replace(config.output, progress="off")
    return dataclasses.replace(config, model=model, output=output)


def read_batch(config: RunConfig, options: Options) -> Batch:
    """The items, named by what decides them."""
    source = find_checkpoint(config.model.path)
    folder = fetch(source, config.model.revision, parts=(), offline=config.model.offline)
    # What the engine would refuse once it is loaded, now.
    spec = read_spec(folder)
    spec.check_video(config.video.num_frames, config.video.height, config.video.width)
    check_tiles(config.decode, spec)
    checkpoint = fingerprints(config, folder, from_hub=isinstance(source, str))["checkpoint"].hex()
    return plan_batch(
        config,
        read_prompts(options),
        methods=options.methods,
        seeds=options.seeds,
        checkpoint=checkpoint,
        dtype=config.model.dtype,
    )


def read_prompts(options: Options) -> Suite:
    """The prompts of a file, or of a VBench checkout if the suite is called `vbench:NAME`."""
    name = str(options.suite)
    if not name.startswith(PREFIX):
        if options.vbench is not None:
            raise UserError(f"--vbench is for --suite {PREFIX}NAME, and --suite is the file {name}")
        return read_suite(options.suite)
    if options.vbench is None:
        raise UserError(f"--suite {name} needs --vbench, the folder of a VBench checkout")
    return to_batch(read_vbench_suite(name, options.vbench))


def fix_degrees(config: RunConfig, degrees: tuple[int, int, int]) -> RunConfig:
    """The same run with the arrangement written down, so that every replica has the same."""
    names = ("cfg", "ring", "ulysses")
    return dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel, **dict(zip(names, degrees, strict=True)))
    )


def check_devices(config: RunConfig, options: Options) -> None:
    """Raise UserError for more ranks on this machine than it has GPUs, and for a Ray that cannot be used."""
    if options.ray is not None:
        try:
            check_ray(options.ray)
        except NoRayError as error:
            raise UserError(str(error)) from error
    else:
        device = pick_device(config.model.device)
        wanted = options.ranks * options.replicas
        if device.type == "cuda" and wanted > torch.cuda.device_count():
            raise UserError(
                f"{options.replicas} replicas of {options.ranks} ranks need {wanted} GPUs, and this machine has "
                f"{torch.cuda.device_count()}; use fewer"
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


def run(config: RunConfig, options: Options, batch: Batch, files: BatchFiles, work: Work) -> int:
    """Make what is to be made; returns the exit code."""
    wake = threading.Event()
    setup = {
        "config": dataclasses.asdict(config),
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


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Makes the task of an attempt: what a worker must know of an item beside its configuration."""

    suite: Mapping[str, Any]

    def __call__(self, item: Item, attempt: int, replica: str) -> dict[str, Any]:
        """See `launch.replicas.worker`; the token names this attempt's unfinished file, for ever."""
        return {
            "identity": identity_of(item),
            "name": item.name,
            "suite": self.suite,
            "attempt": attempt,
            "replica": replica,
            "token": secrets.token_hex(4),
        }


def keep(files: BatchFiles, item: Item, attempts: list[dict[str, Any]]) -> None:
    """Put an item into quarantine."""
    files.put_into_quarantine(item, error=attempts[-1]["message"], attempts=attempts)


def finish(options: Options, files: BatchFiles, config: RunConfig, work: Work, driver: Driver | None) -> int:
    """Compile the manifest and say how it went: 0 if every item of this shard is done, 1 or an error if not."""
    files.tidy(done=work.done, todo=work.todo)  # of attempts that were killed in this run
    manifest = files.write_manifest()
    for line in manifest.left_out:
        print(f"left out of {MANIFEST}: {line}")
    if driver is not None and driver.halted is not None and driver.halted.kind == "mistake":
        raise UserError(driver.halted.message)
    queue = driver.queue if driver else Queue.of(())
    everything = (*work.done, *(item for item in work.todo if item.item_id in queue.done))
    given_up = [*work.given_up, *(item for item in work.todo if item.item_id in queue.given_up)]
    for line in report([_sidecar(files, item) for item in everything]) if everything else []:
        print(line)
    for seat in driver.seats if driver else ():
        if seat.state == "gone" and seat.failure is not None:
            print(f"{seat.replica.name} was given up after {seat.starts} starts: {seat.failure.message}")
    print(
        f"{len(everything)} of {len(everything) + len(given_up) + queue.left} items done ({len(queue.done)} now), "
        f"{len(given_up)} in quarantine; {files.root / MANIFEST} has {manifest.rows} lines",
        flush=True,
    )
    if driver is not None and driver.halted is not None:
        raise halted(driver, files, config, keep_latents=options.keep_latents)
    if given_up:
        first = files.quarantined(given_up[0])
        assert first is not None
        print(
            f"error: {len(given_up)} items failed for good, first {given_up[0].label}: {first['error']}; tracebacks are in "
            f"{files.quarantine}; add --retry_quarantined to try them again",
            file=sys.stderr,
        )
    return 1 if given_up else 0


def _sidecar(files: BatchFiles, item: Item) -> dict[str, Any]:
    tree = read_tree(files.of(item).sidecar, REPORTED, what="the sidecar of a video")
    if tree is None:
        raise UserError(f"{files.of(item).sidecar} was there a moment ago and is gone; start the same command again")
    return tree


def halted(driver: Driver, files: BatchFiles, config: RunConfig, *, keep_latents: bool) -> Exception:
    """Why nothing more could be made, as the error that the command ends with."""
    failure, left = driver.halted, driver.queue.left
    assert failure is not None
    if failure.kind == "disk":
        disk = describe_disk(files, driver, config, keep_latents=keep_latents)
        return UserError(f"{failure.message}; {left} items are left; {disk}; {SUPPORT}")
    return LostRankError(f"{failure.message}; {left} items are left; {SUPPORT}")


def describe_disk(files: BatchFiles, driver: Driver, config: RunConfig, *, keep_latents: bool) -> str:
    """What the rest needs, and what there is."""
    left = [*driver.queue.waiting, *driver.queue.running.values()]
    disk = disk_forecast(files, config, left, replicas=len(driver.seats), keep_latents=keep_latents)
    return (
        f"they need about {_size(disk.videos + disk.texts)} ({disk.how}) and {_size(disk.work)} for checkpoints, and {files.root} has "
        f"{_size(disk.free)}: free some space"
    )


@contextlib.contextmanager
def open_replicas(
    options: Options, files: BatchFiles, *, count: int, setup: Mapping[str, Any], wake: threading.Event
) -> Iterator[list[Group]]:
    """The replicas: processes of this machine, or actors of a Ray cluster."""
    names = [f"replica-{index}" for index in range(count)]
    if options.ray is None:
        local = (_local(options, files, index, name, wake) for index, name in enumerate(names))
        yield [Group(name=name, ranks=ranks, setup=setup) for name, ranks in zip(names, local, strict=True)]
        return
    log = files.log(options.shard).with_suffix("") / "ray.log"
    try:
        with RayPool(options.ray, cpus=count * options.ranks, log=log, wake=wake.set) as pool:
            check_cluster(options, pool.gpus)
            yield [Group(name=name, ranks=_on_ray(pool, options, files, name), setup=setup) for name in names]
    except NoRayError as error:
        raise UserError(str(error)) from error


def check_cluster(options: Options, gpus: float) -> None:
    """Raise UserError for a batch that would run on the CPUs of a cluster with GPUs, unless that is what was asked for."""
    if gpus and not options.gpus and not options.on_cpu:
        raise UserError(
            f"the Ray cluster at {options.ray} has {gpus:g} GPUs, and this batch would run on CPUs; give "
            "--gpus_per_replica N to use them, or --model.device cpu if that is what you want"
        )


def _on_ray(pool: RayPool, options: Options, files: BatchFiles, name: str) -> RayRanks:
    return pool.ranks(
        name,
        options.ranks,
        gpus=options.gpus,
        command=WORKER,
        environment={},
        logs=[str(files.rank_log(options.shard, name, rank)) for rank in range(options.ranks)],
        cwd=str(Path.cwd()),
    )


def _local(options: Options, files: BatchFiles, index: int, name: str, wake: threading.Event) -> LocalRanks:
    environment = {}
    cores = len(os.sched_getaffinity(0))
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, cores // (options.ranks * options.replicas)))
    if torch.cuda.is_available():
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        every = given.split(",") if given else [str(device) for device in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(every[index * options.ranks : (index + 1) * options.ranks])
    return LocalRanks(
        options.ranks,
        log=lambda rank: files.rank_log(options.shard, name, rank),
        environment=environment,
        wake=wake.set,
    )


class Terminal:
    """What a person sees: on a terminal a table that is drawn anew each second, otherwise a line for each item."""

    def __init__(self, *, total: int) -> None:
        self._total = total
        self._done = 0
        self._lines = 0
        self._note: str | None = None
        self._live = sys.stdout.isatty()

    def event(self, event: Mapping[str, Any]) -> None:
        """A line for what ended, where there is no table; the table shows failures, and the last note below them."""
        if event["event"] == "done":
            self._done += 1
        if self._live:
            if event["event"] == "note":
                self._note = f"{event['time'][11:19]} {event['replica']}: {event['message']}"
            return
        if event["event"] == "done":
            took = describe_seconds(event["seconds"])
            print(f"{event['item']}: done in {took} on {event['replica']} ({self._done} of {self._total})", flush=True)
        elif event["event"] == "failed":
            after = "given up" if event["verdict"] == "quarantine" else "will be tried again"
            print(f"{event['item']}: failed on {event['replica']}, {after}: {event['message']}", flush=True)
        elif event["event"] in ("ended", "note"):
            print(f"{event['replica']}: {event['message']}", flush=True)

    def status(self, tree: Mapping[str, Any]) -> None:
        """The table, over the last one."""
        if not self._live:
            return
        text = table("batch", tree, note=self._note, size=shutil.get_terminal_size())
        up = f"\x1b[{self._lines}F\x1b[J" if self._lines else ""
        print(up + text, flush=True)
        self._lines = text.count("\n") + 1


def show_status(root: Path) -> int:
    """Print the state of every shard of a folder."""
    try:
        found = read_status(root)
    except OSError as error:
        raise UserError(f"cannot look into --status {root}: {error.strerror}") from error
    if not found:
        raise UserError(f"{root} holds no batch; give the folder that was --out")
    for name, tree in found:
        print(table(name, tree))
    return 0


def say_plan(config: RunConfig, options: Options, batch: Batch, mine: Sequence[Item], arrangement: str) -> None:
    """What `--dry_run` prints."""
    files = BatchFiles(root=options.out)
    finished = {item: files.is_done(item, options.verify) for item in mine}
    done, undone = ([item for item in mine if finished[item] is wanted] for wanted in (True, False))
    left = [item for item in undone if options.retry_quarantined or files.quarantined(item) is None]
    disk = disk_forecast(files, config, left, replicas=options.replicas, keep_latents=options.keep_latents)
    given_up = f", {len(undone) - len(left)} failed before (--retry_quarantined)" if len(undone) > len(left) else ""
    hours, how = gpu_hours(config, left, gpu=options.gpu, ranks=options.ranks)
    video = config.video
    where = "this machine" if options.ray is None else f"Ray at {options.ray}"
    frames = len(left) * video.num_frames
    rows = [
        ["suite", f"{batch.suite.name}, {len(batch.suite.prompts)} prompts, sha256 {batch.suite.sha256[:12]}"],
        ["items", f"{len(batch.items)} = prompts x {len(options.seeds)} seeds x {len(options.methods)} methods"],
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
        ["bytes", f"{_size(disk.needed)} ({disk.how}), {_size(disk.texts)} of it text; {_size(disk.free)} free"],
    ]
    rows += [["configuration", f"{tree['method']['name']} {config_id}"] for config_id, tree in batch.trees.items()]
    rows += [["note", note] for note in [*batch.suite.notes, *_without_latents(files, done, options)]]
    print("\n".join(columns(rows)))


def say_start(options: Options, files: BatchFiles, batch: Batch, mine: Sequence[Item], work: Work) -> None:
    """What is about to happen."""
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


def _others(batch: Batch, shard: Shard) -> str:
    """How many items the smallest and the largest shard have: ids decide, so they are about equal and not quite."""
    if shard.count == 1:
        return ""
    shards = [dataclasses.replace(shard, index=index + 1) for index in range(shard.count)]
    sizes = [sum(each.owns(item.item_id) for item in batch.items) for each in shards]
    return f"; the {shard.count} shards have {min(sizes)} to {max(sizes)} items"


def _without_latents(files: BatchFiles, done: Sequence[Item], options: Options) -> list[str]:
    """That --keep_latents comes too late for some of the finished items, if it does."""
    count = sum(files.lacks_latents(item) for item in done) if options.keep_latents else 0
    if not count:
        return []
    return [
        f"{count} of {len(done)} finished items were made without --keep_latents and stay without latents; "
        "to have them, choose another --out"
    ]


def _wait(wake: threading.Event) -> None:
    wake.wait(0.2)
    wake.clear()


def _size(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError as error:
        raise UserError(f"--seeds must be whole numbers with commas between them, got {text!r}") from error


def _add_arguments(parser: ArgumentParser) -> None:
    for name, kind, default, text in (
        ("suite", str, None, "text file with one prompt a line, or vbench:NAME (docs/vbench.md)"),
        ("vbench", str, None, "folder of a VBench checkout, for --suite vbench:NAME"),
        ("methods", str, None, "names with commas between them (default: method.name)"),
        ("seeds", str, None, "whole numbers with commas between them (default: sampler.seed)"),
        ("out", str, None, "folder of the videos; may hold a part of them already"),
        ("nproc", int, None, "ranks of each replica, which share one video"),
        ("replicas", int, 1, "groups of ranks that each make a video of their own"),
        ("gpus_per_replica", int, None, "the same as nproc, on GPUs; a rank has one"),
        ("shard", str, "1/1", "i/n: make only the i-th of n parts, where machines share nothing but the folder"),
        ("dry_run", bool, False, "say what would be made, how, and what it takes; make nothing"),
        ("status", str, None, "say how the batch in this folder goes, and end"),
        ("ray", str, None, "start replicas on a Ray cluster: auto, HOST:PORT, or local for a Ray of this run's own"),
        ("item_timeout", float, None, "seconds an item may take (default: 10 x the middle one, 10 minutes at least)"),
        ("start_timeout", float, 1800.0, "seconds a replica may take to load"),
        ("checkpoint_every", int, 5, "steps between checkpoints of an item; 0 writes none"),
        ("keep_latents", bool, False, "keep the latents of every video"),
        ("verify", Verify, "size", "how finished videos are looked at: their sizes, or their SHA-256"),
        ("retry_quarantined", bool, False, "try items again that failed for good"),
        ("gpu", str, None, "one of configs/gpus, for the prediction of --dry_run"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
