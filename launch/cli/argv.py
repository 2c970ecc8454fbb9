"""What the words of a command line ask for, before they are parsed. Standard library only."""

import itertools
import os
from collections.abc import Sequence

from launch.ranks.environment import LAUNCHER, RankEnv


def asked_value(argv: Sequence[str], name: str) -> str | None:
    """What an option was given last as `--name value`, `--name=value` or `--name` alone, which is `true`."""
    value = None
    for word, after in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
        key, equals, given = word.partition("=")
        if key == name:
            value = given if equals else ("true" if after.startswith("--") else after)
    return value


def without(command: Sequence[str], name: str) -> list[str]:
    """A command without an option and its value."""
    kept: list[str] = []
    words = list(command)
    while words:
        word = words.pop(0)
        if word == name and words and not words[0].startswith("--"):
            words.pop(0)
        elif word != name and not word.startswith(f"{name}="):
            kept.append(word)
    return kept


def asked_ranks(argv: Sequence[str]) -> int | None:
    """How many ranks `--nproc` asks this process to start; None if it asks for none or this process is a rank of several.

    What is wrong with `--nproc` is left to the command itself, which has the words for it.
    """
    rank_env = RankEnv.of_environment()
    if (
        LAUNCHER in os.environ
        or (rank_env is not None and rank_env.world > 1)
        or {"-h", "--help", "--print_config"} & {*argv}
    ):
        return None
    number = asked_value(argv, "--nproc")
    return int(number) if number is not None and number.isdecimal() and int(number) > 0 else None


def asked_ray(argv: Sequence[str]) -> str | None:
    """The cluster that `--ray` asks for; None without it, for a rank, and for what the command itself answers."""
    nproc, rank_env = asked_value(argv, "--nproc"), RankEnv.of_environment()
    wrong = nproc is not None and not (nproc.isdecimal() and int(nproc) > 0)
    if wrong or LAUNCHER in os.environ or rank_env is not None or {"-h", "--help", "--print_config"} & {*argv}:
        return None
    return asked_value(argv, "--ray")
