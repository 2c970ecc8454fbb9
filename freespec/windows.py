"""The keys that a query sees, as integers: sliding windows of whole frames over frame-major tokens (method.md, eq. 1).

A query in frame f sees the `window_frames` frames that start at clamp(f - window_frames // 2, 0, F - window_frames):
the window is shifted at both ends and never cut, so that every query sees the native number of keys.
"""

import itertools
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryGroup:
    """Queries that one dense attention call serves: `batch` entries, each the window of the one before slid by `k_step`.

    Entry i holds the queries [q_start + i * q_tokens, + q_tokens) and sees the keys [k_start + i * k_step, + k_tokens).
    All numbers are absolute token positions or counts; `batch` is 1 unless the entries are whole consecutive frames.
    """

    q_start: int
    q_tokens: int
    batch: int
    k_start: int
    k_tokens: int
    k_step: int

    @property
    def q_stop(self) -> int:
        """One past the last query token of the group."""
        return self.q_start + self.batch * self.q_tokens

    @property
    def k_stop(self) -> int:
        """One past the last key token of the group's last entry."""
        return self.k_start + (self.batch - 1) * self.k_step + self.k_tokens

    def thinned(self, frame_tokens: int, kept: int) -> "QueryGroup":
        """The same queries and frames of keys, in a video of `kept` of `frame_tokens` tokens a frame."""
        k_start, k_tokens = (number // frame_tokens * kept for number in (self.k_start, self.k_tokens))
        return replace(self, k_start=k_start, k_tokens=k_tokens, k_step=kept)


def default_stride(window_frames: int) -> int:
    """Frames from one view to the next: 4 for views of 16, as published, a quarter of any other native length, at least 1."""
    return max(1, round(window_frames / 4))


def window_start(frame: int, num_frames: int, window_frames: int) -> int:
    """First frame that a query of `frame` sees: clamp(f - F0 // 2, 0, F - F0), and 0 where F <= F0."""
    return min(max(frame - window_frames // 2, 0), max(num_frames - window_frames, 0))


def window_range(
    q_start: int, q_stop: int, *, num_frames: int, frame_tokens: int, window_frames: int
) -> tuple[int, int]:
    """Token range [start, stop) that is the union of the windows of the queries [q_start, q_stop); (0, 0) for no query."""
    if q_start == q_stop:
        return (0, 0)
    first = window_start(q_start // frame_tokens, num_frames, window_frames)
    last = window_start((q_stop - 1) // frame_tokens, num_frames, window_frames)
    return (first * frame_tokens, min(last + window_frames, num_frames) * frame_tokens)


def query_groups(
    q_start: int, q_stop: int, *, num_frames: int, frame_tokens: int, window_frames: int
) -> tuple[QueryGroup, ...]:
    """Split the queries [q_start, q_stop) into the fewest dense calls: head, middle frames, tail.

    Head and tail share one window each. Between them whole frames form one batch whose window slides by a frame; a
    frame that the range cuts is a group of its own. Groups come in query order and cover the range exactly.
    """
    num_tokens = num_frames * frame_tokens
    if not 0 <= q_start <= q_stop <= num_tokens:
        raise ValueError(f"queries [{q_start}, {q_stop}) lie outside the {num_tokens} tokens of {num_frames} frames")
    window_frames = min(window_frames, num_frames)
    k_tokens = window_frames * frame_tokens
    # Frames up to F0 // 2 have their window at 0, frames from F - F0 + F0 // 2 on have it at F - F0. With F == F0 both
    # are the same window and the head takes all.
    head_stop = num_tokens if window_frames == num_frames else (window_frames // 2 + 1) * frame_tokens
    tail_start = max(head_stop, (num_frames - window_frames + window_frames // 2) * frame_tokens)
    edges = [q_start]
    middle_start, middle_stop = max(q_start, head_stop), min(q_stop, tail_start)
    if middle_start < middle_stop:
        whole_start = -(-middle_start // frame_tokens) * frame_tokens
        whole_stop = middle_stop // frame_tokens * frame_tokens
        edges += [middle_start, *((whole_start, whole_stop) if whole_start <= whole_stop else ()), middle_stop]
    else:
        edges += [min(max(head_stop, q_start), q_stop)]
    edges.append(q_stop)

    groups = []
    for start, stop in itertools.pairwise(edges):
        if start == stop:
            continue
        first_frame = start // frame_tokens
        slides = start >= head_stop and stop <= tail_start
        batch = (stop - start) // frame_tokens if slides and (stop - start) % frame_tokens == 0 else 1
        groups.append(
            QueryGroup(
                q_start=start,
                q_tokens=(stop - start) // batch,
                batch=batch,
                k_start=window_start(first_frame, num_frames, window_frames) * frame_tokens,
                k_tokens=k_tokens,
                k_step=(stop - start) // batch,
            )
        )
    return tuple(groups)
