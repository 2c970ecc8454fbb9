"""Quality of continued videos of the embedded world, against a chain of clips that each re-encode the end of the last.

python -m benchmarks.extensions --count 40 --seeds 1
python -m benchmarks.extensions --count 40 --seeds 1 --model tiny/ltx

A clip of native length is continued to four times that, from one of the held-out prompts. `extension` keeps the clip's latents and makes
the rest in one run, as `generate.py --extend` does. `chain` makes clips of native length; each begins with the last frames of what is
there, encoded again, and adds the rest. Its frames are not compressed in between. Each video is a line of the file: what is seen in each
frame. Started again, the command makes what is missing. Of tiny/ltx what is continued is a condition without noise, of tiny/wan it has the
rule without training (engine/given/known.py).
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.measure import ROOT
from benchmarks.videos import MODELS, Video, options, report_on
from engine.engine import LongVideoEngine
from engine.files.latents import save_latents
from engine.given.frames import MAX_NOISE, GivenFrames
from engine.given.known import encode_frames
from evaluation.study.timelines_and_extensions import CONTINUED, WAYS, WRONG, extensions
from tiny.captions import parse_caption
from tiny.measure import track
from tiny.world import STRAIGHT

NATIVE = 33  # frames of a clip
LENGTH = 129
TAIL = 9  # frames that a clip of the chain takes over
LATENT = 4  # frames of a latent frame
FPS = 16
SEAMS = {"extension": [NATIVE], "chain": list(range(NATIVE, LENGTH, NATIVE - TAIL))}  # first new frame of each piece
NAMED = ("shape", "colour", "background")
MEASURED = ("centre", "rgb", "background_rgb")


def observe(frames: np.ndarray) -> dict[str, list[Any]]:
    """What is seen in each frame of [F, 64, 64, 3], see `tiny.measure.Track`; None for numbers where no object is."""
    seen = track(frames)
    numbers = {name: [_row(row) for row in getattr(seen, name)] for name in MEASURED}
    return {name: list(getattr(seen, name)) for name in NAMED} | numbers


def _row(row: np.ndarray) -> list[float | None]:
    return [round(float(value), 3) if np.isfinite(value) else None for value in row]


def measure(seen: Mapping[str, Sequence[Any]], seams: Sequence[int]) -> dict[str, float]:
    """Measures of a video from what is seen in each frame; nan where there is nothing to measure.

    seams: the first frame of each new piece; the first of them ends the given clip.
    kept: share of the new frames with the most frequent shape, colour and background of the given clip, all three.
    centre, rgb, background_rgb: where the object is, its colour, and the background's. `_seam` is the distance from a frame to the next at
        the seams, `_inside` that between all other new frames, and `_between` that of `_inside` where a latent frame begins, as one does at
        every seam: frames of one latent frame are nearer to each other in any video. Means of each; `_slope` is the length of the change
        per second on the straight line through the new frames.
    """
    first = seams[0]
    same = [np.array(seen[name][first:]) == _most_frequent(seen[name][:first]) for name in NAMED]
    found = {"kept": float(np.all(same, axis=0).mean())}
    frames = np.arange(first, len(seen["shape"]))
    at_seam = np.isin(frames, seams)
    between = ((frames - 1) % LATENT == 0) & ~at_seam
    for name in MEASURED:
        values = np.array(seen[name], dtype=np.float64)  # None becomes nan
        jumps = np.linalg.norm(np.diff(values, axis=0), axis=1)[first - 1 :]
        found |= {f"{name}_seam": _mean(jumps[at_seam]), f"{name}_inside": _mean(jumps[~at_seam])}
        found[f"{name}_between"] = _mean(jumps[between])
        found[f"{name}_slope"] = _slope(values[first:])
    return {name: found[name] for name in CONTINUED}


def _most_frequent(names: Sequence[str]) -> str:
    return max(dict.fromkeys(names), key=list(names).count)


def _mean(values: np.ndarray) -> float:
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if len(kept) else float("nan")


def _slope(values: np.ndarray) -> float:
    """Length per second of the least-squares slope of [F, d]; nan with fewer than two frames that are known."""
    known = np.isfinite(values).all(1)
    if known.sum() < 2:
        return float("nan")
    return float(np.linalg.norm(np.polyfit(np.flatnonzero(known) / FPS, values[known], 1)[0]))


def make(engine: LongVideoEngine, prompt: str, way: str, seed: int, *, length: int = LENGTH) -> np.ndarray:
    """Frames of one video, uint8 [length, 64, 64, 3]."""
    clip = engine.generate(prompt, num_frames=NATIVE, seed=seed)
    if way == "extension":
        return decode(engine, continue_clip(engine, clip.latents, prompt, length, seed + 1))
    frames = clip.frames
    while len(frames) < length:
        seed += 1  # with one noise all pieces would be alike
        tail = encode_frames(engine.adapter, engine.pipe.vae, frames[-TAIL:])
        piece = decode(engine, continue_clip(engine, tail, prompt, NATIVE, seed))
        frames = np.concatenate([frames, piece[TAIL:]])
    return frames


def continue_clip(
    engine: LongVideoEngine, latents: Tensor, prompt: str, num_frames: int, seed: int, *, max_noise: float = MAX_NOISE
) -> Tensor:
    """Latents of a video that begins with these, which have at most `max_noise` before a step."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "given.safetensors"
        save_latents(file, latents, {})
        given = GivenFrames(extend=file, max_noise=max_noise)
        return engine.denoise(prompt, num_frames=num_frames, seed=seed, given=given).latents


def decode(engine: LongVideoEngine, latents: Tensor) -> np.ndarray:
    """Frames of latents, uint8 [T, 64, 64, 3]."""
    return np.concatenate(list(engine.decode(latents)))


def read_prompts() -> list[str]:
    """The held-out prompts of the world."""
    return (ROOT / "configs/prompts/world-heldout-40.txt").read_text(encoding="utf-8").splitlines()


def list_videos(count: int, seeds: int, **varied: Sequence[Any]) -> Iterator[Video]:
    """Each video: seed, number and text of its prompt, and each value of what is varied: the way it is continued, say."""
    for seed in range(seeds):
        for index, prompt in enumerate(read_prompts()[:count]):
            video = {"seed": seed, "index": index, "prompt": prompt}
            yield from (video | {name: value} for name, values in varied.items() for value in values)


def make_video(engine: LongVideoEngine, video: Video) -> dict[str, Any]:
    """What is seen in one video."""
    return {"seen": observe(make(engine, video["prompt"], video["way"], video["seed"]))}


def measured(lines: Sequence[Mapping[str, Any]]) -> list[Video]:
    """The videos of these lines with their measures, for a report."""
    return [
        {"seed": line["seed"], "index": line["index"], "way": line["way"], "kind": _kind(line["prompt"], line["seen"])}
        | {"values": measure(line["seen"], SEAMS[line["way"]])}
        for line in lines
    ]


def _kind(prompt: str, seen: Mapping[str, Sequence[Any]]) -> str:
    """Whether the clip is as captioned, the object goes straight, and how fast: in training clips a fast one crosses the edge, another ends there."""
    told = parse_caption(prompt)
    assert told is not None, prompt
    if any(value != getattr(told, name) for name in NAMED for value in seen[name][:NATIVE]):
        return WRONG
    return f"straight, {told.speed}" if told.motion in STRAIGHT else "bounces or circles"


def main() -> None:
    """Make what is missing, and write and print the report."""
    parser = options(__doc__, name="extensions", count="extensions, at most 40", seeds=1, models=MODELS)
    args = parser.parse_args()
    if args.count > len(read_prompts()):
        parser.error(f"there are {len(read_prompts())} held-out prompts, --count is {args.count}")
    videos = list_videos(args.count, args.seeds, way=WAYS)
    print(extensions(report_on(args, videos, make_video, measured, [LENGTH])))


if __name__ == "__main__":
    main()
