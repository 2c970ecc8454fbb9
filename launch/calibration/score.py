"""The score that a search maximises: the mean of four parts in [0, 1]."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.comparison.measure import Measured
from metrics.bootstrap import Estimate, paired_interval

SPEED_RANGE = 2.0
"""Speed error in pixels per frame that scores 0; the world's speeds are 1.5 and 2.5."""

PARTS = {
    "kept": "mean of `shape_kept` and `colour_kept`",
    "captioned": "mean of `shape_as_captioned`, `colour_as_captioned` and `background_as_captioned`",
    "motion": "`motion_as_captioned`",
    "speed": f"1 - `speed_error` / {SPEED_RANGE:g} px/frame, at least 0",
}
"""The averaged parts: two of consistency (object, caption) and two of dynamics (motion, speed)."""


def parts_of(values: Mapping[str, float]) -> dict[str, float]:
    """The four parts, 0..1, of one video's measures; 0 if not measurable, so that losing the object gains nothing."""
    return {
        "kept": _mean(values["shape_kept"], values["colour_kept"]),
        "captioned": _mean(
            values["shape_as_captioned"], values["colour_as_captioned"], values["background_as_captioned"]
        ),
        "motion": _mean(values["motion_as_captioned"]),
        "speed": _mean(max(0.0, 1.0 - values["speed_error"] / SPEED_RANGE))
        if math.isfinite(values["speed_error"])
        else 0.0,
    }


def score_of(values: Mapping[str, float]) -> float:
    """The mean of the four parts."""
    return float(np.mean(list(parts_of(values).values())))


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


def _mean(*values: Any) -> float:
    return float(np.mean([value if math.isfinite(value) else 0.0 for value in values]))
