"""Only known dimensions can be asked for."""

import pytest

from engine.errors import UserError
from evaluation.vbench.dimensions import parse_dimensions


def test_dimensions_are_taken_in_their_own_order() -> None:
    assert parse_dimensions("dynamic_degree, subject_consistency,") == ("subject_consistency", "dynamic_degree")
    with pytest.raises(UserError, match="got 'scene'"):
        parse_dimensions("scene,dynamic_degree")
    with pytest.raises(UserError, match="got 'none'"):
        parse_dimensions(" ,")
