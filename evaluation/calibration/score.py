"""The scores that a search compares, by prompt, and how a found one is judged."""

from collections.abc import Mapping, Sequence

import numpy as np

from evaluation.comparison.measure import Measured
from evaluation.comparison.quality import PARTS, parts_of, score_of
from metrics.bootstrap import Estimate, paired_interval


def scores(measured: Sequence[Measured], labels: Sequence[str]) -> dict[str, np.ndarray]:
    """By label, the score of each prompt, seeds averaged: [prompts]."""
    by_label: dict[str, dict[int, list[float]]] = {label: {} for label in labels}
    for each in measured:
        by_label[each.video.label].setdefault(each.video.prompt_index, []).append(score_of(each.values))
    return {
        label: np.array([np.mean(found) for _, found in sorted(by_prompt.items())])
        for label, by_prompt in by_label.items()
    }


def mean_parts(measured: Sequence[Measured], label: str) -> dict[str, float]:
    """The mean of each part over the videos of one label."""
    found = [parts_of(each.values) for each in measured if each.video.label == label]
    return {name: float(np.mean([each[name] for each in found])) for name in PARTS}


def survivors(by_label: Mapping[str, np.ndarray], *, keep: int, always: str) -> list[str]:
    """The labels of the `keep` best means, best first, equals in their order; `always` is added if it is not among them."""
    order = sorted(by_label, key=lambda label: -float(by_label[label].mean()))
    kept = order[:keep]
    return kept if always in kept else [*kept, always]


def judge(found: np.ndarray, start: np.ndarray) -> tuple[Estimate, bool]:
    """Difference in score, paired by prompt, with its interval; and whether the interval lies above 0."""
    difference = paired_interval(found, start)
    return difference, bool(difference.low > 0)
