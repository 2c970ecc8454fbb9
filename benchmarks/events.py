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

from benchmarks.videos import Video, options, report_on
from engine.engine import LongVideoEngine
from evaluation.study.timelines_and_extensions import JOINED, timelines
from metrics.events import TextRange, measure, observe
from tiny.world import BACKGROUNDS, COLOURS, SHAPES, STRAIGHT

EVENT = 32  # frames: a native length, but for the one frame that the first latent frame is
METHODS = ("freespec", "sliding_window", "direct")
TRANSITIONS = ("cut", "scene", "fade", "relay")


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


def list_ranges(texts: Sequence[str]) -> list[TextRange]:
    """The frames of each event; the first has one more, which its first latent frame is."""
    bounds = [0, *(EVENT * number + 1 for number in range(1, len(texts) + 1))]
    pairs = zip(texts, itertools.pairwise(bounds), strict=True)
    return [TextRange(text=text, start=start, stop=stop) for text, (start, stop) in pairs]


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
    """Tracks in one video, and the texts of its events."""
    texts = draw_timelines(video["index"] + 1)[-1]
    engine.use_method(replace(engine.config.method, name=video["method"]))
    return {"texts": texts, "seen": observe(make(engine, texts, video["transition"], video["seed"]))}


def measured(lines: Sequence[Mapping[str, Any]]) -> list[Video]:
    """The videos of these lines with their measures, for a report."""
    names = ("seed", "index", "method", "transition")
    return [
        {name: line[name] for name in names} | {"values": measure(list_ranges(line["texts"]), line["seen"])}
        for line in lines
    ]


def main() -> None:
    """Make what is missing, and write and print the report."""
    args = options(__doc__, name="events", count="timelines", seeds=2).parse_args()
    lengths = sorted({EVENT * len(texts) + 1 for texts in draw_timelines(args.count)})
    print(timelines(report_on(args, list_videos(args.count, args.seeds), make_video, measured, lengths)))


if __name__ == "__main__":
    main()
