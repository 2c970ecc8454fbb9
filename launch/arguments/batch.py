"""Command line of batch.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from engine.batch.suite import Suite, read_suite
from engine.batch.variants import Variant
from engine.config import RunConfig
from engine.errors import UserError
from engine.paths import expand
from engine.planner.gpu import read_gpu
from launch.arguments.many_videos import OF_ONE_VIDEO, check_output
from launch.arguments.ranks import check_model
from launch.arguments.replicas import Options, add_arguments
from launch.arguments.variants import read_variants
from launch.cli.parser import parse_run
from launch.ranks.backend import check_environment

DESCRIPTION = "Make every prompt of a suite with every method and seed. A restart makes only missing videos."


@dataclass(frozen=True, kw_only=True)
class Status:
    """`--status FOLDER`: show the state of a batch, without importing torch."""

    command: ClassVar[str] = "status"

    folder: Path


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
