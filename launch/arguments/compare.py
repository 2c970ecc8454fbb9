"""Command line of compare.py."""

from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from engine.batch.locks import Shard
from engine.batch.variants import Variant
from engine.config import RunConfig
from engine.errors import UserError
from engine.paths import expand
from launch.arguments.many_videos import OF_ONE_VIDEO, read_seeds
from launch.arguments.options import add_methods, add_out, add_seeds
from launch.arguments.prompts import Prompts, add_num_prompts, add_prompts, choose_prompts
from launch.arguments.ranks import check_model
from launch.arguments.replicas import Replicas, add_ranks_and_replicas, read_replicas
from launch.arguments.variants import read_variants
from launch.cli.parser import parse_run

NAME = "compare.py"
DESCRIPTION = "Make the same prompts and seeds with several methods, measure the videos, and write a report."
UNREAD = (*OF_ONE_VIDEO, "method.name")
METHODS = "direct,sliding_window,freenoise,freelong,freepca,freespec"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The checked command line of compare.py; `given` is the parsed namespace. Without `replicas` this process makes the videos."""

    given: Namespace
    config: RunConfig
    prompts: Prompts
    variants: list[Variant]
    baseline: str
    shard: Shard | None
    replicas: Replicas | None

    @property
    def seeds(self) -> list[int]:
        """The seeds of `--seeds`, or sampler.seed."""
        return list(read_seeds(self.given.seeds, self.config.sampler.seed))

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return expand(self.given.out if self.given.report is None else self.given.report)


def read(argv: list[str]) -> Arguments:
    """Parse and check; UserError for a mistake."""
    given, config = parse_run(argv, name=NAME, description=DESCRIPTION, add_arguments=add_arguments, unread=UNREAD)
    replicas = read_replicas(given, config, argv, "out", "report", "measures", name=NAME)
    read_seeds(given.seeds, config.sampler.seed)
    prompts = choose_prompts(given)
    config = prompts.directed(config, argv)
    variants = read_variants(given.methods, argv, name=NAME, add_arguments=add_arguments)
    labels = [variant.label for variant in variants]
    baseline = given.baseline or labels[0]
    if baseline not in labels:
        raise UserError(f"--baseline {baseline} is not one of --methods: {', '.join(labels)}")
    shard = None if given.shard is None else Shard.parse(given.shard)
    if shard is not None and given.report_only:
        raise UserError("--report_only reports on every shard's videos; leave --shard out")
    check_model(config)
    return Arguments(
        given=given,
        config=config,
        prompts=prompts,
        variants=variants,
        baseline=baseline,
        shard=shard,
        replicas=replicas,
    )


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command beside the settings of a run."""
    add_methods(parser, default=METHODS)
    add_prompts(parser)
    add_num_prompts(parser)
    add_seeds(parser)
    add_out(parser, "the videos and the report", default="runs/compare")
    parser.add_argument("--baseline", type=str, help="baseline method of differences (default: the first)")
    parser.add_argument("--report_only", type=bool, default=False, help="make no videos; report on the existing ones")
    parser.add_argument(
        "--report_if_any",
        type=bool,
        default=False,
        help="exit with 0 even if no prompt has a video of every method yet",
    )
    parser.add_argument(
        "--report", type=str, help="folder of the report, for instance on a subset of the methods (default: --out)"
    )
    parser.add_argument(
        "--measures",
        type=str,
        help="file of kept measures: videos listed in it are not made again, and the report adds new ones",
    )
    parser.add_argument(
        "--long_measures",
        type=bool,
        default=False,
        help="measure the course of long videos too: likeness at a distance in time, loops, slopes, cuts",
    )
    parser.add_argument(
        "--shard",
        type=str,
        help="i/n: make and measure the i-th of n shares of the pairs of prompt and seed, without a report",
    )
    add_ranks_and_replicas(parser)
