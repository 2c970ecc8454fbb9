"""The paper's claims about methods, tested on a comparison: paired differences of two methods, with intervals."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from metrics.bootstrap import Estimate, Pair, paired_interval, shared_seed_means

Sign = Literal["more", "less"]
Verdict = Literal["as the paper says", "the opposite", "not decided", "not made"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`method` has more, or less, of these measures than `other`.

    Attributes:
        title: heading.
        text: what the paper says, in our words.
        method: label of the method.
        other: label of the method that it is compared with.
        measures: the expected sign of the difference by measure.
        why_not: possible reasons, in the embedded model and its world, for another result.
    """

    title: str
    text: str
    method: str
    other: str
    measures: Mapping[str, Sign]
    why_not: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One measure of a claim: the difference method - other, and the verdict.

    Attributes:
        agreeing: number of prompts whose own difference has the sign of the mean.
    """

    metric: str
    unit: str
    sign: Sign
    difference: Estimate
    agreeing: int
    verdict: Verdict


CLAIMS = (
    Claim(
        title="Over-smoothing of `direct`",
        text="Full attention over a long video blurs it and nearly stops its motion (section 4.2, Fig. 4).",
        method="direct",
        other="sliding_window",
        measures={
            "laplacian_variance": "less",
            "flow_mean": "less",
            "flow_strongest": "less",
            "distance_travelled": "less",
            "speed": "less",
        },
        why_not="""Full attention fails in another way here, by repetition (next section), and what it repeats is as fast and as sharp. One plain
shape has no detail to lose.""",
    ),
    Claim(
        title="Repetition of `direct`",
        text="With the blur come repetitive patterns (section 1).",
        method="direct",
        other="sliding_window",
        measures={"repetition": "more", "repetition_straight": "more"},
        why_not="Orbits and bounces repeat with any method; only `repetition_straight` leaves them out.",
    ),
    Claim(
        title="Drift of `sliding_window`",
        text="A window of native length keeps motion and loses appearance and layout over time (section 4.2, Fig. 4).",
        method="sliding_window",
        other="direct",
        measures={
            "shape_kept": "less",
            "colour_kept": "less",
            "rgb_drift": "more",
            "background_drift": "more",
            "clip_colour_similarity": "less",
            "clip_structural_similarity": "less",
        },
        why_not="""Object and background have one colour each and no texture, so little can drift, and a video that repeats keeps its layout.""",
    ),
    Claim(
        title="`freespec` against `direct`: motion and detail",
        text="The local singular basis keeps the motion and detail that full attention smooths away (sections 4.2, 4.3).",
        method="freespec",
        other="direct",
        measures={
            "laplacian_variance": "more",
            "flow_mean": "more",
            "flow_strongest": "more",
            "distance_travelled": "more",
            "repetition": "less",
        },
        why_not="On this model `direct` loses neither measurably (see over-smoothing above), so there is nothing to restore.",
    ),
    Claim(
        title="`freespec` against `sliding_window`: consistency",
        text="Guidance by the global spectrum corrects the drift of the window (sections 4.2, 4.3).",
        method="freespec",
        other="sliding_window",
        measures={
            "shape_kept": "more",
            "colour_kept": "more",
            "rgb_drift": "less",
            "background_drift": "less",
            "clip_colour_similarity": "more",
            "interpolation_error": "less",
        },
        why_not="""The window drifts little here, so guidance has little to correct, and the model was never trained on so many tokens
in the global branch.""",
    ),
)


def not_made(claim: Claim, report: Mapping[str, Any]) -> list[str]:
    """Return the methods of a claim without a video in a report.json."""
    return [label for label in (claim.method, claim.other) if label not in _labels(report)]


def answers(claim: Claim, report: Mapping[str, Any]) -> list[Answer]:
    """Compute the differences of a claim from a report.json that has both methods; missing measures are left out."""
    units = _units(report)
    found = []
    for metric, sign in claim.measures.items():
        if metric in units:
            values, others = shared_seed_means(
                *(_by_pair(report, label, metric) for label in (claim.method, claim.other))
            )
            difference = paired_interval(values, others)
            verdict = read(difference, sign)
            found.append(
                Answer(
                    metric=metric,
                    unit=units[metric],
                    sign=sign,
                    difference=difference,
                    agreeing=int(np.sum((values - others) * difference.mean > 0)),
                    verdict=verdict,
                )
            )
    return found


@dataclass(frozen=True, kw_only=True)
class Change:
    """One measure's difference method - other in the tables' run and in a rerun with other steps, and rerun - tables.

    All three are over the prompts that have a value of both methods in both runs.
    """

    method: str
    other: str
    metric: str
    unit: str
    tables: Estimate
    rerun: Estimate
    change: Estimate

    @property
    def verdict(self) -> str:
        """Whether another conclusion would be drawn from the rerun."""
        if not self.change.leaves_out_zero:
            return "no change seen"
        turned = self.tables.leaves_out_zero and self.rerun.leaves_out_zero and self.tables.mean * self.rerun.mean < 0
        return "turns round" if turned else "changes in size"


def changes(tables: Mapping[str, Any], rerun: Mapping[str, Any]) -> list[Change]:
    """Compare the differences of the claims with those at another number of steps, on pairs in both reports.

    That is methods, measures, and pairs of prompt and seed; a pair without a value in one of the four counts in none.
    """
    units = {metric: unit for metric, unit in _units(rerun).items() if metric in _units(tables)}
    labels = _labels(tables) & _labels(rerun)
    asked = dict.fromkeys(
        (claim.method, claim.other, metric)
        for claim in CLAIMS
        for metric in claim.measures
        if metric in units and {claim.method, claim.other} <= labels
    )
    found = []
    for method, other, metric in asked:
        series = [_by_pair(report, label, metric) for report in (tables, rerun) for label in (method, other)]
        values = shared_seed_means(*series).reshape(2, 2, -1)  # [run, method, prompt]
        table_estimate, rerun_estimate = (paired_interval(*each) for each in values)
        change = paired_interval(values[1, 0] - values[1, 1], values[0, 0] - values[0, 1])
        found.append(
            Change(
                method=method,
                other=other,
                metric=metric,
                unit=units[metric],
                tables=table_estimate,
                rerun=rerun_estimate,
                change=change,
            )
        )
    return found


@dataclass(frozen=True, kw_only=True)
class NoiseEffect:
    """The effect of a method's own initial noise on one measure: with it - with the common noise, paired by prompt."""

    method: str
    metric: str
    unit: str
    difference: Estimate


def noise_effects(own: Mapping[str, Any], same: Mapping[str, Any]) -> list[NoiseEffect]:
    """For each method of `own` that has another noise in `same`, compare its measures on pairs in both reports."""
    units = {metric: unit for metric, unit in _units(own).items() if metric in _units(same)}
    found = []
    for label, settings in same["comparison"]["variants"].items():
        method = settings["method.name"]
        if label in _labels(same) and method in _labels(own) and own["noise"][method] != same["noise"][label]:
            found += [
                NoiseEffect(
                    method=method,
                    metric=metric,
                    unit=unit,
                    difference=paired_interval(
                        *shared_seed_means(_by_pair(own, method, metric), _by_pair(same, label, metric))
                    ),
                )
                for metric, unit in units.items()
            ]
    return found


def _units(report: Mapping[str, Any]) -> dict[str, str]:
    """The measures of a report, with their units."""
    return {row["metric"]: row["unit"] for row in report["summary"]}


def _labels(report: Mapping[str, Any]) -> set[str]:
    return {each["label"] for each in report["videos"]}


def read(difference: Estimate, sign: Sign) -> Verdict:
    """Compare an interval with the expected sign; `not decided` if it holds 0 or there is none, `not made` without values."""
    if difference.count == 0:
        return "not made"
    low, high = (difference.low, difference.high) if sign == "more" else (-difference.high, -difference.low)
    if low > 0:
        return "as the paper says"
    return "the opposite" if high < 0 else "not decided"


def _by_pair(report: Mapping[str, Any], label: str, metric: str) -> list[tuple[Pair, float | None]]:
    """Values of a label by prompt and seed."""
    return [
        ((each["prompt_index"], each["seed"]), each["values"][metric])
        for each in report["videos"]
        if each["label"] == label
    ]
