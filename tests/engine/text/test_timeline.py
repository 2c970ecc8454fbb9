"""Timelines as text: what is read from them, which latent frames that are, and one line for each mistake."""

from typing import Any

import pytest

from engine.config import MethodConfig, ModelConfig, RunConfig, SamplerConfig, VideoConfig
from engine.errors import UserError
from engine.identity import latents_settings, settings_id
from engine.text.timeline import parse_timeline, read_timeline
from freespec.events import Event

TWO = "a red circle [0-4s] | a yellow star [4s-, cut]"


def latents(text: str, *, num_frames: int = 129, fps: int = 16, step: int = 4) -> tuple[Event, ...]:
    timeline = parse_timeline(text)
    assert timeline is not None
    return timeline.joined([""] * len(timeline.events))[0].in_latents(num_frames=num_frames, fps=fps, step=step)


@pytest.mark.parametrize("prompt", ["a red circle", "either a cat | or a dog", "a list [of things]", "in 1990-1995"])
def test_a_prompt_without_ranges_is_no_timeline(prompt):
    assert parse_timeline(prompt) is None


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("a [0-4s]|b[4s-]", "a [0s-4s] | b [4s-]"),
        ("a [0-64] | b [64 - 129, fade 8]", "a [0-64] | b [64-129, fade 8]"),
        ("a [ 0s-2.5s ] | b [2.5s-,relay 0.25s]", "a [0s-2.5s] | b [2.5s-, relay 0.25s]"),
        ("a [0-]", "a [0-]"),
    ],
)
def test_the_canonical_form_is_read_back(text, canonical):
    timeline = parse_timeline(text)
    assert str(timeline) == canonical
    assert parse_timeline(canonical) == timeline


def test_boundaries_move_to_the_nearest_start_of_a_latent_frame():
    # Latent frame l > 0 starts at frame 4 (l - 1) + 1: 4 s are frame 64, and 65 is the start of latent frame 17.
    assert [(e.start, e.stop) for e in latents(TWO)] == [(0, 17), (17, 33)]
    assert [(e.start, e.stop) for e in latents("a [0-62] | b [62-]")] == [(0, 16), (16, 33)]
    assert [(e.start, e.stop) for e in latents("a [0-1] | b [1-]", step=8)] == [(0, 1), (1, 17)]


def test_widths_are_in_latent_frames():
    assert latents("a [0-4s] | b [4s-, fade 1s]")[1] == Event(start=17, stop=33, transition="fade", width=4.0)
    assert latents("a [0-64] | b [64-, relay 2]")[1] == Event(start=17, stop=33, transition="relay", width=0.5)
    assert latents("a [0-64] | b [64-, fade]")[1].width == latents("a [0-4s] | b [4s-, fade]")[1].width == 2.0


def test_an_overlap_is_a_fade_over_it():
    first, second = latents("a [0-5s] | b [4s-, fade]")
    assert (first.stop, second.start, second.transition, second.width) == (19, 19, "fade", 4.0)  # 4.5 s are frame 72


def test_neighbouring_events_of_one_text_are_joined():
    assert latents("a [0-4s] | a [4s-, cut]") == (Event(start=0, stop=33, transition="scene", width=0.0),)
    assert len(latents("a [0-4s] | a [4s-, fade]")) == 2
    timeline = parse_timeline("a [0-4s] | a [4s-, cut]")
    assert timeline.joined(["x", "y"]) == (timeline, ("x", "y"))  # the negative texts part them


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a [0-4s] | b", "event 2 of the timeline, 'b', has no range; write"),
        ("a [0-4s] | b [5s-]", "nothing covers 4s to 5s, before event 2"),
        ("a [0-4s] | b [3s-]", "overlaps the event before by 1s; write [3s-..., fade] to fade over the overlap"),
        ("a [0-4s] | b [3s-, fade 2s]", "overlaps the event before by 1s"),
        ("a [0-4s] | b [0-2s]", "does not follow"),
        ("a [4s-] | b [0-4s]", "'a' [4s-], must start at 0"),
        ("a [0-4s] | b [64-]", "mixes seconds and frames"),
        ("a [0-4s] | b [4s-8]", "mixes seconds and frames"),
        ("a [0-4s] | [4s-]", "[4s-], has no text"),
        ("a [0-] | b [4s-]", "has no end, and only the last event may be open"),
        ("a [4-2]", "must start at 0"),
        ("a [0-4s] | b [4s-4s]", "ends before it starts"),
        ("a [0-4s, fade] | b [4s-]", "is the first; a transition is from the event before"),
        ("a [0-4s] | b [4s-, dissolve]", "unknown transition 'dissolve'; write cut, scene, fade, relay"),
        ("a [0-4s] | b [4s-, cut 1s]", "'cut 1s' needs no width"),
        ("a [0-4s] | b [4s-, fade 0s]", "has the width 0"),
        ("a [0-4s] | b [4s-, fade, cut]", "has 2 transitions; give one"),
        ("a [0-4s] | b [4x-]", "has no range such as 0-4s"),
    ],
)
def test_invalid_timeline_is_one_line(text, message):
    with pytest.raises(UserError) as error:
        parse_timeline(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a [0-4s] | b [9s-]", "nothing covers"),
        ("a [0-4s] | b [4s-9s]", "'b' [4s-9s], exceeds the video, which ends at 8.0625 seconds (129 frames)"),
        ("a [0-8.2s] | b [8.2s-]", "exceeds the video"),
        ("a [0-4s] | b [4s-4.1s] | c [4.1s-]", "is shorter than a latent frame, which is 0.25 seconds"),
        ("a [0-4s] | b [4s-7s]", "is the last, but the video continues to 8.0625 seconds; leave its range open: [4s-]"),
        (
            "a [0-60] | b [60-68, fade 20] | c [68-, fade 20]",
            "event 2 has 2 latent frames, too few for fades of 5 and 5",
        ),
    ],
)
def test_a_timeline_that_does_not_fit_the_video_is_one_line(text, message):
    with pytest.raises(UserError) as error:
        latents(text)
    assert message in str(error.value)


def test_a_file_has_texts_ranges_transitions_negatives_and_a_common_text(tmp_path):
    story = tmp_path / "story.yaml"
    story.write_text(
        "common: over a blue background\n"
        "events:\n"
        "- {text: a red circle moves right, start: 0, stop: 4s, negative: blur}\n"
        "- {text: a yellow star, start: 4s, transition: relay, width: 0.5s, negative: grain}\n"
    )
    prompt, negative = read_timeline(str(story))
    assert prompt == (
        "a red circle moves right, over a blue background [0s-4s] | a yellow star, over a blue background [4s-, relay 0.5s]"
    )
    assert negative == "blur [0s-4s] | grain [4s-, relay 0.5s]"
    assert read_timeline(TWO) == ("a red circle [0s-4s] | a yellow star [4s-, cut]", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("events: []", "needs a list of events"),
        ("[1, 2", ", line 1: not YAML ("),
        ("[1, 2]", "holds no settings; docs/timeline.yaml is an example"),
        (f"events: [{{text: a, start: {'9' * 5000}}}]", "holds an invalid value"),
        (f"events: {'[' * 200}{']' * 200}", "is nested more than 100 deep"),
        ("events: [{text: a, 1: 2, b: 3}]", "has the unknown key 1"),
        ("events: [{text: a, start: soon}]", "start must be a frame, or seconds such as 4s, got 'soon'"),
        ("events: [{text: a, start: -1}]", "start must be a frame, or seconds such as 4s, got -1"),
        ("events: [{text: a, stop: [4]}, {text: b}]", "stop must be a frame, or seconds such as 4s, got [4]"),
        ("events: [{text: a, stop: true}, {text: b}]", "stop must be a frame, or seconds such as 4s, got True"),
        ("events: [{text: a, stop: 4}, {text: b, start: 4, width: wide}]", "width must be a frame"),
        ("events: [{text: a, stop: 4}, {text: b, start: 4, transition: melt}]", "unknown transition 'melt'"),
        ("events: [{text: a, stop: 4}, {text: b, start: 4, width: 3}]", "a width needs a transition"),
        ("events: [{text: a, at: 3}]", "event 1 of"),
        ("events: [{start: 0}]", "needs a text"),
        ("events: [{text: 7}]", "a text must be words, got 7"),
        ("events: [{text: a | b}]", "cannot hold '|'"),
        ("event: [{text: a}]", "needs a list of events"),
        ("events: [{text: a, stop: 3, negative: x}, {text: b, start: 3}]", "1 of 2 events have a negative text"),
    ],
)
def test_invalid_timeline_file_is_one_line(tmp_path, content, message):
    story = tmp_path / "story.yaml"
    story.write_text(content)
    with pytest.raises(UserError) as error:
        read_timeline(str(story))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_timeline_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot read --timeline"):
        read_timeline(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="has no range"):
        read_timeline("a red circle | a star")


@pytest.mark.parametrize(
    ("prompt", "same"), [("a red circle", True), ("a [0-8] | b [8-]", True), ("a [0-1s] | b [1s-]", False)]
)
def test_the_frame_rate_decides_latents_where_a_timeline_counts_in_seconds(prompt, same):
    def settings(fps: int) -> dict[str, Any]:
        config = RunConfig(
            model=ModelConfig(path="tiny/wan"),
            video=VideoConfig(num_frames=33, height=64, width=64, fps=fps),
            sampler=SamplerConfig(),
            method=MethodConfig(window_frames=9),
        )
        given = {"prompt": prompt, "negative_prompt": "", "seed": 0, "num_frames": 33}
        return latents_settings(config, checkpoint="c", dtype="torch.float32", device="cpu", with_rate=False, **given)

    assert (settings_id(settings(16)) == settings_id(settings(8))) == same
