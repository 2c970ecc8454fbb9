"""Command line of batch.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from jsonargparse import ArgumentParser, Namespace

from engine.batch.store import Verify
from engine.batch.suite import Suite, read_suite
from engine.batch.variants import Variant
from engine.config import RunConfig
from engine.errors import UserError
from engine.paths import expand, find_file
from engine.planner.gpu import read_gpu
from launch.arguments.given import add_given, read_given
from launch.arguments.many_videos import OF_ONE_VIDEO, check_output, read_seeds, refuse_empty
from launch.arguments.options import add_methods, add_nproc, add_out, add_prompts_file, add_seeds
from launch.arguments.ranks import check_model
from launch.arguments.replicas import Replicas, add_replicas
from launch.arguments.variants import read_variants
from launch.cli.parser import add_former_name, parse_run
from launch.process.attention_backend import check_environment

DESCRIPTION = "Make every prompt of a suite with every method and seed. A restart makes only missing videos."


@dataclass(frozen=True, kw_only=True)
class Status:
    """`--status FOLDER`: show the state of a batch, without importing torch."""

    command: ClassVar[str] = "status"

    folder: Path


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
        if given.snapshot_every < 0:
            raise UserError(
                f"--snapshot_every must be 0 (only when stopped, and before decoding) or more, got {given.snapshot_every}"
            )
        seeds = read_seeds(given.seeds, config.sampler.seed)
        return super().of(
            given,
            config,
            prompts=find_file(given.prompts),
            vbench=expand(given.vbench) if given.vbench is not None else None,
            seeds=seeds,
            snapshot_every=given.snapshot_every,
            keep_latents=given.keep_latents,
            verify=given.verify,
            retry_quarantined=given.retry_quarantined,
            gpu=given.gpu,
            given=read_given(given),
            **others,
        )


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The checked command line of batch.py."""

    config: RunConfig
    variants: list[Variant]
    options: Options
    suite: Suite
    dry_run: bool


def read(argv: list[str]) -> Arguments | Status:
    """Parse and check; UserError for a mistake."""
    namespace, config = parse_run(
        argv,
        name="batch.py",
        description=DESCRIPTION,
        add_arguments=add_arguments,
        unread=(*OF_ONE_VIDEO, "output.progress"),
    )
    if namespace.status is not None:
        if not namespace.status.strip():
            raise UserError("--status is empty; give the --out folder of a batch")
        return Status(folder=expand(namespace.status))
    check_environment()
    check_output(config.output, "batch.py")
    options = Options.of(namespace, config)
    variants = [Variant.of(config, config.method.name)]
    if namespace.methods is not None:
        variants = read_variants(namespace.methods, argv, name="batch.py", add_arguments=add_arguments)
    if options.gpu is not None:
        read_gpu(options.gpu)
    check_model(config)
    if options.given is not None:
        options.given.check_files()
    suite = read_prompts(options)
    return Arguments(config=config, variants=variants, options=options, suite=suite, dry_run=namespace.dry_run)


def read_prompts(options: Options) -> Suite:
    """Read the prompts of a file, or of a VBench checkout for `vbench:NAME`."""
    name = str(options.prompts)
    if not name.startswith("vbench:"):
        if options.vbench is not None:
            raise UserError(f"--vbench is for --prompts vbench:NAME, and --prompts is the file {name}")
        return read_suite(options.prompts)
    if options.vbench is None:
        raise UserError(f"--prompts {name} needs --vbench, the folder of a VBench checkout")
    from evaluation.vbench.suites import read_vbench_suite  # noqa: PLC0415 - not in the installed library

    return read_vbench_suite(name, options.vbench)


def check_texts(given: Namespace) -> None:
    """Raise UserError for an option that is missing or empty."""
    for name in ("prompts", "out"):
        if given[name] is None:
            raise UserError(f"--{name} is missing; see --help")
    refuse_empty(given, "prompts", "vbench", "out", "methods", "seeds", "shard", "gpu")


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
            "snapshot_every",
            int,
            5,
            "steps between snapshots of an item; 0 writes one when stopped, and before decoding",
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
    add_former_name(parser, "checkpoint_every", "snapshot_every", int)
