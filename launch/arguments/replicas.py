"""Options of batch.py, and of replicas for any command, and their checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jsonargparse import ArgumentParser, Namespace

from engine.batch.driver import Limits
from engine.batch.locks import Shard
from engine.batch.store import Verify
from engine.config import RunConfig
from engine.errors import UserError
from engine.given.frames import GivenFrames
from engine.paths import expand, find_file
from launch.arguments.given import add_given, read_given
from launch.arguments.many_videos import read_seeds, refuse_empty
from launch.arguments.options import add_methods, add_nproc, add_out, add_prompts_file, add_seeds
from launch.arguments.ranks import check_alone, check_started
from launch.cli.parser import add_former_name
from launch.process.environment import PlacementStrategy
from launch.ranks.ray_pool import PLACEMENT_HELP


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """Checked options of replicas; see `add_replicas`."""

    out: Path
    ranks: int
    replicas: int
    gpus: bool
    on_cpu: bool
    shard: Shard
    ray: str | None
    strategy: PlacementStrategy
    limits: Limits
    checkpoint_every: int
    keep_latents: bool = False
    sheets: bool = False
    given: GivenFrames | None = None
    preview_every: int = 0
    preview_factors: Path | None = None

    @property
    def nodes(self) -> list[str] | None:
        """The node of each rank of a replica; None if unknown before Ray has placed them."""
        if self.ray in (None, "local") or self.strategy == "STRICT_PACK":
            return ["one"] * self.ranks
        return list(map(str, range(self.ranks))) if self.strategy == "STRICT_SPREAD" else None

    @classmethod
    def of(cls, given: Namespace, config: RunConfig, /, **others: Any) -> Self:
        """Check the options of replicas; UserError for invalid or contradictory ones."""
        for name in ("nproc", "replicas", "gpus_per_replica"):
            if given[name] is not None and given[name] < 1:
                raise UserError(f"--{name} must be 1 or more, got {given[name]}")
        if given.nproc and given.gpus_per_replica and given.nproc != given.gpus_per_replica:
            raise UserError(
                f"--nproc {given.nproc} and --gpus_per_replica {given.gpus_per_replica} contradict each other: every rank "
                "has one GPU; give one of them"
            )
        for name in ("item_timeout", "start_timeout"):
            if given[name] is not None and not given[name] > 0:
                raise UserError(f"--{name} must be more than 0 seconds, got {given[name]}")
        refuse_empty(given, "ray")
        return cls(
            out=expand(given.out).absolute(),
            ranks=given.nproc or given.gpus_per_replica or 1,
            replicas=given.replicas or 1,
            gpus=given.gpus_per_replica is not None,
            on_cpu=config.model.device == "cpu",
            shard=Shard() if given.get("shard") is None else Shard.parse(given.shard),
            ray=given.ray,
            strategy=given.placement_strategy,
            limits=Limits(item=given.item_timeout, start=given.start_timeout),
            **others,
        )


def read_replicas(given: Namespace, config: RunConfig, argv: list[str]) -> Replicas | None:
    """The replicas of a command that otherwise makes its videos itself, with `--nproc` ranks; None without their options."""
    if given.replicas is None and given.ray is None and given.gpus_per_replica is None:
        check_started(given.nproc, argv)
        return None
    check_alone("--replicas, --ray and --gpus_per_replica")
    return Replicas.of(given, config, checkpoint_every=config.output.checkpoint_every, sheets=True)


@dataclass(frozen=True, kw_only=True)
class Options(Replicas):
    """Checked options of batch.py; see `add_arguments`."""

    prompts: Path
    vbench: Path | None
    seeds: tuple[int, ...]
    verify: Verify
    retry_quarantined: bool
    gpu: str | None

    @classmethod
    def of(cls, given: Namespace, config: RunConfig, /, **others: Any) -> Self:
        """Check all options; UserError for invalid ones."""
        check_texts(given)
        if given.checkpoint_every < 0:
            raise UserError(
                f"--checkpoint_every must be 0 (only when stopped, and before decoding) or more, got {given.checkpoint_every}"
            )
        seeds = read_seeds(given.seeds, config.sampler.seed)
        return super().of(
            given,
            config,
            prompts=find_file(given.prompts),
            vbench=expand(given.vbench) if given.vbench is not None else None,
            seeds=seeds,
            checkpoint_every=given.checkpoint_every,
            keep_latents=given.keep_latents,
            verify=given.verify,
            retry_quarantined=given.retry_quarantined,
            gpu=given.gpu,
            given=read_given(given),
            **others,
        )


def check_texts(given: Namespace) -> None:
    """Raise UserError for an option that is missing or empty."""
    for name in ("prompts", "out"):
        if given[name] is None:
            raise UserError(f"--{name} is missing; see --help")
    refuse_empty(given, "prompts", "vbench", "out", "methods", "seeds", "shard", "gpu")


def add_replicas(parser: ArgumentParser) -> None:
    """Add the options of replicas other than `--nproc`."""
    for name, kind, default, text in (
        ("replicas", int, None, "groups of ranks, each making its own video (default: 1)"),
        ("gpus_per_replica", int, None, "the same as nproc, with one GPU per rank"),
        ("ray", str, None, "start replicas on a Ray cluster: auto, HOST:PORT, or local to start Ray on this machine"),
        ("placement_strategy", PlacementStrategy, "PACK", PLACEMENT_HELP),
        (
            "item_timeout",
            float,
            None,
            "time limit of an item in seconds (default: 10 x the median, at least 10 minutes)",
        ),
        ("start_timeout", float, 1800.0, "time limit for a replica to load, in seconds"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command, beside the settings of a run."""
    add_prompts_file(parser, ", or vbench:NAME (docs/vbench.md)")
    add_methods(parser, " (default: method.name)")
    add_seeds(parser)
    add_out(parser, "the videos; may already hold some of them")
    add_nproc(parser)
    for name, kind, default, text in (
        ("vbench", str, None, "folder of a VBench checkout, for --prompts vbench:NAME"),
        ("shard", str, "1/1", "i/n: make only the i-th of n parts; machines need share only the folder"),
        ("dry_run", bool, False, "print the plan and its cost; make nothing"),
        ("status", str, None, "print the state of the batch in this folder, and end"),
        (
            "checkpoint_every",
            int,
            5,
            "steps between checkpoints of an item; 0 writes one when stopped, and before decoding",
        ),
        ("keep_latents", bool, False, "keep the latents of every video"),
        ("verify", Verify, "full", "check of finished videos: full (SHA-256), or size"),
        ("retry_quarantined", bool, False, "retry items that failed for good"),
        ("gpu", str, None, "one of configs/gpus, for the prediction of --dry_run"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    add_given(parser)
    add_replicas(parser)
    add_former_name(parser, "suite", "prompts")
