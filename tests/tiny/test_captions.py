"""Every caption is read back to the scene it was written for, and no other sentence is."""

import numpy as np
import pytest

from tiny.captions import Told, parse_caption
from tiny.world import caption, sample_scene


def test_every_caption_is_read_back() -> None:
    rng = np.random.default_rng(0)
    for index in range(600):
        scene = sample_scene(rng, held_out=index % 3 == 0)
        told = parse_caption(caption(scene, rng))
        assert told is not None
        assert {name: getattr(told, name) for name in Told.__dataclass_fields__} == {
            name: getattr(scene, name) for name in Told.__dataclass_fields__
        }


def test_case_and_a_full_stop_do_not_matter() -> None:
    plain = parse_caption("a red circle bounces over a blue background")
    assert plain is not None
    assert plain == parse_caption(" A red circle  bounces over a blue background. ")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a lighthouse in a storm",
        "a red circle bounces over a blue background, at night",
        "a red circle bounces over a pink background",
        "a red circle over a blue background",
        "a red circle moves right and up over a blue background",
    ],
)
def test_other_sentences_are_not(text: str) -> None:
    assert parse_caption(text) is None
