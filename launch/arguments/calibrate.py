"""Command line of calibrate.py."""

import itertools
from dataclasses import dataclass

from jsonargparse import ArgumentParser, Namespace

from engine.config import RunConfig
from engine.errors import UserError
from engine.shown import quoted
from launch.arguments.many_videos import OF_ONE_VIDEO, read_seeds
from launch.arguments.options import add_out, add_prompts_file, add_seeds
from launch.arguments.prompts import Prompts, read_prompts
from launch.arguments.ranks import check_model
from launch.arguments.replicas import Replicas, add_ranks_and_replicas, read_replicas
from launch.cli.parser import parse_run

NAME = "calibrate.py"
DESCRIPTION = "Search FreeSpec's open settings on one list of prompts, and evaluate the result on another."
UNREAD = (*OF_ONE_VIDEO, "method.name")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The checked command line of calibrate.py; `given` is the parsed namespace.

    Attributes:
        given: the options.
        config: the run to calibrate.
        search: prompts of the search.
        held_out: prompts to judge the result on.
        rounds: number of `search` prompts in each round.
        seeds: seeds of the search and of the judgement.
        replicas: what makes the videos; None for this process and its ranks.
    """

    given: Namespace
    config: RunConfig
    search: Prompts
    held_out: Prompts
    rounds: list[int]
    seeds: dict[str, tuple[int, ...]]
    replicas: Replicas | None


def read(argv: list[str]) -> Arguments:
    """Parse and check; UserError for a mistake."""
    given, config = parse_run(argv, name=NAME, description=DESCRIPTION, add_arguments=add_arguments, unread=UNREAD)
    replicas = read_replicas(given, config, argv, "out", "measures", name=NAME)
    rounds = _check(given, config)
    first = config.sampler.seed
    seeds = {
        "search": read_seeds(given.seeds, first),
        "judged": read_seeds(given.judge_seeds, first, "--judge_seeds", default=2),
    }
    search, held_out = (read_prompts(None, given[name], f"--{name}") for name in ("prompts", "judge_prompts"))
    _check_lists(search, held_out, rounds)
    check_model(config)
    return Arguments(
        given=given, config=config, search=search, held_out=held_out, rounds=rounds, seeds=seeds, replicas=replicas
    )


def _check(given: Namespace, config: RunConfig) -> list[int]:
    """Check the arguments and return the number of prompts of each round."""
    if config.method.name != "freespec":
        raise UserError(
            f"{NAME} searches the settings of freespec, not of {config.method.name}; leave --method.name out"
        )
    for name, least in (("num_trials", 2), ("search_seed", 0)):
        if getattr(given, name) < least:
            raise UserError(f"--{name} must be {least} or more, got {getattr(given, name)}")
    if given.search_num_steps is not None and given.search_num_steps < 1:
        raise UserError(f"--search_num_steps must be 1 or more, got {given.search_num_steps}")
    for name in ("prompts", "judge_prompts"):
        if getattr(given, name) is None:
            raise UserError(f"--{name} is needed: settings are searched on one list of prompts and judged on another")
    try:
        rounds = [int(word) for word in given.rounds.split(",") if word.strip()]
    except ValueError as error:
        raise UserError(f"--rounds must be whole numbers with commas between them, got {given.rounds!r}") from error
    if not rounds or rounds[0] < 1 or any(a >= b for a, b in itertools.pairwise(rounds)):
        raise UserError(f"--rounds must be numbers of prompts that grow, such as 5,10,20, got {given.rounds!r}")
    return rounds


def _check_lists(search: Prompts, held_out: Prompts, rounds: list[int]) -> None:
    if rounds[-1] > len(search.texts):
        raise UserError(f"--rounds asks for {rounds[-1]} prompts, and --prompts has {len(search.texts)}")
    for prompts in (search, held_out):
        prompts.refuse_duplicates()
    both = next((prompt for prompt in search.texts if prompt in held_out.texts), None)
    if both is not None:
        raise UserError(
            f"a prompt is in both lists, so that settings would be judged on a prompt that they were searched on: {quoted(both)}"
        )


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command beside the settings of a run."""
    add_prompts_file(parser, ": those of the search")
    add_prompts_file(parser, ": others, to judge the result on", name="judge_prompts")
    parser.add_argument(
        "--num_trials", type=int, default=24, help="number of settings to try, including the given ones"
    )
    parser.add_argument("--search_seed", type=int, default=0, help="seed of the draws of settings")
    parser.add_argument(
        "--rounds", type=str, default="5,10,20", help="prompts of each round; the best third goes on to the next"
    )
    parser.add_argument(
        "--search_num_steps",
        type=int,
        help="denoising steps of the searched videos (default: sampler.num_steps, which the judged ones always have)",
    )
    add_seeds(parser, "of the search (default: sampler.seed)")
    add_seeds(parser, "of the judgement (default: sampler.seed and the next)", name="judge_seeds")
    add_out(parser, "the videos and the report", default="runs/calibration")
    parser.add_argument(
        "--measures",
        type=str,
        help="folder of kept measures: videos listed there are not made again",
    )
    add_ranks_and_replicas(parser)
