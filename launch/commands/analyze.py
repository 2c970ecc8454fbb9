"""analyze.py: effective rank at windows of 1 to 4 native lengths, and videos of low rank."""

import contextlib
import dataclasses
import json
from typing import Any

import torch
from jsonargparse import ArgumentParser

from engine.config import RunConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.paths import expand
from engine.planner import read_model
from engine.progress import enabled
from launch.analysis.report import write_analysis
from launch.analysis.spectra import SpectraStore
from launch.cli import parse_run
from launch.commands.compare import choose_prompts
from launch.comparison.checks import check_longer, check_output
from launch.comparison.make import check_variants, make_missing, missing_videos, on_first
from launch.comparison.store import Comparison, as_read, decisive_settings, open_folder
from launch.comparison.variants import Variant
from launch.ranks import Party, check_started, open_ranks
from launch.stopping import Place, Stopped

NAME = "analyze.py"
DESCRIPTION = "Measure how attention's singular spectra change with the window, and what low rank does to a video."
LOW_RANK = "freespec.methods.low_rank:LowRank"


def main(argv: list[str]) -> None:
    """Read the settings, run what is missing on all ranks, then write tables and plots on rank 0."""
    namespace, config = parse_run(argv, name=NAME, description=DESCRIPTION, add_arguments=_add_arguments)
    check_started(namespace.nproc)
    prompts = choose_prompts(namespace)
    check_longer(config, "windows can only grow in a longer video")
    check_output(config.output, NAME)
    if namespace.num_points < 2:
        raise UserError(f"--num_points must be 2 or more, got {namespace.num_points}")
    if namespace.num_reconstructed < 0:
        raise UserError(f"--num_reconstructed must be 0 or more, got {namespace.num_reconstructed}")
    folder = expand(namespace.out)
    spectra = SpectraStore(folder=folder, prompts=prompts, seed=config.sampler.seed, num_points=namespace.num_points)
    variants, ratios = low_rank_variants(config, namespace.ratios)
    low_rank = Comparison(
        folder=folder / "low-rank",
        variants=variants,
        prompts=prompts[: namespace.num_reconstructed],
        seeds=[config.sampler.seed],
    )
    now = describe(config, spectra)
    run(config, spectra, low_rank, now, verbose=namespace.verbose)
    place = Place.of_environment()
    if place is not None and place.rank > 0:
        return
    print(write_analysis(folder, spectra, low_rank, ratios, made_with=now, progress=enabled(config.output.progress)))


def low_rank_variants(config: RunConfig, text: str) -> tuple[list[Variant], dict[str, float]]:
    """A variant for each share of `--ratios`, most directions first, and the share by label."""
    try:
        shares = sorted({float(word) for word in text.split(",") if word.strip()}, reverse=True)
    except ValueError as error:
        raise UserError(f"--ratios must be numbers with commas between them, got {text!r}") from error
    if not shares:
        raise UserError("--ratios is empty; give shares such as --ratios 1,0.5,0.25,0.1")
    variants = []
    for share in shares:
        try:
            method = dataclasses.replace(config.method, name=LOW_RANK, settings={"ratio": share})
        except ValueError as error:
            raise UserError(f"--ratios {share:g}: {error}") from error
        label = f"ratio-{share:g}"
        variants.append(Variant(label=label, config=dataclasses.replace(config, method=method)))
    _check_different(variants, shares, read_model(config.model).head_dim)
    return variants, {variant.label: share for variant, share in zip(variants, shares, strict=True)}


def _check_different(variants: list[Variant], shares: list[float], head_dim: int) -> None:
    """Raise UserError for two shares that keep as many directions, or that one label would stand for."""
    cpu = torch.device("cpu")
    counts = [int(each.config.method.method.weights(None, None, head_dim, cpu).sum()) for each in variants]
    for place in range(1, len(variants)):
        if counts[place] == counts[place - 1] or variants[place].label == variants[place - 1].label:
            raise UserError(
                f"--ratios {shares[place - 1]!r} and {shares[place]!r} keep {counts[place - 1]} and {counts[place]} of {head_dim} "
                f"directions and are called {variants[place - 1].label} and {variants[place].label}; leave one out"
            )


def describe(config: RunConfig, spectra: SpectraStore) -> dict[str, Any]:
    """What decides the spectra, as `Comparison.describe` says it of videos."""
    return as_read(
        {
            "settings": decisive_settings(config)
            | {f"method.{key}": value for key, value in dataclasses.asdict(config.method).items()}
            | {
                "sampler.noise": config.noise[0],
                "sampler.noise_stride": config.noise_stride,
                "sampler.seed": spectra.seed,
                "num_points": spectra.num_points,
            },
            "variants": {},
            "prompts": spectra.prompts,
        }
    )


def run(config: RunConfig, spectra: SpectraStore, low_rank: Comparison, now: dict[str, Any], *, verbose: bool) -> None:
    """Run whatever is not kept yet; all ranks call this. `now` is what `describe` says."""
    with open_ranks(config, prompts=[json.dumps(now, sort_keys=True), str(low_rank.seeds)], verbose=verbose) as party:
        check_variants(low_rank.variants, party)
        party.check_on_first(lambda: open_folder(spectra.folder, "analysis.json", now))
        party.check_on_first(low_rank.open)
        unseen = [index for index, done in enumerate(on_first(party, spectra.done)) if not done]
        missing = missing_videos(low_rank, party)
        if not unseen and not missing:
            return
        with contextlib.closing(LongVideoEngine(config, party.ranks)) as engine:
            observe(engine, spectra, unseen, party)
            make_missing(engine, low_rank, missing, party)


def observe(engine: LongVideoEngine, spectra: SpectraStore, unseen: list[int], party: Party) -> None:
    """See the spectra of these prompts; rank 0 says a line for each."""
    for number, index in enumerate(unseen):
        if number > 0:
            party.wait_for_first(f"spectra {number - 1}")
        try:
            spectra.observe(engine, index)
        except KeyboardInterrupt as error:
            kept = sum(spectra.done)
            raise Stopped(
                f"while prompt {index} was watched; {kept} of {len(spectra.prompts)} are kept in {spectra.folder}, "
                "and the same command continues"
            ) from error
        except OSError as error:
            raise UserError(f"cannot write {spectra.file(index)}: {error.strerror or error}") from error
        if engine.is_first:
            print(
                f"{number + 1} of {len(unseen)}, {spectra.file(index)}: spectra of {spectra.prompts[index]!r}",
                flush=True,
            )


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--prompt", type=str, help="what the video shows")
    parser.add_argument("--prompt_file", type=str, help="text file with one prompt a line, instead of --prompt")
    parser.add_argument(
        "--num_prompts", type=int, help="how many of its prompts are used, the first ones (default: all)"
    )
    parser.add_argument("--num_points", type=int, default=10, help="steps whose spectra are taken, evenly spaced")
    parser.add_argument("--ratios", type=str, default="1,0.5,0.25,0.1", help="shares of singular directions to keep")
    parser.add_argument(
        "--num_reconstructed", type=int, default=2, help="prompts, the first of all, that low-rank videos are made of"
    )
    parser.add_argument("--out", type=str, default="runs/analysis", help="folder of tables, plots and videos")
    parser.add_argument(
        "--nproc", type=int, help="ranks to start on this machine, one per GPU; torchrun starts its own"
    )
    parser.add_argument("--verbose", type=bool, default=False, help="show what every rank says, with its number")
