"""Options of commands that run on several ranks, and their checks."""

import os

from jsonargparse import ArgumentParser

from engine.config import RunConfig
from engine.errors import UserError
from engine.paths import find_checkpoint
from launch.arguments.options import add_nproc
from launch.process.argv import option_value
from launch.process.environment import LAUNCHER, RankEnv


def add_ranks(parser: ArgumentParser) -> None:
    """Add `--nproc` and `--verbose`."""
    add_nproc(parser)
    parser.add_argument(
        "--verbose", type=bool, default=False, help="show the output of every rank, prefixed with its number"
    )


def check_started(num_ranks: int | None, argv: list[str]) -> None:
    """Raise UserError for a `--nproc` below 1, under torchrun, or in a file."""
    rank_env = RankEnv.of_environment()
    if num_ranks is None or LAUNCHER in os.environ:
        return
    if num_ranks < 1:
        raise UserError(f"--nproc must be 1 or more, got {num_ranks}")
    if rank_env is not None and rank_env.world > 1:
        raise UserError(
            f"torchrun has started {rank_env.world} ranks, and --nproc {num_ranks} would start more on each; use one of them"
        )
    if option_value(argv, "--nproc") is None:
        raise UserError("give --nproc on the command line, not in a file")


def check_alone(flags: str) -> None:
    """Raise UserError under torchrun for options (`flags`) that start ranks themselves."""
    rank_env = RankEnv.of_environment()
    if rank_env is not None and rank_env.world > 1:
        raise UserError(f"torchrun has started {rank_env.world} ranks, and {flags} start their own; use one of them")


def check_model(config: RunConfig) -> None:
    """Raise UserError if `model.path` does not exist; ranks check it together once they have joined."""
    if RankEnv.of_environment() is None:
        find_checkpoint(config.model.path)
