"""Every way to lay a video over ranks, with its memory and predicted time, the best first."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from engine.config import MethodConfig, RunConfig, SamplerConfig, VideoConfig
from engine.errors import UserError
from engine.planner.gpu import GpuSpec
from engine.planner.layout import Degrees, Layout, feasible_degrees, lay_out, num_passes
from engine.planner.memory import GIB, decode_cost, denoise_peak
from engine.planner.model import ModelSpec
from engine.planner.timing import TERA, step_seconds
from freespec.methods import METHODS, Method, make_method
from parallel.plan import Mode, length

MODES: tuple[Mode, ...] = ("dual", "global", "local")
ITEMSIZES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run chooses beside video, sampler and method; the names are those of the configuration.

    Attributes:
        itemsize: bytes of a number in transformer and text encoder.
        kernel: attention.kernel.
        offload: model.offload.
        text_device: parallel.text_device.
        local_route: parallel.local_route.
    """

    itemsize: int = 2
    kernel: str = "auto"
    offload: Literal["none", "model"] = "none"
    text_device: Literal["model", "cpu"] = "model"
    local_route: Literal["auto", "halo", "all_to_all"] = "auto"

    @classmethod
    def of(cls, config: RunConfig) -> "Options":
        """Read them from a configuration; `model.dtype: auto` is what it is on CUDA."""
        return cls(
            itemsize=ITEMSIZES[config.model.dtype],
            kernel=config.attention.kernel,
            offload=config.model.offload,
            text_device=config.parallel.text_device,
            local_route=config.parallel.local_route,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to lay the video over the ranks. Seconds are predicted; bytes are of the rank that has or sends most.

    Attributes:
        cfg: ranks along the cfg axis.
        ring: ranks along the ring axis.
        ulysses: ranks along the ulysses axis.
        tokens: tokens of each rank of one sequence.
        heads: heads of each member of the ulysses axis.
        local_route: how local steps cross the ulysses axis.
        bytes_per_step: by mode and kind.
        memory: bytes by part: weights, text_encoder, latents, activations, kv_copies, vae_decode.
        peak_bytes: the most that is on the GPU at once.
        fits: whether that is within the GPU's usable memory.
        steps: by method, how many steps of each mode the sampler's timesteps give.
        step_seconds: by mode, and there by what takes the time.
        run_seconds: denoising, by method.
        decode_seconds: decoding on one rank.
        efficiency: by method, seconds of one GPU / (ranks x seconds of these ranks), memory of the one aside.
        why: one sentence for a person.
    """

    cfg: int
    ring: int
    ulysses: int
    tokens: list[int]
    heads: list[int]
    local_route: str
    bytes_per_step: dict[str, dict[str, int]]
    memory: dict[str, int]
    peak_bytes: int
    fits: bool
    steps: dict[str, dict[str, int]]
    step_seconds: dict[str, dict[str, float]]
    run_seconds: dict[str, float]
    decode_seconds: float
    efficiency: dict[str, float]
    why: str = ""

    @property
    def degrees(self) -> Degrees:
        """cfg, ring, ulysses."""
        return self.cfg, self.ring, self.ulysses

    @property
    def name(self) -> str:
        """The degrees in words."""
        return f"cfg {self.cfg} x ring {self.ring} x ulysses {self.ulysses}"


def plan(
    spec: ModelSpec,
    video: VideoConfig,
    sampler: SamplerConfig,
    method: MethodConfig,
    gpu: GpuSpec,
    world_size: int,
    *,
    options: Options | None = None,
) -> list[Plan]:
    """Every feasible (cfg, ring, ulysses) of `world_size` ranks, best first: those that fit, by predicted seconds.

    Raises UserError for a video that the model cannot make and for a number of ranks that no degrees reach.
    """
    options = options or Options()
    spec.video.check_video(video.num_frames, video.height, video.width)
    if world_size < 1:
        raise UserError(f"cannot plan for {world_size} GPUs; give 1 or more")
    frames, frame_tokens = spec.grid(video.num_frames, video.height, video.width)
    degrees = feasible_degrees(
        world_size, heads=spec.heads, passes=num_passes(sampler), tokens=frames * frame_tokens
    )
    if not degrees:
        raise UserError(f"cannot split {frames * frame_tokens} tokens over {world_size} GPUs; use fewer")
    steps = count_steps(spec, sampler, method)
    if frames <= method.window_frames:  # at native length the engine runs the stock model
        steps = {name: {"global": sum(counts.values())} for name, counts in steps.items()}

    def arrange(which: Degrees) -> Layout:
        return lay_out(
            spec, which, video, sampler, method, itemsize=options.itemsize, local_route=options.local_route
        )

    alone = _seconds(arrange((1, 1, 1)), gpu, options)
    decode = decode_cost(spec, video.height, video.width, frames)
    plans = [
        _make_plan(arrange(which), gpu, options, steps=steps, alone=alone, decode=decode, method=method.name)
        for which in degrees
    ]
    plans.sort(key=lambda p: (not p.fits, p.run_seconds[method.name], p.peak_bytes))
    return [replace(p, why=_why(p, plans, gpu, method.name)) for p in plans]


def count_steps(spec: ModelSpec, sampler: SamplerConfig, method: MethodConfig) -> dict[str, dict[str, int]]:
    """How many steps of each mode every method has on the sampler's real timesteps."""
    timesteps = spec.timesteps(sampler)
    methods: dict[str, Method] = {name: make_method(name) for name in METHODS} | {method.name: method.method}
    return {name: dict(Counter(step.mode for step in made.plan(timesteps))) for name, made in methods.items()}


def _seconds(layout: Layout, gpu: GpuSpec, options: Options) -> dict[str, dict[str, float]]:
    return {mode: step_seconds(layout, mode, gpu, options.kernel) for mode in MODES}


def _run_seconds(steps: dict[str, int], seconds: dict[str, dict[str, float]]) -> float:
    return sum(count * sum(seconds[mode].values()) for mode, count in steps.items())


def _make_plan(
    layout: Layout,
    gpu: GpuSpec,
    options: Options,
    *,
    steps: dict[str, dict[str, int]],
    alone: dict[str, dict[str, float]],
    decode: tuple[int, int],
    method: str,
) -> Plan:
    seconds = _seconds(layout, gpu, options)
    cfg, ring, ulysses = layout.degrees
    memory, peak = _memory(layout, options, list(steps[method]), decode_bytes=decode[0])
    runs = {name: _run_seconds(counts, seconds) for name, counts in steps.items()}
    ranks = cfg * ring * ulysses
    return Plan(
        cfg=cfg,
        ring=ring,
        ulysses=ulysses,
        tokens=[length(shard) for shard in layout.sequence.shards],
        heads=[length(share) for share in layout.sequence.head_shares],
        local_route=layout.local_route,
        bytes_per_step={mode: layout.step_bytes(mode) for mode in MODES},
        memory=memory,
        peak_bytes=peak,
        fits=peak <= gpu.usable_gib * GIB,
        steps=steps,
        step_seconds=seconds,
        run_seconds=runs,
        decode_seconds=decode[1] / (gpu.tf32_tflops * TERA * gpu.conv_fraction),
        efficiency={name: _run_seconds(steps[name], alone) / (ranks * runs[name]) for name in steps},
    )


def _memory(layout: Layout, options: Options, modes: list[Mode], *, decode_bytes: int) -> tuple[dict[str, int], int]:
    """Bytes by part, and the peak: denoising and decoding follow each other, so the larger of both counts."""
    weights = layout.spec.weight_bytes(options.itemsize)
    denoise = max((denoise_peak(layout, mode) for mode in modes), key=lambda parts: sum(parts.values()))
    text = weights["text_encoder"] if options.text_device == "model" else 0
    memory = {"weights": weights["transformer"] + weights["vae"], "text_encoder": text, **denoise}
    memory["vae_decode"] = decode_bytes
    if options.offload == "model":  # one part at a time
        peak = max(weights["transformer"] + sum(denoise.values()), text, weights["vae"] + decode_bytes)
    else:
        peak = memory["weights"] + text + max(sum(denoise.values()), decode_bytes)
    return memory, peak


def _why(p: Plan, plans: list[Plan], gpu: GpuSpec, method: str) -> str:
    """Why this plan stands where it does, against the first one or the second."""
    best = plans[0]
    if not p.fits:
        return f"needs {p.peak_bytes / GIB:.1f} GiB of {gpu.usable_gib:.1f}"
    notes = []
    if p.ulysses > 1 and max(p.heads) * p.ulysses > sum(p.heads):
        share = max(p.heads) * p.ulysses / sum(p.heads)
        notes.append(f"{sum(p.heads)} heads over {p.ulysses} ranks leave the busiest {share:.2f}x the mean of attention")
    waits = {mode: seconds["communication"] for mode, seconds in p.step_seconds.items()}
    busy = "dual" if "dual" in p.steps[method] else next(iter(p.steps[method]))
    share = waits[busy] / sum(p.step_seconds[busy].values())
    notes.append(f"messages that nothing hides take {share:.1%} of a {busy} step")
    if p is not best:
        slower = p.run_seconds[method] / best.run_seconds[method]
        return f"predicted {slower:.2f}x the time of {best.name}; " + "; ".join(notes)
    if len(plans) == 1:
        return "the only possible degrees; " + "; ".join(notes)
    after = plans[1]
    faster = after.run_seconds[method] / p.run_seconds[method]
    rival = f"{after.name} {'takes ' + format(faster, '.2f') + 'x as long' if after.fits else 'does not fit'}"
    return f"least predicted time for {method} of those that fit ({rival}); " + "; ".join(notes)
