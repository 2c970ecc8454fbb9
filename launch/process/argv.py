"""Look up options in argv before it is parsed. Standard library only."""

import itertools
import os
from collections.abc import Sequence

from launch.process.environment import LAUNCHER, RankEnv


def option_value(argv: Sequence[str], name: str) -> str | None:
    """Return the last value of an option, as `--name value`, `--name=value`, or `true` for `--name` alone."""
    value = None
    for word, after in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
        key, equals, given = word.partition("=")
        if key == name:
            value = given if equals else ("true" if after.startswith("--") else after)
    return value


def without(command: Sequence[str], name: str) -> list[str]:
    """Remove an option and its value from a command."""
    kept: list[str] = []
    words = list(command)
    while words:
        word = words.pop(0)
        if word == name and words and not words[0].startswith("--"):
            words.pop(0)
        elif word != name and not word.startswith(f"{name}="):
            kept.append(word)
    return kept


def requested_ranks(argv: Sequence[str]) -> int | None:
    """Return the number of ranks that `--nproc` asks for; None without it, or on a rank.

    An invalid `--nproc` gives None too: the command itself reports it.
    """
    rank_env = RankEnv.of_environment()
    if (
        LAUNCHER in os.environ
        or (rank_env is not None and rank_env.world > 1)
        or {"-h", "--help", "--print_config"} & {*argv}
    ):
        return None
    number = option_value(argv, "--nproc")
    return int(number) if number is not None and number.isdecimal() and int(number) > 0 else None


def requested_ray(argv: Sequence[str]) -> str | None:
    """Return the cluster that `--ray` names; None without it, on a rank, for help, and for an invalid `--nproc`."""
    nproc, rank_env = option_value(argv, "--nproc"), RankEnv.of_environment()
    wrong = nproc is not None and not (nproc.isdecimal() and int(nproc) > 0)
    if wrong or LAUNCHER in os.environ or rank_env is not None or {"-h", "--help", "--print_config"} & {*argv}:
        return None
    return option_value(argv, "--ray")
