"""calibrate.py: search FreeSpec's open settings on one list of prompts, and judge the best on another."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import yaml

from engine.config import RunConfig
from engine.errors import UserError
from engine.files.claims import writing_report
from engine.files.tables import write_csv
from engine.files.whole import write_json, write_text
from engine.paths import expand
from engine.progress import enabled
from evaluation.calibration.score import judge, mean_parts, scores, survivors
from evaluation.calibration.space import END_SHARES, SPACE, START, draw_trials
from evaluation.calibration.videos import CalibrationPlan
from evaluation.comparison.kept_measures import add_kept, measure_every
from evaluation.comparison.measure import Measured, not_world
from evaluation.comparison.quality import PARTS
from evaluation.comparison.report import write_report
from evaluation.comparison.store import Comparison
from evaluation.comparison.summary import as_json
from evaluation.measure import Measurer
from launch.arguments.calibrate import NAME, Arguments
from launch.batching.comparison import VideoMaker, check_longer, model_facts, open_maker, stoppable
from launch.batching.devices import arrange_for
from launch.process.environment import is_first_rank
from launch.video.prompts import look_at_prompts

KEPT_SHARE = 3  # one in this many trials of a round goes on to the next


def run(asked: Arguments) -> None:
    """Search round after round on all ranks or replicas, judge, and report on rank 0."""
    given, config, rounds = asked.given, asked.config, asked.rounds
    search, held_out = asked.search.texts, asked.held_out.texts
    check_longer(config, "at that length every trial makes the video of the base model; search on a longer one")
    plan = CalibrationPlan(
        folder=expand(given.out),
        model=model_facts(config),
        config=config,
        trials=draw_trials(given.num_trials, given.search_seed, dataclasses.asdict(config.method.freespec)),
        num_steps={
            "search": given.search_num_steps or config.sampler.num_steps,
            "judged": config.sampler.num_steps,
        },
        seeds=asked.seeds,
        kept_folder=None if given.measures is None else expand(given.measures),
    )
    arranged, _ = arrange_for(config, plan.compared("search", list(plan.trials), search).variants, asked.replicas)
    plan = dataclasses.replace(plan, model=model_facts(arranged), config=arranged)
    parts = (plan.compared("search", list(plan.trials), search), plan.compared("judged", [START], held_out))
    for each in parts:
        reason = not_world(each)
        if reason is not None:
            raise UserError(f"{NAME} scores by the exact measures of the embedded world, which do not apply: {reason}")
    described = [each.describe() for each in parts]  # before the run: files may change meanwhile
    agree = [*(json.dumps(each, sort_keys=True) for each in described), str((rounds, plan.seeds))]
    measurer = Measurer(workers=given.workers, progress=enabled(config.output.progress))
    with open_maker(arranged, agree=agree, verbose=given.verbose, replicas=asked.replicas) as maker:
        for each in parts:
            maker.check(each)
        look_at_prompts(config, [*asked.search.named, *asked.held_out.named], maker.context)
        best, rounds_scored = _search(plan, search, rounds, maker, measurer=measurer)
        judged = plan.compared("judged", [START] if best == START else [START, best], held_out)
        if best != START:
            maker.make(judged)
    if not is_first_rank():
        return
    report = {
        "comparison": described[1] | {"variants": {each.label: each.settings for each in judged.variants}},
        "num_steps": plan.num_steps,
        "space": SPACE | {"lam_end / lam_start": END_SHARES},
        "search_seed": given.search_seed,
        "score": PARTS,
        "trials": plan.trials,
        "rounds": rounds_scored,
        "best": best,
        "judged": None if best == START else _judge(judged, best, plan.trials[best], measurer=measurer),
    }
    print(_write(plan.folder, report, judged.variant(best).config))


def _search(
    plan: CalibrationPlan, prompts: list[str], rounds: list[int], maker: VideoMaker, *, measurer: Measurer
) -> tuple[str, list[dict[str, Any]]]:
    """Search in rounds of more prompts and fewer trials; returns the best label, and on rank 0 the scores of each round."""
    rounds_scored: list[dict[str, Any]] = []
    labels, context = list(plan.trials), maker.context
    for count in rounds:
        keep = 1 if count == rounds[-1] else math.ceil(len(labels) / KEPT_SHARE)
        comparison = plan.compared("search", labels, prompts[:count])
        maker.make(comparison)
        if is_first_rank():
            by_label = scores(_measure(comparison, measurer=measurer), labels)
            rounds_scored.append({"prompts": count, "scores": {x: float(by_label[x].mean()) for x in labels}})
            labels = survivors(by_label, keep=keep, always=START)
        context.wait_for_first(f"scores on {count} prompts")  # measuring may take longer than a collective waits
        labels = context.compute_on_first(lambda labels=labels: labels)
    return labels[0], rounds_scored


def _judge(judged: Comparison, best: str, settings: dict[str, Any], *, measurer: Measurer) -> dict[str, Any]:
    """Judge the settings that the search found on the other prompts; also writes the whole report of a comparison."""
    measured = _measure(judged, measurer=measurer)
    by_label = scores(measured, [START, best])
    difference, supported = judge(by_label[best], by_label[START])
    write_report(judged, folder=judged.folder, baseline=START, measurer=measurer)
    return {
        "prompts": len(judged.prompts),
        "seeds": judged.seeds,
        "settings": settings,
        "score": {label: float(by_label[label].mean()) for label in (START, best)},
        "parts": {label: mean_parts(measured, label) for label in (START, best)},
        "difference": as_json(difference),
        "supported": supported,
    }


def _measure(comparison: Comparison, *, measurer: Measurer) -> list[Measured]:
    with stoppable(comparison.folder):
        measured = measure_every(comparison, measurer=measurer)
    add_kept(comparison, measured)
    return measured


def _write(folder: Path, report: dict[str, Any], best: RunConfig) -> str:
    """Write trials.csv, report.json and, if supported, calibrated.yaml; returns a line with the result.

    The preset sets every setting of the method, so that later changes of defaults do not affect it.
    """
    with writing_report(folder):
        names = [f"score_{each['prompts']}_prompts" for each in report["rounds"]]
        rows = [
            {"trial": label}
            | settings
            | dict(zip(names, [each["scores"].get(label) for each in report["rounds"]], strict=True))
            for label, settings in report["trials"].items()
        ]
        write_csv(folder / "trials.csv", rows, ["trial", *report["trials"][START], *names])
        write_json(folder / "report.json", report)
        judged, preset = report["judged"], folder / "calibrated.yaml"
        preset.unlink(missing_ok=True)  # of an earlier, narrower search
        if judged is None:
            return f"{folder}: no trial was better than the settings that the search began with; they stay"
        if judged["supported"]:
            write_text(preset, _preset(best, report["comparison"]["settings"]["checkpoint"]))
    found = judged["difference"]
    interval = "no interval" if found["low"] is None else f"95 % interval {found['low']:+.3f} to {found['high']:+.3f}"
    verdict = f"supported, see {preset}" if judged["supported"] else "not supported: the settings stay as they are"
    return (
        f"{folder}: {report['best']} scores {found['mean']:+.3f} against {START} on {judged['prompts']} other prompts "
        f"({interval}); {verdict}"
    )


def _preset(config: RunConfig, checkpoint: str) -> str:
    """Return a preset of the method of `config`, with a comment on the judgement's settings."""
    method = config.method
    freespec = dataclasses.asdict(method.freespec)
    tree = {"method": {"name": "freespec", "window_frames": method.window_frames, "freespec": freespec}}
    judged_with = f"{config.sampler.num_steps} steps, {config.video.num_frames} frames, checkpoint {checkpoint}"
    return f"# Judged with {judged_with}. Laid over a model: --config MODEL.yaml --config THIS.\n{yaml.safe_dump(tree)}"
