"""Command line of analyze.py."""

from dataclasses import dataclass

from jsonargparse import ArgumentParser, Namespace

from engine.config import RunConfig
from engine.errors import UserError
from launch.arguments.many_videos import OF_ONE_VIDEO
from launch.arguments.options import add_out
from launch.arguments.prompts import Prompts, add_num_prompts, add_prompts, choose_prompts
from launch.arguments.ranks import check_model
from launch.arguments.replicas import Replicas, add_ranks_and_replicas, read_replicas
from launch.cli.parser import parse_run

NAME = "analyze.py"
DESCRIPTION = "Measure how attention's singular spectra depend on the window, and the effect of low rank on videos."
UNREAD = OF_ONE_VIDEO


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The checked command line of analyze.py; `given` is the parsed namespace. Without `replicas` this process makes the low-rank and layer videos."""

    given: Namespace
    config: RunConfig
    prompts: Prompts
    shares: list[float]
    replicas: Replicas | None


def read(argv: list[str]) -> Arguments:
    """Parse and check; UserError for a mistake."""
    given, config = parse_run(argv, name=NAME, description=DESCRIPTION, add_arguments=add_arguments, unread=UNREAD)
    replicas = read_replicas(given, config, argv, "out", name=NAME)
    prompts = choose_prompts(given)
    config = prompts.directed(config, argv)
    if given.num_points < 2:
        raise UserError(f"--num_points must be 2 or more, got {given.num_points}")
    if given.num_reconstructed < 0:
        raise UserError(f"--num_reconstructed must be 0 or more, got {given.num_reconstructed}")
    if given.num_probed < 0:
        raise UserError(f"--num_probed must be 0 or more, got {given.num_probed}")
    config.check_traceable()
    shares = read_shares(given.ratios)
    check_model(config)
    return Arguments(given=given, config=config, prompts=prompts, shares=shares, replicas=replicas)


def read_shares(text: str) -> list[float]:
    """The shares of singular directions that are kept, largest first."""
    try:
        shares = sorted({float(word) for word in text.split(",") if word.strip()}, reverse=True)
    except ValueError as error:
        raise UserError(f"--ratios must be numbers with commas between them, got {text!r}") from error
    if (wrong := next((share for share in shares if not 0 < share <= 1), None)) is not None:
        raise UserError(f"--ratios: a ratio must lie in (0, 1], got {wrong}")
    if not shares:
        raise UserError("--ratios is empty; give shares such as --ratios 1,0.5,0.25,0.1")
    return shares


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command beside the settings of a run."""
    add_prompts(parser)
    add_num_prompts(parser)
    parser.add_argument("--num_points", type=int, default=10, help="number of evenly spaced steps to measure")
    parser.add_argument("--ratios", type=str, default="1,0.5,0.25,0.1", help="shares of singular directions to keep")
    parser.add_argument(
        "--num_reconstructed", type=int, default=2, help="number of prompts, from the first, to make low-rank videos of"
    )
    parser.add_argument(
        "--num_probed",
        type=int,
        default=0,
        help="number of prompts, from the first, to make videos of with FreeLOC in one layer alone: 2 x layers + 1 each",
    )
    add_out(parser, "tables, plots and videos", default="runs/analysis")
    add_ranks_and_replicas(parser)
