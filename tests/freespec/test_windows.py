"""Windows as integers: every small video and every range of queries against the rule of one token."""

import itertools
from collections.abc import Callable, Iterator

import pytest

from freespec.windows import query_groups, window_range, window_start

Rule = Callable[[int, int, int], int]


def rule(frame: int, num_frames: int, window_frames: int) -> int:
    """The definition: clamp(f - F0 // 2, 0, F - F0), and 0 where the window holds the whole video."""
    return 0 if num_frames <= window_frames else min(max(frame - window_frames // 2, 0), num_frames - window_frames)


def shifted(frame: int, num_frames: int, window_frames: int) -> int:
    """The rule, one frame late."""
    return rule(frame + 1, num_frames, window_frames)


def small_videos() -> Iterator[dict[str, int]]:
    for num_frames, window, tokens in itertools.product(range(1, 14), range(1, 16), range(1, 5)):
        yield {"num_frames": num_frames, "frame_tokens": tokens, "window_frames": window}


def window_of_each_token(video: dict[str, int], rule: Rule) -> list[int]:
    """First key of every query of the video, one token at a time."""
    tokens = video["frame_tokens"]
    starts = [rule(frame, video["num_frames"], video["window_frames"]) * tokens for frame in range(video["num_frames"])]
    return [start for start in starts for _ in range(tokens)]


def check_groups(video: dict[str, int], q_start: int, q_stop: int, expected: list[int]) -> None:
    """The groups follow each other from q_start to q_stop, and give every query its window."""
    groups = query_groups(q_start, q_stop, **video)
    assert len(groups) <= 5
    seen: list[int] = []
    for group in groups:
        assert group.q_start == q_start + len(seen)
        assert group.k_tokens == min(video["num_frames"], video["window_frames"]) * video["frame_tokens"]
        for entry in range(group.batch):
            seen += [group.k_start + entry * group.q_tokens] * group.q_tokens
        assert group.q_stop == q_start + len(seen)
        assert group.k_stop == seen[-1] + group.k_tokens
    assert seen == expected[q_start:q_stop]


@pytest.mark.parametrize("part", range(2))
def test_groups_cover_any_range_by_the_rule(part: int) -> None:
    for video in itertools.islice(small_videos(), part, None, 2):
        expected = window_of_each_token(video, rule)
        for q_start, q_stop in itertools.combinations_with_replacement(range(len(expected) + 1), 2):
            check_groups(video, q_start, q_stop, expected)


def test_whole_sequence_is_head_middle_and_tail() -> None:
    """Head and tail hold every token whose window is the first and the last one; one call serves all between."""
    for video in small_videos():
        expected = window_of_each_token(video, rule)
        ends = [expected.count(start) for start in sorted({expected[0], expected[-1]})]
        between = len(expected) - sum(ends)
        groups = query_groups(0, len(expected), **video)
        assert [g.batch * g.q_tokens for g in groups] == [ends[0], *([between] if between else []), *ends[1:]]


def test_negative_control_rule_shifted_by_one_frame() -> None:
    video = {"num_frames": 9, "frame_tokens": 2, "window_frames": 4}
    check_groups(video, 0, 18, window_of_each_token(video, rule))
    with pytest.raises(AssertionError):
        check_groups(video, 0, 18, window_of_each_token(video, shifted))


def check_range(video: dict[str, int], q_start: int, q_stop: int, rule: Rule) -> None:
    frames, tokens, window = video["num_frames"], video["frame_tokens"], video["window_frames"]
    starts = [rule(f, frames, window) for f in range(q_start // tokens, (q_stop - 1) // tokens + 1)]
    keys = {f for start in starts for f in range(start, min(start + window, frames))}
    assert window_range(q_start, q_stop, **video) == (min(keys) * tokens, (max(keys) + 1) * tokens)


def test_window_range_is_the_union_of_the_windows() -> None:
    for video in small_videos():
        for q_start, q_stop in itertools.combinations(range(0, video["num_frames"] * video["frame_tokens"] + 1, 2), 2):
            check_range(video, q_start, q_stop, rule)
        assert window_range(1, 1, **video) == (0, 0)


def test_negative_control_of_the_range() -> None:
    with pytest.raises(AssertionError):
        check_range({"num_frames": 9, "frame_tokens": 2, "window_frames": 4}, 8, 10, shifted)


def test_window_start_has_the_native_number_of_keys() -> None:
    for frames, window in itertools.product(range(1, 14), range(1, 16)):
        for frame in range(frames):
            start = window_start(frame, frames, window)
            assert start == rule(frame, frames, window)
            assert 0 <= start <= frame < start + window


@pytest.mark.parametrize(("q_start", "q_stop"), [(-1, 3), (4, 3), (0, 13)])
def test_queries_outside_the_video_are_an_error(q_start: int, q_stop: int) -> None:
    with pytest.raises(ValueError, match=r"outside the 12 tokens of 6 frames"):
        query_groups(q_start, q_stop, num_frames=6, frame_tokens=2, window_frames=3)
