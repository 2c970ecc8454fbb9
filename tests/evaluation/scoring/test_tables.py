"""Means and differences against the same computed by hand, and against the mistakes that pairs invite."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from evaluation.scoring.tables import Scored, differences, means


@dataclass(frozen=True)
class Named:
    """As much of a video as the tables look at."""

    prompt: str
    seed: int

    @property
    def pair(self) -> tuple[str, int]:
        """As a video has it."""
        return self.prompt, self.seed


def rows(label: str, values: dict[tuple[str, int], float]) -> list[Scored]:
    """A method's videos with one measure `m`."""
    return [Scored(label=label, video=Named(*pair), values={"m": value}) for pair, value in values.items()]


BASE = rows("direct", {("a", 0): 0.1, ("a", 1): 0.3, ("b", 0): 0.9, ("c", 0): 0.4})
OURS = rows("freespec", {("b", 0): 1.0, ("a", 1): 0.5, ("a", 0): 0.2, ("d", 0): 0.0})


def test_seeds_of_a_prompt_are_averaged_before_prompts() -> None:
    found = means(BASE, ["m"])["direct"]["m"]
    assert found.count == 3
    assert found.mean == pytest.approx((0.2 + 0.9 + 0.4) / 3)
    assert np.isnan(found.low)  # metrics.bootstrap gives no interval for so few prompts
    many = rows("direct", {(str(number), seed): number / 20 for number in range(8) for seed in (0, 1)})
    found = means(many, ["m"])["direct"]["m"]
    assert found.count == 8
    assert found.low < found.mean < found.high


def test_differences_are_over_what_both_have_paired_by_prompt_and_seed() -> None:
    found = differences(BASE + OURS, ["m"], "direct")
    assert found.keys() == {"freespec"}
    difference = found["freespec"]["m"]
    assert difference.count == 2
    assert difference.mean == pytest.approx(((0.35 - 0.2) + (1.0 - 0.9)) / 2)


def test_negative_control_unpaired_means_say_something_else() -> None:
    found = means(BASE + OURS, ["m"])
    unpaired = found["freespec"]["m"].mean - found["direct"]["m"].mean
    assert abs(unpaired - differences(BASE + OURS, ["m"], "direct")["freespec"]["m"].mean) > 0.1


def test_a_pair_without_a_value_is_left_out_on_both_sides() -> None:
    """If only one side dropped it, ours would be the mean of seed 1 alone and the difference 0.3."""
    ours = rows("freespec", {("a", 0): math.nan, ("a", 1): 0.5})
    found = differences(BASE + ours, ["m"], "direct")["freespec"]["m"]
    assert found.mean == pytest.approx(0.5 - 0.3)
    assert found.count == 1


def test_measures_without_values() -> None:
    found = means(BASE, ["m", "x"])["direct"]["x"]
    assert found.count == 0
    assert differences(BASE + OURS, ["x"], "direct")["freespec"]["x"].count == 0
    apart = rows("freespec", {("z", 0): 0.5})
    assert differences(BASE + apart, ["m"], "direct")["freespec"]["m"].count == 0
