"""How well the events of a timeline are shown, by exact measures of the embedded world.

python -m benchmarks.events --count 40 --seeds 2

A timeline has two to four events of a native length each; from one to the next, one or two of shape, colour, direction and
background change. Each video is a line of the file: what is seen in each frame. Started again, the command makes what is missing.
Baselines: `joined` is a clip for each event; `sliding_window` with `scene` gives each event's text to its own windows alone.
"""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.tables import table
from benchmarks.videos import Video, make_missing, options, read, show
from engine.engine import LongVideoEngine
from metrics.bootstrap import mean_interval
from tiny.captions import Told, parse_caption
from tiny.measure import track
from tiny.world import BACKGROUNDS, COLOURS, SHAPES, STRAIGHT

EVENT = 32  # frames: a native length, but for the one frame that the first latent frame is
METHODS = ("freespec", "sliding_window", "direct")
TRANSITIONS = ("cut", "scene", "fade", "relay")
JOINED = ("direct", "joined")
NAMED = ("shape", "colour", "background")
NEAR = 2  # frames to either side between which a direction is measured
STILL = 0.25  # pixels per frame: the least that counts as a direction
MEASURES = ("shown", "moves", "kept", "switch")


def draw_timelines(count: int) -> list[list[str]]:
    """The captions of each timeline, of 2, 3, 4, 2, ... events; the same for every run."""
    rng = random.Random(0)
    choices = {"shape": SHAPES, "colour": tuple(COLOURS), "motion": tuple(STRAIGHT), "background": tuple(BACKGROUNDS)}
    timelines = []
    for index in range(count):
        events: list[dict[str, str]] = []
        while len(events) < 2 + index % 3:
            event = dict(events[-1]) if events else {name: rng.choice(values) for name, values in choices.items()}
            for name in rng.sample(sorted(choices), rng.choice((1, 2))):
                event[name] = rng.choice([value for value in choices[name] if value != event[name]])
            if event["colour"] != event["background"]:
                events.append(event)
        text = "a {colour} {shape} moves {motion} over a {background} background"
        timelines.append([text.format(**event) for event in events])
    return timelines


def write_timeline(texts: Sequence[str], transition: str) -> str:
    """The timeline as a prompt, with ranges in frames."""
    stops = [str(EVENT * number) for number in range(1, len(texts))] + [""]
    options = ["", *[f", {transition}"] * (len(texts) - 1)]
    parts = zip(texts, stops, options, strict=True)
    return " | ".join(f"{text} [{EVENT * i}-{stop}{option}]" for i, (text, stop, option) in enumerate(parts))


def observe(frames: np.ndarray) -> dict[str, list[Any]]:
    """What is seen in each frame of [F, 64, 64, 3]: shape, colour, background and direction, "" where there is none."""
    seen = track(frames)
    return {**{name: list(getattr(seen, name)) for name in NAMED}, "motion": _directions(seen.centre)}


def _directions(centre: np.ndarray) -> list[str]:
    """The direction of each frame, between the centres [F, 2] NEAR frames before and after."""
    names = [""] * len(centre)
    for frame in range(NEAR, len(centre) - NEAR):
        step = centre[frame + NEAR] - centre[frame - NEAR]
        if np.isfinite(step).all() and np.abs(step).max() >= 2 * NEAR * STILL:
            names[frame] = max(STRAIGHT, key=lambda name: float(np.dot(STRAIGHT[name], step)))
    return names


def measure(texts: Sequence[str], seen: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Measures of a video of these events from what is seen in each frame; nan where there is nothing to measure.

    shown: share of frames with the shape, colour and background of their event.
    moves: share of frames with the direction of their event, without those NEAR frames from its ends.
    kept: share of frames of an event that keep what the event before it shows of the shape, colour and background that both have.
    switch: frames between a boundary and the frame that best parts what changes there; the mean over boundaries.
    """
    events = [told for text in texts if (told := parse_caption(text)) is not None]
    if len(events) < len(texts):
        raise ValueError(
            f"these are no captions of the world: {[text for text in texts if parse_caption(text) is None]}"
        )
    named = {name: np.array(values) for name, values in seen.items()}
    bounds = [0, *(EVENT * number + 1 for number in range(1, len(events))), len(named["shape"])]
    spans = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    shown = [_matches(named, event, NAMED, span).all(0) for event, span in zip(events, spans, strict=True)]
    inner = [slice(span.start + NEAR, span.stop - NEAR) for span in spans]
    moves = [_matches(named, event, ("motion",), span)[0] for event, span in zip(events, inner, strict=True)]
    kept, switches = [], []
    for number in range(1, len(events)):
        before, after = events[number - 1], events[number]
        changed = [name for name in (*NAMED, "motion") if getattr(before, name) != getattr(after, name)]
        both, length = slice(spans[number - 1].start, spans[number].stop), bounds[number] - bounds[number - 1]
        names = [name for name in changed if name != "motion"] or changed
        scores = [_matches(named, event, names, both).mean(0) for event in (before, after)]
        switches.append(abs(_best_switch(*scores) - length))
        kept += [_kept(named[name], spans[number - 1], spans[number]) for name in NAMED if name not in changed]
    return {
        "shown": float(np.concatenate(shown).mean()),
        "moves": float(np.concatenate(moves).mean()),
        "kept": float(np.mean(kept)) if kept else float("nan"),
        "switch": float(np.mean(switches)),
    }


def _matches(seen: Mapping[str, np.ndarray], event: Told, names: Sequence[str], span: slice) -> np.ndarray:
    """Whether each attribute [N] of each frame [F] of the span is the event's."""
    return np.stack([seen[name][span] == getattr(event, name) for name in names])


def _best_switch(before: np.ndarray, after: np.ndarray) -> int:
    """The frame s for which most frames before s show the event before, and most from s on the event after."""
    return int(np.argmax([before[:s].sum() + after[s:].sum() for s in range(len(before) + 1)]))


def _kept(names: np.ndarray, first: slice, later: slice) -> float:
    values, counts = np.unique(names[first], return_counts=True)
    return float(np.mean(names[later] == values[counts.argmax()]))


def make(engine: LongVideoEngine, texts: Sequence[str], transition: str, seed: int) -> np.ndarray:
    """Frames of one video."""
    if (engine.config.method.name, transition) != JOINED:
        length = EVENT * len(texts) + 1
        return engine.generate(write_timeline(texts, transition), num_frames=length, seed=seed).frames
    clips = [engine.generate(text, num_frames=EVENT + 1, seed=seed).frames for text in texts]
    return np.concatenate([clips[0], *(clip[1:] for clip in clips[1:])])


def list_videos(count: int, seeds: int) -> Iterator[Video]:
    """Each video: seed, number of the timeline, method and transition."""
    for seed in range(seeds):
        for index in range(count):
            # `scene` is `cut` for a method without windows.
            pairs = [(m, t) for m in METHODS for t in TRANSITIONS if (m, t) != ("direct", "scene")]
            yield from (
                {"seed": seed, "index": index, "method": method, "transition": transition}
                for method, transition in (*pairs, JOINED)
            )


def make_video(engine: LongVideoEngine, video: Video) -> dict[str, Any]:
    """What is seen in one video, and the texts of its events."""
    texts = draw_timelines(video["index"] + 1)[-1]
    engine.use_method(replace(engine.config.method, name=video["method"]))
    return {"texts": texts, "seen": observe(make(engine, texts, video["transition"], video["seed"]))}


def summarize(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each method and transition: means over timelines, seeds averaged first, with intervals of 95 %."""
    values: dict[tuple[str, str], dict[int, list[dict[str, float]]]] = {}
    for line in lines:
        found = values.setdefault((line["method"], line["transition"]), {}).setdefault(line["index"], [])
        found.append(measure(line["texts"], line["seen"]))
    rows = []
    for names, by_index in values.items():
        means = {m: np.array([np.mean([each[m] for each in found]) for found in by_index.values()]) for m in MEASURES}
        cells = [show(mean_interval(means[name])) for name in ("shown", "moves", "kept")]
        rows.append([*names, str(len(by_index)), *cells, f"{np.median(means['switch']):.1f}"])
    return rows


def main() -> None:
    """Make what is missing, and print the table of all lines with as many steps."""
    args = options(__doc__, count="timelines", seeds=2, out="events.jsonl").parse_args()
    make_missing(args.out, args.steps, list_videos(args.count, args.seeds), make_video)
    header = ["method", "transition", "timelines", "shown", "moves", "kept", "switch (median, frames)"]
    print(table(header, summarize([line for line in read(args.out) if line["steps"] == args.steps])))


if __name__ == "__main__":
    main()
