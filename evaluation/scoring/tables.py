"""Means of methods and their differences, with bootstrap intervals over prompts, from one number per video."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.videos import Video
from metrics.bootstrap import Estimate, Pair, mean_interval, paired_interval, seed_means, shared_seed_means


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One video with its values by measure; a measure that is not available is absent."""

    label: str
    video: Video
    values: Mapping[str, float]


def means(rows: Sequence[Scored], measures: Sequence[str]) -> dict[str, dict[str, Estimate]]:
    """Mean of each measure by label; seeds are averaged first, since only prompts are independent."""
    found = {}
    for label, group in _by_label(rows).items():
        prompts = sorted({row.video.prompt for row in group})
        found[label] = {measure: mean_interval(_by_prompt(group, prompts, measure)) for measure in measures}
    return found


def differences(rows: Sequence[Scored], measures: Sequence[str], baseline: str) -> dict[str, dict[str, Estimate]]:
    """Mean difference of each other label from the baseline, on the prompts and seeds that both have."""
    groups = _by_label(rows)
    found = {}
    for label, group in groups.items():
        if label == baseline:
            continue
        found[label] = {
            measure: paired_interval(*shared_seed_means(_by_pair(group, measure), _by_pair(groups[baseline], measure)))
            for measure in measures
        }
    return found


def _by_label(rows: Sequence[Scored]) -> dict[str, list[Scored]]:
    groups: dict[str, list[Scored]] = {}
    for row in rows:
        groups.setdefault(row.label, []).append(row)
    return groups


def _by_prompt(rows: Sequence[Scored], prompts: Sequence[str], measure: str) -> np.ndarray:
    """Mean over seeds for each prompt, [P]; nan for a prompt without a value."""
    return seed_means(((row.video.prompt, row.values.get(measure)) for row in rows), prompts)


def _by_pair(rows: Sequence[Scored], measure: str) -> list[tuple[Pair, float | None]]:
    return [(row.video.pair, row.values.get(measure)) for row in rows]
