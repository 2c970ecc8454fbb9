"""The settings of batch.py: what they are, whether they go with each other, and what they make of the configuration."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace

from engine.batch.driver import Limits
from engine.batch.locks import Shard
from engine.batch.store import Verify
from engine.config import RunConfig
from engine.errors import UserError
from engine.load import pick_device, pick_dtype
from engine.paths import expand
from launch.replicas.place import PlacementStrategy
from launch.replicas.ray_pool import PLACEMENT_HELP, NoRayError, check_placement, check_ray


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's own settings, checked; their meaning is in `add_arguments`."""

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
    strategy: PlacementStrategy
    limits: Limits
    checkpoint_every: int
    keep_latents: bool
    verify: Verify
    retry_quarantined: bool
    gpu: str | None

    @property
    def nodes(self) -> list[str] | None:
        """The node of each rank of a replica, where it is known before Ray has placed them; else None."""
        if self.ray in (None, "local") or self.strategy == "STRICT_PACK":
            return ["one"] * self.ranks
        return list(map(str, range(self.ranks))) if self.strategy == "STRICT_SPREAD" else None

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
            strategy=given.placement_strategy,
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


def fix_degrees(config: RunConfig, degrees: tuple[int, int, int]) -> RunConfig:
    """The same run with the arrangement written down, so that every replica has the same."""
    names = ("cfg", "ring", "ulysses")
    return dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel, **dict(zip(names, degrees, strict=True)))
    )


def check_devices(config: RunConfig, options: Options) -> None:
    """Raise UserError for more ranks on this machine than it has GPUs, and for a Ray that cannot be used."""
    try:
        check_placement(options.strategy, address=options.ray, num_ranks=options.ranks)
        if options.ray is not None:
            check_ray(options.ray)
    except NoRayError as error:
        raise UserError(str(error)) from error
    if options.ray is None:
        device = pick_device(config.model.device)
        wanted = options.ranks * options.replicas
        if device.type == "cuda" and wanted > torch.cuda.device_count():
            raise UserError(
                f"{options.replicas} replicas of {options.ranks} ranks need {wanted} GPUs, and this machine has "
                f"{torch.cuda.device_count()}; use fewer"
            )


def add_arguments(parser: ArgumentParser) -> None:
    """The settings of the command beside those of a run."""
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
        ("placement_strategy", PlacementStrategy, "PACK", PLACEMENT_HELP),
        ("item_timeout", float, None, "seconds an item may take (default: 10 x the middle one, 10 minutes at least)"),
        ("start_timeout", float, 1800.0, "seconds a replica may take to load"),
        ("checkpoint_every", int, 5, "steps between checkpoints of an item; 0 writes none"),
        ("keep_latents", bool, False, "keep the latents of every video"),
        ("verify", Verify, "size", "how finished videos are looked at: their sizes, or their SHA-256"),
        ("retry_quarantined", bool, False, "try items again that failed for good"),
        ("gpu", str, None, "one of configs/gpus, for the prediction of --dry_run"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError as error:
        raise UserError(f"--seeds must be whole numbers with commas between them, got {text!r}") from error
