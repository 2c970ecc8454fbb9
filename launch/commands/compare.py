"""compare.py: methods on the same prompts and seeds, one load of the model, and a report."""

import contextlib
import json
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.progress import enabled
from launch.cli import parse_run
from launch.commands.generate import read_prompts
from launch.comparison.make import check_layouts, make_missing, missing_videos
from launch.comparison.report import write_report
from launch.comparison.store import Comparison
from launch.comparison.variants import read_variants
from launch.outputs import expand
from launch.ranks import check_started, open_ranks
from launch.stopping import Place, Stopped

NAME = "compare.py"
DESCRIPTION = "Make the same prompts and seeds with several methods, measure the videos, and write a report."
METHODS = "direct,sliding_window,freenoise,freelong,freepca,freespec"


def main(argv: list[str]) -> None:
    """Read the settings, make what is missing of the videos on all ranks, then measure and report on rank 0."""
    namespace, config = parse_run(argv, name=NAME, description=DESCRIPTION, add_arguments=_add_arguments)
    check_started(namespace.nproc)
    if namespace.num_seeds < 1:
        raise UserError(f"--num_seeds must be 1 or more, got {namespace.num_seeds}")
    prompts = choose_prompts(namespace)
    variants = read_variants(namespace.methods, argv, name=NAME, add_arguments=_add_arguments)
    labels = [variant.label for variant in variants]
    baseline = namespace.baseline or labels[0]
    if baseline not in labels:
        raise UserError(f"--baseline {baseline} is none of the compared: {', '.join(labels)}")
    seeds = [config.sampler.seed + number for number in range(namespace.num_seeds)]
    comparison = Comparison(folder=expand(namespace.out), variants=variants, prompts=prompts, seeds=seeds)
    if not namespace.report_only:
        make_videos(comparison, verbose=namespace.verbose)
    place = Place.of_environment()
    if place is not None and place.rank > 0:
        return
    print(_report(comparison, baseline=baseline, progress=enabled(config.output.progress)))


def make_videos(comparison: Comparison, *, verbose: bool) -> None:
    """Make every video of a comparison that is not there yet; all ranks call this."""
    agree = [json.dumps(comparison.describe(), sort_keys=True), str(comparison.seeds)]
    config = comparison.config
    with open_ranks(config, prompts=agree, verbose=verbose) as party:
        check_layouts(comparison.variants, party)
        party.check_on_first(comparison.open)
        missing = missing_videos(comparison, party)
        if missing:
            with contextlib.closing(LongVideoEngine(config, party.ranks)) as engine:
                make_missing(engine, comparison, missing, party)


def _report(comparison: Comparison, **settings: Any) -> str:
    try:
        return write_report(comparison, **settings)
    except KeyboardInterrupt as error:
        raise Stopped(
            f"while measuring; every video is made and lies in {comparison.folder / 'videos'}; "
            "the same command continues"
        ) from error


def choose_prompts(namespace: Namespace) -> list[str]:
    """The first `--num_prompts` prompts; UserError for one that is there twice, which would count as two."""
    prompts = read_prompts(namespace.prompt, namespace.prompt_file)
    twice = next((prompt for index, prompt in enumerate(prompts) if prompt in prompts[:index]), None)
    if twice is not None:
        raise UserError(f"a prompt is there twice, and would count as two: {twice!r}; leave one out")
    count = namespace.num_prompts
    if count is not None and not 1 <= count <= len(prompts):
        raise UserError(f"--num_prompts must lie in [1, {len(prompts)}], the number of prompts, got {count}")
    return prompts[:count]


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        type=str,
        default=METHODS,
        help="comma-separated: METHOD, or METHOD:PRESET.yaml with settings of its own, or NAME=METHOD:PRESET.yaml",
    )
    parser.add_argument("--prompt", type=str, help="what the videos show")
    parser.add_argument("--prompt_file", type=str, help="text file with one prompt a line, instead of --prompt")
    parser.add_argument(
        "--num_prompts", type=int, help="how many of its prompts are used, the first ones (default: all)"
    )
    parser.add_argument("--num_seeds", type=int, default=1, help="seeds per prompt, from sampler.seed on")
    parser.add_argument("--out", type=str, default="runs/compare", help="folder of the videos and the report")
    parser.add_argument("--baseline", type=str, help="method that differences are from (default: the first)")
    parser.add_argument("--report_only", type=bool, default=False, help="make no video; report on those that are there")
    parser.add_argument(
        "--nproc", type=int, help="ranks to start on this machine, one per GPU; torchrun starts its own"
    )
    parser.add_argument("--verbose", type=bool, default=False, help="show what every rank says, with its number")
