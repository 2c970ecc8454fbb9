"""Measures of long videos on clips whose truth is known: what each finds, and its false alarms.

python -m benchmarks.long_measures
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from benchmarks import tables
from benchmarks.measure import parser, run
from engine.media.read_video import read_frames
from metrics.course import LOOP, course_metrics
from tiny.world import ORBITS, SIZE, SPEEDS, STRAIGHT, Scene, render, sample_scene

FRAMES, NATIVE = 257, 33
LOOPS = (41, 80)  # lengths that no motion of the world returns after
CUTS = 7
DRIFT = 10.0  # levels of red per 100 frames
NOISE = 8.0  # levels

Clip = tuple[np.ndarray, dict[str, float]]  # frames, and what is true of them
Draw = Callable[[np.random.Generator], Clip]


def scene_of(rng: np.random.Generator, motions: Mapping[str, Any]) -> Scene:
    """A scene with one of these motions."""
    while (scene := sample_scene(rng)).motion not in motions:
        pass
    return scene


def wander(rng: np.random.Generator) -> np.ndarray:
    """An object that turns at random times: nothing comes back."""
    scene, clips = scene_of(rng, STRAIGHT), []
    place, left = np.array(scene.start), FRAMES
    while left > 0:
        length, motion = int(rng.integers(9, 25)), str(rng.choice(list(STRAIGHT)))
        start = (float(place[0] % SIZE), float(place[1] % SIZE))
        clips.append(render(replace(scene, motion=motion, pan="none", start=start), length))
        place = place + length * SPEEDS[scene.speed] * np.array(STRAIGHT[motion])
        left -= length
    return np.concatenate(clips)[:FRAMES]


def looped(length: int) -> Draw:
    """A piece of a wandering clip again and again, under noise."""

    def draw(rng: np.random.Generator) -> Clip:
        piece = wander(rng)[:length]
        frames = np.tile(piece, (-(-FRAMES // length), 1, 1, 1))[:FRAMES]
        noisy = frames + rng.normal(0, NOISE, frames.shape)
        return np.clip(noisy, 0, 255).astype(np.uint8), {"loop_lag": length}

    return draw


def cut(rng: np.random.Generator) -> Clip:
    """Scenes of native length one after the other."""
    return np.concatenate([render(sample_scene(rng), NATIVE) for _ in range(CUTS + 1)]), {"cuts": CUTS}


def reddened(rng: np.random.Generator) -> Clip:
    """A wandering clip whose red grows."""
    added = np.arange(FRAMES)[:, None, None, None] * DRIFT / 100 * np.array([1, 0, 0])
    return np.clip(wander(rng) + added, 0, 255).astype(np.uint8), {"colour_slope": DRIFT}


def softened(rng: np.random.Generator) -> Clip:
    """A wandering clip that is blurred more and more, by 1.5 pixels at last."""
    frames = wander(rng)
    return np.stack([cv2.GaussianBlur(f, (0, 0), 0.3 + 1.2 * i / FRAMES) for i, f in enumerate(frames)]), {}


def still(rng: np.random.Generator) -> Clip:
    """One frame."""
    return np.repeat(wander(rng)[:1], FRAMES, axis=0), {}


def one_scene(motions: Mapping[str, Any]) -> Draw:
    """A scene of the world with one of these motions; paths on a torus return."""
    return lambda rng: (render(scene_of(rng, motions), FRAMES), {})


CLIPS: dict[str, Draw] = {
    "wandering": lambda rng: (wander(rng), {}),
    **{f"loop of {length} frames, noise of {NOISE:.0f} levels": looped(length) for length in LOOPS},
    "straight path": one_scene(STRAIGHT),
    "orbit": one_scene(ORBITS),
    "bounce": one_scene({"bounce": 0}),
    "one frame": still,
    f"{CUTS} cuts": cut,
    f"red grows by {DRIFT:.0f} levels per 100 frames": reddened,
    "blur grows to 1.5 px": softened,
}


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every kind of clip: the measures of each, and what is true."""
    for number, (name, draw) in enumerate(CLIPS.items()):
        clips = []
        for index in range(args.repeats):
            frames, truth = draw(np.random.default_rng([number, index]))
            clips.append({"values": course_metrics(frames, NATIVE).values, "truth": truth})
        yield {"clips": name, "measures": clips}


def main() -> None:
    """Calibrate, print and write; or measure given videos."""
    options = parser(__doc__, repeats=16)
    options.add_argument("--videos", nargs="+", default=[], help="measure these instead")
    options.add_argument("--native_frames", type=int, default=NATIVE, help="native length of their model")
    args = options.parse_args()
    for path in args.videos:
        found = course_metrics(read_frames(path), args.native_frames)
        values = ", ".join(f"{name} {value:.3g}" for name, value in found.values.items())
        print(f"{path}: {values}; similarity at " + ", ".join(f"{d}: {alike:.2f}" for d, alike in found.curve))
    if not args.videos:
        run("long_measures", args, measured(args), tables.long_measures, {"frames": FRAMES, "loop": LOOP})


if __name__ == "__main__":
    main()
