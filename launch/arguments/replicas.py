"""Options of replicas, for any command, and their checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jsonargparse import ArgumentParser, Namespace

from engine.batch.driver import Limits
from engine.batch.locks import Shard
from engine.config import RunConfig
from engine.errors import UserError
from engine.given.frames import GivenFrames
from engine.paths import expand
from launch.arguments.many_videos import check_output, refuse_empty
from launch.arguments.options import add_workers, check_workers
from launch.arguments.ranks import add_ranks, check_alone, check_started
from launch.process.attention_backend import check_environment
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
    snapshot_every: int
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


def read_replicas(given: Namespace, config: RunConfig, argv: list[str], *texts: str, name: str) -> Replicas | None:
    """Check a command that makes and measures many videos; return its replicas, or None if it makes them with `--nproc` ranks.

    `texts` are options that may not be empty.
    """
    refuse_empty(given, *texts)
    check_workers(given.workers)
    check_environment()
    check_output(config.output, name)
    if given.replicas is None and given.ray is None and given.gpus_per_replica is None:
        check_started(given.nproc, argv)
        return None
    check_alone("--replicas, --ray and --gpus_per_replica")
    return Replicas.of(given, config, snapshot_every=config.output.snapshot_every, sheets=True)


def add_ranks_and_replicas(parser: ArgumentParser) -> None:
    """Add the options of `read_replicas`."""
    add_workers(parser)
    add_ranks(parser)
    add_replicas(parser)


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
