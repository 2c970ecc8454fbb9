"""Far keys in whole runs of the embedded model: how far the final latents are from those of FreeSpec with all keys.

python -m benchmarks.far_latents
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from benchmarks import tables
from benchmarks.measure import parser, run
from engine.config import RunConfig
from engine.engine import LongVideoEngine
from engine.presets import read_preset
from launch.arguments.prompts import read_prompts

PROMPTS = "configs/prompts/world-heldout-40.txt"
# Method and far keys; the first is what the others are compared with.
VARIANTS = {
    "freespec": ("freespec", "all"),
    "sliding_window": ("sliding_window", "all"),
    "1/4": ("freespec", "1/4"),
    "1/8": ("freespec", "1/8"),
}


def with_variant(config: RunConfig, name: str) -> RunConfig:
    """The run with the method and the far keys of a variant."""
    method, far = VARIANTS[name]
    return replace(config, method=replace(config.method, name=method), attention=replace(config.attention, far=far))


def measure(engine: LongVideoEngine, prompt: str, seed: int) -> dict[str, Any]:
    """Relative distance of each variant's latents from the first one's, and CPU seconds, of one prompt and seed."""
    latents: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for name in VARIANTS:
        engine.config = with_variant(engine.config, name)
        engine.use_method(engine.config.method)
        started = time.process_time()
        latents[name] = engine.denoise(prompt, seed=seed).latents
        seconds[name] = time.process_time() - started
    exact, *others = VARIANTS
    distance = {name: float((latents[name] - latents[exact]).norm() / latents[exact].norm()) for name in others}
    return {"prompt": prompt, "seed": seed, "distance": distance, "cpu_s": seconds}


def measured(config: RunConfig, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every prompt with every seed, the seeds of a prompt one after the other."""
    with LongVideoEngine(config) as engine:
        for prompt in read_prompts(None, PROMPTS).texts[: args.prompts]:
            for seed in range(args.seeds):
                yield measure(engine, prompt, seed)


def main() -> None:
    """Measure, print and write."""
    options = parser(__doc__, repeats=1)
    options.add_argument("--prompts", type=int, default=6, help="held-out prompts")
    options.add_argument("--seeds", type=int, default=1, help="seeds of each")
    args = options.parse_args()
    words = {"video.num_frames": 129, "sampler.num_steps": 20, "output.progress": "off", "model.device": "cpu"}
    run("far_latents", args, measured(read_preset("tiny-wan", settings=words), args), tables.far_latents, words)


if __name__ == "__main__":
    main()
