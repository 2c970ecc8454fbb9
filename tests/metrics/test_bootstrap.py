"""Intervals against scipy's, their coverage, and pairs that are narrower than what they are pairs of."""

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from metrics.bootstrap import MIN_COUNT, expanded_tail, mean_interval, paired_interval, seed_means, shared_seed_means


def test_it_is_the_percentile_interval_of_scipy_at_the_expanded_level() -> None:
    values = np.random.default_rng(0).exponential(size=40)
    mine = mean_interval(values)
    level = 1 - 2 * expanded_tail(40)
    assert 0.955 < level < 0.965
    theirs = bootstrap(
        (values,), np.mean, n_resamples=10_000, confidence_level=level, method="percentile", rng=1
    ).confidence_interval
    assert mine.mean == values.mean()
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=0.02 * (theirs.high - theirs.low) * 2)


@pytest.mark.parametrize("count", [6, 8, 20, 40])
def test_it_covers_the_true_mean_about_as_often_as_it_says(count: int) -> None:
    """The plain percentile interval has 86 % at 6 values and 92 % at 20."""
    rng = np.random.default_rng(2)
    trials = [mean_interval(rng.normal(size=count), resamples=1000) for _ in range(2000)]
    assert 0.92 <= np.mean([trial.low <= 0 <= trial.high for trial in trials]) <= 0.97


def test_no_interval_is_much_wider_than_student_s() -> None:
    values = np.random.default_rng(5).normal(size=200)
    reach = (mean_interval(values).high - values.mean()) / (values.std(ddof=1) / math.sqrt(200))
    assert reach == pytest.approx(1.972, abs=0.08)  # t of 199 degrees of freedom


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


def test_missing_videos_are_left_out_and_counted() -> None:
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


def test_seeds_of_a_prompt_are_averaged_first() -> None:
    found = seed_means([("a", 1.0), ("b", None), ("a", 3.0), ("b", np.nan), ("c", 5.0), ("c", None)], ["c", "a", "b"])
    np.testing.assert_array_equal(found, [5.0, 2.0, np.nan])


def test_means_of_several_series_are_over_the_pairs_that_all_have() -> None:
    """Where one lacks a seed the others leave it out too, or seeds would be compared with others."""
    ours = {("b", 0): 1.0, ("a", 1): 5.0, ("a", 0): None, ("c", 0): 2.0}
    theirs = {("a", 0): 9.0, ("a", 1): 3.0, ("b", 0): 4.0, ("c", 0): math.nan, ("d", 0): 0.0}
    np.testing.assert_array_equal(shared_seed_means(ours.items(), theirs.items()), [[5.0, 1.0], [3.0, 4.0]])
    alone = seed_means(((prompt, value) for (prompt, _), value in theirs.items()), "abcd")
    np.testing.assert_array_equal(alone, [6.0, 4.0, np.nan, 0.0])  # the negative control: each series by itself
    assert shared_seed_means(ours.items(), {}.items()).shape == (2, 0)
