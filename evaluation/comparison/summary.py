"""Means over prompts with intervals, differences from a baseline, and times: what a report shows."""

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.comparison.measure import Measured
from metrics.bootstrap import Estimate, Pair, mean_interval, paired_interval, seed_means, shared_seed_means


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure of one variant: its mean, and its mean difference from the baseline's, both over prompts."""

    label: str
    metric: str
    unit: str
    mean: Estimate
    difference: Estimate | None

    @property
    def differs(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        found = self.difference
        return found is not None and found.leaves_out_zero


def comparable(measured: Sequence[Measured], labels: Sequence[str]) -> list[Measured]:
    """Keep prompts and seeds for which every variant has a video, so that all means are over the same ones."""
    counts = Counter((each.video.prompt_index, each.video.seed) for each in measured)
    return [each for each in measured if counts[each.video.prompt_index, each.video.seed] == len(labels)]


def summarise(measured: Sequence[Measured], labels: Sequence[str], units: dict[str, str], baseline: str) -> list[Row]:
    """Return a row for every measure and variant. Seeds are averaged first, since only prompts are independent."""
    rows = []
    prompts = sorted({each.video.prompt_index for each in measured})
    for metric, unit in units.items():
        values = {label: _by_pair(measured, label, metric) for label in labels}
        for label, ours in values.items():
            mean = mean_interval(seed_means(((pair[0], value) for pair, value in ours), prompts))
            difference = None if label == baseline else paired_interval(*shared_seed_means(ours, values[baseline]))
            rows.append(Row(label=label, metric=metric, unit=unit, mean=mean, difference=difference))
    return rows


def times(measured: Sequence[Measured], labels: Sequence[str], baseline: str) -> dict[str, dict[str, Any]]:
    """Seconds of each variant: a whole denoising run, and one step of each kind.

    `denoise` and `decode` are medians, the first over videos that were made in one go, `runs` how many those are; `steps` holds
    for each kind the median of all its steps, and how many steps of it a whole run has. A suspended
    machine would dominate a mean. `cpu` is the median CPU time of the process in denoising, which other programs hardly change, and
    `cpu_ratio` its mean ratio to the baseline's, pair by pair; None without a record of it.
    """
    found = {label: _time([each.record for each in measured if each.video.label == label]) for label in labels}
    cpu = {(each.video.label, *_pair(each)): _cpu_seconds(each.record) for each in measured}
    prompts = sorted({each.video.prompt_index for each in measured})
    for label in labels:
        known = [cpu[key] for key in cpu if key[0] == label and not math.isnan(cpu[key])]
        found[label]["cpu"] = statistics.median(known) if known else None
        ratios = [(key[1], cpu[key] / cpu[baseline, *key[1:]]) for key in cpu if key[0] == label]
        ratio = mean_interval(seed_means(ratios, prompts))
        found[label]["cpu_ratio"] = as_json(ratio) if ratio.count else None
    return found


def clips(measured: Sequence[Measured], labels: Sequence[str], metric: str) -> dict[str, list[Estimate]]:
    """A measure per clip: for each variant its mean over prompts with interval, clip after clip."""
    found = {}
    for label in labels:
        by_prompt: dict[int, list[list[float]]] = {}
        for each in measured:
            if each.video.label == label and each.by_clip.get(metric):
                by_prompt.setdefault(each.video.prompt_index, []).append(each.by_clip[metric])
        means = np.array([np.mean(series, axis=0) for series in by_prompt.values()])
        found[label] = [mean_interval(column) for column in means.T] if len(means) else []
    return found


def as_json(estimate: Estimate | None) -> dict[str, Any] | None:
    """An estimate for JSON, which has no nan."""
    if estimate is None:
        return None
    return {key: None if math.isnan(value) else value for key, value in dataclasses.asdict(estimate).items()}


def from_json(tree: Mapping[str, Any]) -> Estimate:
    """An estimate of `as_json`."""
    return Estimate(**{key: math.nan if value is None else value for key, value in tree.items()})


def _by_pair(measured: Sequence[Measured], label: str, metric: str) -> list[tuple[Pair, float]]:
    """One measure of a label's videos, by prompt and seed."""
    return [(_pair(each), each.values[metric]) for each in measured if each.video.label == label]


def _pair(each: Measured) -> tuple[int, int]:
    return each.video.prompt_index, each.video.seed


def _cpu_seconds(record: dict[str, Any]) -> float:
    """CPU time of the process in all steps; nan for a record of an older version."""
    return sum(step.get("cpu_seconds", math.nan) for step in record["steps"])


def _time(records: list[dict[str, Any]]) -> dict[str, Any]:
    whole = [record for record in records if not record["resumed_at"]]
    kinds: dict[str, list[float]] = {}
    for record in records:
        for step in record["steps"]:
            kinds.setdefault(step["mode"], []).append(step["seconds"])
    counts = Counter(step["mode"] for step in whole[0]["steps"]) if whole else {}
    return {
        "runs": len(whole),
        "denoise": statistics.median(record["seconds"]["denoise"] for record in whole) if whole else None,
        "decode": statistics.median(record["seconds"]["decode"] for record in records) if records else None,
        "steps": {
            kind: {"median": statistics.median(seconds), "per_run": counts.get(kind)} for kind, seconds in kinds.items()
        },
    }
