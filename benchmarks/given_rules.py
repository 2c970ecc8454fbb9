"""Rules for the noise of given frames: clips of the embedded world, continued by one native length with each.

python -m benchmarks.given_rules --count 8 --seeds 1

A rule is the most noise that given frames have before a step: 1 is that of the step, 0 none. Each video is a line of the file: what is
seen in each frame. Started again, the command makes what is missing.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.extensions import NATIVE, continue_clip, decode, list_videos, measure, observe
from benchmarks.videos import Video, made_with, make_missing, options, sampler_of
from engine.engine import LongVideoEngine
from engine.files.tables import markdown_table
from engine.given.frames import MAX_NOISE
from evaluation.markdown import estimate
from evaluation.study.timelines_and_extensions import balanced
from metrics.bootstrap import paired_interval, seed_means

LENGTH = 65
RULES = (MAX_NOISE, 1.0, 0.5, 0.1, 0.0)
MEASURES = {
    "centre_seam": "object moves at the seam, px",
    "centre_between": "between latent frames",
    "rgb_seam": "its colour changes at the seam, grey levels",
    "rgb_between": "between latent frames",
    "background_rgb_seam": "background changes at the seam",
    "rgb_slope": "slope of the object's colour, levels per second",
}
COMPARED = {"centre_seam": "moves at the seam, against the rule", "rgb_seam": "colour at the seam, against the rule"}


def make_video(engine: LongVideoEngine, video: Video) -> dict[str, Any]:
    """What is seen in one video."""
    prompt, seed = video["prompt"], video["seed"]
    clip = _clip(engine, prompt, seed)
    latents = continue_clip(engine, clip, prompt, LENGTH, seed + 1, max_noise=video["max_noise"])
    return {"seen": observe(decode(engine, latents))}


@functools.lru_cache(maxsize=1)
def _clip(engine: LongVideoEngine, prompt: str, seed: int) -> Tensor:
    return engine.denoise(prompt, num_frames=NATIVE, seed=seed).latents


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Means of each rule over the clips that have all of them, seeds averaged first, and differences from the rule in use."""
    lines = balanced(lines, "max_noise")
    numbers = sorted({line["index"] for line in lines})
    found: dict[float, dict[str, np.ndarray]] = {}
    for rule in RULES:
        of_rule = [(line["index"], measure(line["seen"], [NATIVE])) for line in lines if line["max_noise"] == rule]
        found[rule] = {
            name: seed_means(((index, values[name]) for index, values in of_rule), numbers) for name in MEASURES
        }
    rows = [
        [
            f"{rule:g}",
            *(f"{np.nanmean(values[name]):.3g}" for name in MEASURES),
            *(
                ""
                if rule == MAX_NOISE
                else estimate(paired_interval(values[name], found[MAX_NOISE][name]), signed=True)
                for name in COMPARED
            ),
        ]
        for rule, values in found.items()
    ]
    return markdown_table(["most noise", *MEASURES.values(), *COMPARED.values()], rows)


def main() -> None:
    """Make what is missing, and print the table."""
    parser = options(__doc__, name="given_rules", count="clips, at most 40", seeds=1)
    parser.set_defaults(count=8)
    args = parser.parse_args()
    sampler = sampler_of(args)
    make_missing(args.out, sampler, list_videos(args.count, args.seeds, max_noise=RULES), make_video)
    print(table(made_with(args.out, sampler)))


if __name__ == "__main__":
    main()
