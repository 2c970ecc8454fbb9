"""Intervals against scipy's, their coverage, and pairs that are narrower than what they are pairs of."""

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from metrics.bootstrap import MIN_COUNT, mean_interval, paired_interval


def test_it_is_the_percentile_interval_of_scipy() -> None:
    values = np.random.default_rng(0).exponential(size=40)
    mine = mean_interval(values)
    theirs = bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert mine.mean == values.mean()
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=0.02 * (theirs.high - theirs.low) * 2)


def test_it_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    trials = [mean_interval(rng.normal(size=40), resamples=1000) for _ in range(300)]
    assert 0.89 <= np.mean([trial.low <= 0 <= trial.high for trial in trials]) <= 0.98


def test_pairs_take_out_what_prompts_add_to_both() -> None:
    rng = np.random.default_rng(3)
    prompts = rng.normal(scale=10, size=30)
    a, b = prompts + rng.normal(scale=0.1, size=30) + 1.0, prompts + rng.normal(scale=0.1, size=30)
    paired = paired_interval(a, b)
    assert paired.low < 1.0 < paired.high
    assert paired.high - paired.low < 0.2
    # Negative control: the same numbers, paired with the wrong prompts.
    wrong = paired_interval(a, np.roll(b, 1))
    assert wrong.high - wrong.low > 3


def test_the_seed_decides_the_interval() -> None:
    values = np.random.default_rng(4).normal(size=20)
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values, seed=1) != mean_interval(values)


def test_what_is_missing_is_left_out_and_counted() -> None:
    values = np.arange(8.0)
    values[2] = np.nan
    found = mean_interval(values)
    assert (found.mean, found.count) == (26 / 7, 7)
    assert found.low < found.mean < found.high
    assert paired_interval(values, np.full(8, np.nan)).count == 0
    with pytest.raises(ValueError, match="equal numbers"):
        paired_interval(np.zeros(3), np.zeros(2))


def test_few_numbers_have_a_mean_and_no_interval() -> None:
    few = mean_interval(np.arange(MIN_COUNT - 1.0))
    assert (few.mean, few.count) == (2.0, 5)
    assert math.isnan(few.low)
    assert math.isnan(few.high)
    assert math.isfinite(mean_interval(np.arange(MIN_COUNT * 1.0)).low)
    assert mean_interval(np.array([])).count == 0
