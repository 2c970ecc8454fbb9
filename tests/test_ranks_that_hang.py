"""The tests' own ranks: one that hangs ends all of them with its stacks."""

import time

import pytest

from tests.ranks import run_ranks


def sleep_on_rank_1(rank: int, seconds: float) -> None:
    time.sleep(seconds * rank)


def test_a_rank_that_hangs_is_ended_with_its_stacks(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)process 1 terminated.*rank1\.stacks.*in sleep_on_rank_1"):
        run_ranks(2, sleep_on_rank_1, [0.1, 60.0], tmp_path, case_seconds=5)
