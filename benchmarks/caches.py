"""Step caches in whole runs of the embedded model: quality, distance from the same run without a cache, and CPU time.

python -m benchmarks.caches            # the table, after measuring the ratios of `mag`
python -m benchmarks.caches --ratios   # only those ratios, for sampler.cache_ratios, of one method after the other
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from benchmarks import tables
from benchmarks.measure import parser, run
from engine.config import RunConfig, SamplerConfig
from engine.engine import LongVideoEngine
from engine.planner.model import read_model
from engine.presets import read_preset
from evaluation.comparison.quality import score_of
from launch.arguments.prompts import read_prompts
from metrics.world import world_metrics

PROMPTS, CALIBRATION = "configs/prompts/world-heldout-40.txt", "configs/prompts/world-calibration-20.txt"
METHODS = ("direct", "freespec")
EMBEDDED = "tiny-wan"
# Settings beside the method's; the first is what the others are compared with. `mag` gets its ratios once they are measured.
CACHES: dict[str, dict[str, Any]] = {
    "none": {},
    "first_block 0.05": {"cache": "first_block"},
    "first_block 0.1": {"cache": "first_block", "cache_threshold": 0.1},
    "mag 0.06": {"cache": "mag"},
    "taylorseer 3": {"cache": "taylorseer", "cache_interval": 3},
    "taylorseer 5": {"cache": "taylorseer"},
}


class ResidualRatios:
    """Hooks on the blocks of a transformer: per forward, the residual of all blocks over that of the forward `passes` before."""

    def __init__(self, blocks: Sequence[nn.Module], passes: int) -> None:
        self.ratios: list[float] = []
        self._residuals: list[Tensor] = []
        self._passes = passes
        self._start: Tensor | None = None
        self._hooks = [
            blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True),
            blocks[-1].register_forward_hook(self._leave),
        ]

    def _enter(self, _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        self._start = args[0] if args else kwargs["hidden_states"]

    def _leave(self, _module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
        self._residuals.append((out - self._start).norm(dim=-1))
        if len(self._residuals) > self._passes:
            self.ratios.append(float((self._residuals[-1] / self._residuals.pop(0)).mean()))

    def by_step(self) -> list[float]:
        """The ratio of each step, 1 for the first: the mean over its passes. Ends the measurement."""
        for hook in self._hooks:
            hook.remove()
        starts = range(0, len(self.ratios), self._passes)
        return [1.0, *(statistics.mean(self.ratios[i : i + self._passes]) for i in starts)]


def measured_ratios(engine: LongVideoEngine, prompts: Sequence[str]) -> list[float]:
    """Ratios of the engine's method, the mean over prompts: what `sampler.cache_ratios` takes."""
    found = []
    two_forwards = engine.config.sampler.guidance_scale > 1 and not engine.adapter.batches_guidance
    for prompt in prompts:
        blocks = engine.adapter.blocks(engine.pipe.transformer)
        hooks = ResidualRatios(list(blocks), passes=2 if two_forwards else 1)
        engine.denoise(prompt)
        found.append(hooks.by_step())
    return [round(statistics.mean(values), 4) for values in zip(*found, strict=True)]


def with_cache(sampler: SamplerConfig, name: str, ratios: Sequence[float]) -> SamplerConfig:
    """The sampler, which has no cache, with one of `CACHES`."""
    settings = CACHES[name] | ({"cache_ratios": tuple(ratios)} if name.startswith("mag") else {})
    return replace(sampler, **settings)


def measure(engine: LongVideoEngine, prompt: str, ratios: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Each cache with the engine's method: quality, distance of the latents from those of the first, CPU seconds, steps."""
    exact, config = None, engine.config
    for name in CACHES:
        engine.config = replace(config, sampler=with_cache(config.sampler, name, ratios))
        denoised = engine.denoise(prompt)
        exact = denoised.latents if exact is None else exact
        frames = np.concatenate(list(engine.decode(denoised.latents)))
        native = engine.spec.native_frames(config.method.window_frames)
        yield {
            "method": config.method.name,
            "cache": name,
            "prompt": prompt,
            "quality": score_of(world_metrics(frames, prompt, native).values),
            "distance": float((denoised.latents - exact).norm() / exact.norm()),
            "cpu_s": sum(row["cpu_seconds"] for row in denoised.steps),
            "cached": sum(row.get("cached", False) for row in denoised.steps),
        }
    engine.config = config


def engine_ratios(engine: LongVideoEngine, method: str) -> list[float]:
    """Switch the engine to a method, and measure its ratios on two prompts that the table does not have."""
    engine.use_method(replace(engine.config.method, name=method))
    return measured_ratios(engine, read_prompts(None, CALIBRATION).texts[:2])


def measured(config: RunConfig, args: argparse.Namespace, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every method, prompt and cache; the ratios of `mag` go into `settings`."""
    with LongVideoEngine(config) as engine:
        ratios = {method: engine_ratios(engine, method) for method in METHODS}
        settings["ratios"] = ratios
        for prompt in read_prompts(None, PROMPTS).texts[: args.prompts]:
            for method in METHODS:
                engine.use_method(replace(engine.config.method, name=method))
                yield from measure(engine, prompt, ratios[method])


def main() -> None:
    """Measure, print and write."""
    options = parser(__doc__, repeats=1)
    options.add_argument("--prompts", type=int, default=6, help="held-out prompts")
    options.add_argument("--frames", type=int, default=65, help="frames of the videos; 33 are native")
    options.add_argument("--steps", type=int, default=20, help="steps of the videos")
    options.add_argument("--preset", default=EMBEDDED, help="the model, for --ratios")
    options.add_argument("--device", default="cpu", help="where the model is")
    options.add_argument("--ratios", action="store_true", help="print the ratios of each method, and make no table")
    args = options.parse_args()
    sizes = {"video.num_frames": args.frames, "sampler.num_steps": args.steps}
    words: dict[str, Any] = sizes | {"output.progress": "off", "model.device": args.device}
    if args.preset != EMBEDDED and not args.ratios:
        options.error(f"--preset {args.preset} is for --ratios; the table is of the embedded model, {EMBEDDED}")
    config = read_preset(args.preset, settings=words)
    if args.ratios:
        if read_model(config.model).num_experts > 1:
            options.error(f"ratios are measured on checkpoints of one transformer, and {args.preset} has two")
        with LongVideoEngine(config) as engine:
            for method in METHODS:
                print(f"{method}: {engine_ratios(engine, method)}")
        return
    run("caches", args, measured(config, args, words), tables.caches, words)


if __name__ == "__main__":
    main()
