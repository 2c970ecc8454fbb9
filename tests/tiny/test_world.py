"""The world is a function of its seed, of any length, and its captions use the words the tokenizer knows."""

import re
from dataclasses import replace

import numpy as np
import pytest

from tiny.families.base import build_tokenizer
from tiny.state import numpy_rng
from tiny.world import COLOURS, MOTIONS, SHAPES, SIZE, VOCABULARY, caption, is_held_out, positions, render, sample_scene

SCENES = [sample_scene(numpy_rng(7, index), held_out=index % 2 == 0) for index in range(24)]


def test_same_seed_same_scene_and_caption():
    first, second = (sample_scene(np.random.default_rng(3)) for _ in range(2))
    assert first == second
    assert caption(first, np.random.default_rng(1)) == caption(second, np.random.default_rng(1))


@pytest.mark.parametrize("scene", SCENES[:8], ids=lambda scene: f"{scene.motion}-{scene.pan}")
def test_a_longer_render_begins_with_the_shorter_one(scene):
    long = render(scene, 129)
    assert long.shape == (129, SIZE, SIZE, 3) and long.dtype == np.uint8
    np.testing.assert_array_equal(long[:33], render(scene, 33))
    assert not np.array_equal(long[1:34], render(scene, 33))


def test_bouncing_objects_stay_in_the_picture_and_bounce_early():
    for scene in (scene for scene in SCENES if scene.motion == "bounce"):
        track = positions(scene, 400)
        assert track.min() >= 8 and track.max() <= SIZE - 8
        steps = np.diff(positions(scene, 33), axis=0)
        assert (np.sign(steps).min(0) < np.sign(steps).max(0)).any()


def test_held_out_combinations_are_a_small_fixed_part():
    triples = [(shape, colour, motion) for shape in SHAPES for colour in COLOURS for motion in MOTIONS]
    share = np.mean([is_held_out(*triple) for triple in triples])
    assert 0.1 < share < 0.15
    assert not is_held_out("circle", "red", "bounce"), "the first example of the documentation is one to be trained on"
    for index, scene in enumerate(SCENES):
        assert is_held_out(scene.shape, scene.colour, scene.motion) == (index % 2 == 0)


def test_every_word_of_a_caption_is_in_the_vocabulary():
    for index, scene in enumerate(SCENES):
        words = re.findall(r"\w+", caption(scene, numpy_rng(8, index)))
        assert set(words) <= set(VOCABULARY)


def test_the_documented_caption_is_in_the_language():
    scene = replace(
        SCENES[0],
        shape="circle",
        colour="red",
        size="large",
        motion="bounce",
        speed="normal",
        background="blue",
        pan="none",
    )
    said = {caption(scene, numpy_rng(9, index)) for index in range(200)}
    assert "a red circle bounces over a blue background" in said
    assert len(said) > 4


def test_the_tokenizer_knows_every_word_and_passes_over_others():
    tokenizer = build_tokenizer(32)
    unknown = tokenizer.unk_token_id
    for index, scene in enumerate(SCENES):
        ids = tokenizer(caption(scene, numpy_rng(8, index))).input_ids
        assert unknown not in ids and ids[-1] == tokenizer.eos_token_id
    assert unknown in tokenizer("a zebra").input_ids
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]
