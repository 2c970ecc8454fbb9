"""Six dimensions make no total, and only known ones can be asked for."""

import pytest

from engine.errors import UserError
from evaluation.vbench.dimensions import ALL_DIMENSIONS, DIMENSIONS, check_total, parse_dimensions


def test_a_total_of_six_dimensions_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"needs 16 dimensions and 6 were evaluated; missing: temporal_flickering, object_class"
    ):
        check_total(DIMENSIONS)
    with pytest.raises(UserError, match=r"15 were evaluated; missing: scene$"):
        check_total(set(ALL_DIMENSIONS) - {"scene"})
    check_total(ALL_DIMENSIONS)
    assert len(set(ALL_DIMENSIONS)) == 16


def test_dimensions_are_taken_in_their_own_order() -> None:
    assert parse_dimensions("dynamic_degree, subject_consistency,") == ("subject_consistency", "dynamic_degree")
    with pytest.raises(UserError, match="got 'scene'"):
        parse_dimensions("scene,dynamic_degree")
    with pytest.raises(UserError, match="got 'none'"):
        parse_dimensions(" ,")
