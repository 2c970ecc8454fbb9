"""calibrate.py: FreeSpec's open settings searched on one list of prompts, and what was found judged on another."""

import contextlib
import csv
import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from engine.batch.locks import Shard, own_shard
from engine.checkpoint import atomic_path
from engine.config import RunConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.progress import enabled
from launch.calibration.score import PARTS, judge, mean_parts, scores, survivors
from launch.calibration.space import END_SHARES, SPACE, START, draw_trials
from launch.cli import parse_run
from launch.commands.generate import read_prompts
from launch.comparison.make import check_layouts, make_missing, missing_videos, on_first
from launch.comparison.measure import Measured, measure_all, native_frames, not_world
from launch.comparison.report import write_report
from launch.comparison.store import Comparison
from launch.comparison.summary import as_json
from launch.comparison.variants import Variant
from launch.outputs import expand
from launch.ranks import Party, check_started, open_ranks
from launch.stopping import Place, Stopped

NAME = "calibrate.py"
DESCRIPTION = "Search FreeSpec's open settings on one list of prompts, and judge what was found on another."
KEPT_SHARE = 3  # of the trials of a round, one in so many goes on to the next


class Maker:
    """Makes the videos of several comparisons with one engine, which is loaded when the first video is missing."""

    def __init__(self, config: RunConfig, party: Party, stack: contextlib.ExitStack) -> None:
        self._config, self._party, self._stack = config, party, stack
        self._engine: LongVideoEngine | None = None
        self._own: set[Path] = set()

    def make(self, comparison: Comparison) -> None:
        """Make every video that is not there yet; all ranks call this."""
        self._party.check_on_first(comparison.open)
        if comparison.folder not in self._own:
            self._own.add(comparison.folder)
            self._party.check_on_first(lambda: self._stack.enter_context(own_shard(comparison.folder, Shard())))
        missing = missing_videos(comparison, self._party)
        if missing and self._engine is None:
            self._engine = self._stack.enter_context(
                contextlib.closing(LongVideoEngine(self._config, self._party.ranks))
            )
        if missing:
            make_missing(self._engine, comparison, missing, self._party)


def main(argv: list[str]) -> None:
    """Read the settings, search round after round on all ranks, judge, and report on rank 0."""
    namespace, config = parse_run(argv, name=NAME, description=DESCRIPTION, add_arguments=_add_arguments)
    check_started(namespace.nproc)
    rounds = _check(namespace, config)
    search, held_out = (read_prompts(None, file) for file in (namespace.prompt_file, namespace.judge_prompt_file))
    _check_lists(search, held_out, rounds)
    trials = draw_trials(namespace.num_trials, namespace.search_seed, dataclasses.asdict(config.method.freespec))
    variants = {label: _variant(config, label, settings) for label, settings in trials.items()}
    folder, num_seeds = expand(namespace.out), {"search": namespace.num_seeds, "judged": namespace.num_judge_seeds}

    def compared(name: str, labels: Sequence[str], prompts: list[str]) -> Comparison:
        chosen = [variants[label] for label in labels]
        seeds = [config.sampler.seed + number for number in range(num_seeds[name])]
        return Comparison(folder=folder / name, variants=chosen, prompts=prompts, seeds=seeds)

    whole = compared("search", list(trials), search)
    agree = [json.dumps(each.describe(), sort_keys=True) for each in (whole, compared("judged", [START], held_out))]
    for each in (whole, compared("judged", [START], held_out)):
        reason = not_world(each)
        if reason is not None:
            raise UserError(f"{NAME} scores by the exact measures of the embedded world, which do not apply: {reason}")
    progress = enabled(config.output.progress)
    with (
        open_ranks(
            config, prompts=[*agree, str((rounds, config.sampler.seed, num_seeds))], verbose=namespace.verbose
        ) as party,
        contextlib.ExitStack() as stack,
    ):
        check_layouts(list(variants.values()), party)
        maker = Maker(config, party, stack)
        told: list[dict[str, Any]] = []
        labels = list(trials)
        for count in rounds:
            keep = 1 if count == rounds[-1] else math.ceil(len(labels) / KEPT_SHARE)
            comparison = compared("search", labels, search[:count])
            maker.make(comparison)
            if _is_first():
                by_label = scores(_measure(comparison, progress=progress), labels)
                told.append({"prompts": count, "scores": {x: float(by_label[x].mean()) for x in labels}})
                labels = survivors(by_label, keep=keep, always=START)
            party.wait_for_first(f"scores on {count} prompts")  # measuring may take longer than a collective waits
            labels = on_first(party, labels)
        best = labels[0]
        judged = compared("judged", [START] if best == START else [START, best], held_out)
        if best != START:
            maker.make(judged)
    if not _is_first():
        return
    report = {
        "space": SPACE | {"lam_end / lam_start": END_SHARES},
        "search_seed": namespace.search_seed,
        "score": PARTS,
        "trials": trials,
        "rounds": told,
        "best": best,
        "judged": None if best == START else _judge(judged, best, trials[best], progress=progress),
    }
    print(_write(folder, report))


def _judge(judged: Comparison, best: str, settings: dict[str, Any], *, progress: bool) -> dict[str, Any]:
    """What the other prompts say of the settings that the search found, beside the whole report of a comparison."""
    measured = _measure(judged, progress=progress)
    by_label = scores(measured, [START, best])
    difference, supported = judge(by_label[best], by_label[START])
    write_report(judged, folder=judged.folder, baseline=START, progress=progress)
    return {
        "prompts": len(judged.prompts),
        "seeds": judged.seeds,
        "settings": settings,
        "score": {label: float(by_label[label].mean()) for label in (START, best)},
        "parts": {label: mean_parts(measured, label) for label in (START, best)},
        "difference": as_json(difference),
        "supported": supported,
    }


def _measure(comparison: Comparison, *, progress: bool) -> list[Measured]:
    try:
        return measure_all(comparison.videos, clip_frames=native_frames(comparison), world=True, progress=progress)
    except KeyboardInterrupt as error:
        raise Stopped(
            f"while measuring; every video of {comparison.folder} is kept; the same command continues"
        ) from error


def _write(folder: Path, report: dict[str, Any]) -> str:
    """trials.csv, report.json and, where it is supported, calibrated.yaml; returns a line that says what was found."""
    try:
        with atomic_path(folder / "trials.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
            counts = [each["prompts"] for each in report["rounds"]]
            names = [f"score_{count}_prompts" for count in counts]
            writer = csv.DictWriter(file, ["trial", *report["trials"][START], *names])
            writer.writeheader()
            for label, settings in report["trials"].items():
                found = [each["scores"].get(label) for each in report["rounds"]]
                writer.writerow({"trial": label} | settings | dict(zip(names, found, strict=True)))
        with atomic_path(folder / "report.json") as part:
            part.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        judged, preset = report["judged"], folder / "calibrated.yaml"
        preset.unlink(missing_ok=True)  # of an earlier, narrower search
        if judged is None:
            return f"{folder}: no trial was better than the settings that the search began with; they stay"
        if judged["supported"]:
            with atomic_path(preset) as part:
                part.write_text(yaml.safe_dump({"method": {"name": "freespec", "freespec": judged["settings"]}}))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    found = judged["difference"]
    interval = "no interval" if found["low"] is None else f"95 % interval {found['low']:+.3f} to {found['high']:+.3f}"
    verdict = f"supported, see {preset}" if judged["supported"] else "not supported: the settings stay as they are"
    return (
        f"{folder}: {report['best']} scores {found['mean']:+.3f} against {START} on {judged['prompts']} other prompts "
        f"({interval}); {verdict}"
    )


def _variant(config: RunConfig, label: str, settings: dict[str, Any]) -> Variant:
    freespec = dataclasses.replace(config.method.freespec, **settings)
    return Variant(
        label=label, config=dataclasses.replace(config, method=dataclasses.replace(config.method, freespec=freespec))
    )


def _is_first() -> bool:
    place = Place.of_environment()
    return place is None or place.rank == 0


def _check(namespace: Namespace, config: RunConfig) -> list[int]:
    """The numbers of prompts of the rounds, once every argument is right."""
    if config.method.name != "freespec":
        raise UserError(
            f"{NAME} searches the settings of freespec, not of {config.method.name}; leave --method.name out"
        )
    for name, least in (("num_trials", 2), ("num_seeds", 1), ("num_judge_seeds", 1), ("search_seed", 0)):
        if getattr(namespace, name) < least:
            raise UserError(f"--{name} must be {least} or more, got {getattr(namespace, name)}")
    for name in ("prompt_file", "judge_prompt_file"):
        if getattr(namespace, name) is None:
            raise UserError(f"--{name} is needed: settings are searched on one list of prompts and judged on another")
    try:
        rounds = [int(word) for word in namespace.rounds.split(",") if word.strip()]
    except ValueError as error:
        raise UserError(f"--rounds must be whole numbers with commas between them, got {namespace.rounds!r}") from error
    if not rounds or rounds[0] < 1 or any(a >= b for a, b in itertools.pairwise(rounds)):
        raise UserError(f"--rounds must be numbers of prompts that grow, such as 5,10,20, got {namespace.rounds!r}")
    return rounds


def _check_lists(search: list[str], held_out: list[str], rounds: list[int]) -> None:
    if rounds[-1] > len(search):
        raise UserError(f"--rounds asks for {rounds[-1]} prompts, and --prompt_file has {len(search)}")
    for name, prompts in (("prompt_file", search), ("judge_prompt_file", held_out)):
        twice = next((prompt for index, prompt in enumerate(prompts) if prompt in prompts[:index]), None)
        if twice is not None:
            raise UserError(f"a prompt of --{name} is there twice, and would count as two: {twice!r}")
    both = next((prompt for prompt in search if prompt in held_out), None)
    if both is not None:
        raise UserError(f"a prompt is in both lists, and what was found on it would be judged on it: {both!r}")


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--prompt_file", type=str, help="prompts that are searched on, one a line")
    parser.add_argument("--judge_prompt_file", type=str, help="other prompts, that what was found is judged on")
    parser.add_argument("--num_trials", type=int, default=24, help="settings that are tried, those given among them")
    parser.add_argument("--search_seed", type=int, default=0, help="seed of the draws of settings")
    parser.add_argument(
        "--rounds", type=str, default="5,10,20", help="prompts of each round; the best third goes on to the next"
    )
    parser.add_argument("--num_seeds", type=int, default=1, help="seeds per searched prompt, from sampler.seed on")
    parser.add_argument("--num_judge_seeds", type=int, default=2, help="seeds per prompt that is judged on, likewise")
    parser.add_argument("--out", type=str, default="runs/calibration", help="folder of the videos and the report")
    parser.add_argument(
        "--nproc", type=int, help="ranks to start on this machine, one per GPU; torchrun starts its own"
    )
    parser.add_argument("--verbose", type=bool, default=False, help="show what every rank says, with its number")
