"""A group of one rank, for decoding without others."""

from collections.abc import Iterator

import pytest

from engine.ranks.group_of_one import GROUP_OF_ONE
from parallel.mesh import Axis


@pytest.fixture
def alone() -> Iterator[Axis]:
    yield GROUP_OF_ONE.acquire().world
    GROUP_OF_ONE.release()
