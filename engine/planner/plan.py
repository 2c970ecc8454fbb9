"""Every way to lay a video over ranks, with its memory and predicted time, the best first."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Literal

from engine.adapters.base import DecodeMode
from engine.config import DecodeConfig, MethodConfig, RunConfig, SamplerConfig, VideoConfig
from engine.decode.tiling import tiled_share
from engine.given.frames import GivenFrames, Places
from engine.load.single_file import open_single_files
from engine.planner.cached import computed_steps
from engine.planner.gpu import GpuSpec, check_count
from engine.planner.layout import WHOLE_MODES, Degrees, Layout, lay_out
from engine.planner.memory import GIB, decode_cost, denoise_peak, encode_cost
from engine.planner.model import FP32_BYTES, ModelSpec, Stored
from engine.planner.providers import Support
from engine.planner.timing import TERA, step_seconds
from engine.ranks.layouts import refused_axes
from engine.shown import apart
from freespec.methods import METHODS, Method, Mode, make_method
from freespec.methods.base import has_rest_kernel, names_frames, names_tiers
from parallel.shards import length

OFFLOADS = ("cpu_offload", "block_offload")
MODES: tuple[Mode, ...] = ("dual", "views_global", "global", "views", "frames", "tiers", "local")
ITEMSIZES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of a run besides video, sampler and method, by their names in the configuration.

    Attributes:
        itemsize: bytes of a number in transformer and text encoder.
        storage: model.storage.
        file_bytes: bytes of each transformer that is read from a GGUF file, None for the others; empty without such a file.
        kernel: attention.kernel.
        far: attention.far.
        weights: model.weights.
        shards: model.shards.
        idle_expert: model.idle_expert.
        text_device: parallel.text_device.
        local_route: parallel.local_route.
        provider: parallel.provider.
        decode: the settings `decode`.
        compile: model.compile.
    """

    itemsize: int = 2
    storage: str = "full"
    file_bytes: tuple[int | None, ...] = ()
    kernel: str = "auto"
    far: int | str = "all"
    weights: Literal["resident", "cpu_offload", "block_offload", "zero3"] = "resident"
    shards: str = "device"
    idle_expert: Literal["auto", "stay", "leave"] = "auto"
    text_device: Literal["model", "cpu"] = "model"
    local_route: Literal["auto", "halo", "all_to_all"] = "auto"
    provider: Literal["torch", "deepspeed", "xfuser"] = "torch"
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    compile: bool = False

    @property
    def quantised(self) -> str | None:
        """What stores the transformer's weights in fewer bits; None if nothing does."""
        if self.file_bytes:
            return "a GGUF file"
        return None if self.storage == "full" else self.storage

    @property
    def timed_kernel(self) -> str:
        """The kernel whose rate counts: with `auto` xfuser takes its default, the flash-attn package."""
        return "cuda_flash" if self.provider == "xfuser" and self.kernel == "auto" else self.kernel

    def kernel_on(self, gpu: GpuSpec) -> str:
        """The kernel that is assumed on a GPU."""
        return gpu.kernel(self.timed_kernel, half=self.itemsize < FP32_BYTES)

    def missing_rate(self, gpu: GpuSpec) -> str | None:
        """Describe the missing rate of attention on a GPU; None if it is known."""
        return gpu.missing_rate(self.timed_kernel, half=self.itemsize < FP32_BYTES)

    @classmethod
    def of(cls, config: RunConfig) -> "Options":
        """Read them from a configuration; `model.dtype: auto` is bf16, as on CUDA."""
        return cls(
            itemsize=ITEMSIZES[config.model.dtype],
            storage=config.model.storage,
            kernel=config.attention.kernel,
            far=config.attention.far,
            weights=config.model.weights,
            shards=config.model.shards,
            idle_expert=config.model.idle_expert,
            text_device=config.parallel.text_device,
            local_route=config.parallel.local_route,
            provider=config.parallel.provider,
            decode=config.decode,
            compile=config.model.compile,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to lay the video over the ranks. Seconds are predicted; bytes are those of the busiest rank.

    Attributes:
        cfg: ranks along the cfg axis.
        ring: ranks along the ring axis.
        ulysses: ranks along the ulysses axis.
        tokens: tokens of each rank of one sequence.
        heads: heads of each member of the ulysses axis.
        local_route: how local steps cross the ulysses axis.
        bytes_per_step: by mode and kind.
        memory: bytes by part: weights, text_encoder, gathered (sharded or quantised layers that are whole at a time, or offloaded
            blocks that are on the GPU), latents, activations, kv_copies, with sampler.cache step_cache, vae_decode, and for a
            checkpoint of pictures vae_encode.
        peak_bytes: the most at any time.
        fits: whether that is within the GPU's usable memory.
        steps: by method that these degrees serve, how many steps of each mode the sampler's timesteps give.
        computed: those of them that the schedule of a step cache does not skip.
        step_seconds: by mode that these degrees serve, and there by what takes the time.
        run_seconds: denoising, by method.
        decode_mode: how latents become frames: whole frames on one rank, or tiles on all.
        decode_seconds: of that decoding.
        encode_seconds: of encoding the pictures without which the checkpoint makes no video.
        efficiency: by method, seconds of one GPU / (ranks x seconds of these ranks), memory of the one aside.
        idle_expert: where the idle transformer of two waits; None with one, or if model.weights decides it.
        why: the reason for this plan's place, in one sentence.
    """

    cfg: int
    ring: int
    ulysses: int
    tokens: list[int]
    heads: list[int]
    local_route: str
    bytes_per_step: dict[Mode, dict[str, int]]
    memory: dict[str, int]
    peak_bytes: int
    fits: bool
    steps: dict[str, dict[Mode, int]]
    computed: dict[str, dict[Mode, int]]
    step_seconds: dict[Mode, dict[str, float]]
    run_seconds: dict[str, float]
    decode_mode: DecodeMode
    decode_seconds: float
    efficiency: dict[str, float]
    encode_seconds: float = 0.0
    idle_expert: str | None = None
    why: str = ""

    @property
    def degrees(self) -> Degrees:
        """cfg, ring, ulysses."""
        return self.cfg, self.ring, self.ulysses

    @property
    def name(self) -> str:
        """The degrees in words."""
        return f"cfg {self.cfg} x ring {self.ring} x ulysses {self.ulysses}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A video on a number of GPUs: what `plan` and `choose` take."""

    spec: ModelSpec
    video: VideoConfig
    sampler: SamplerConfig
    method: MethodConfig
    gpu: GpuSpec
    world_size: int
    options: Options = field(default_factory=Options)
    given: GivenFrames | None = None

    @classmethod
    def of(
        cls, config: RunConfig, spec: ModelSpec, *, gpu: GpuSpec, world_size: int, given: GivenFrames | None = None
    ) -> "Case":
        """The run of a configuration, on so many of these GPUs. A GGUF file of the hub is downloaded: only it has its bytes."""
        options = Options.of(config)
        if config.model.gguf_files:
            files = open_single_files(replace(config.model, single_file=config.model.gguf_files), spec.adapter)
            by_expert = [files.get(expert) for expert in spec.experts]
            sizes = [None if file is None else file.stored_bytes(options.itemsize) for file in by_expert]
            options = replace(options, file_bytes=tuple(sizes))
        return cls(
            spec=spec,
            video=config.video,
            sampler=config.sampler,
            method=config.method,
            gpu=gpu,
            world_size=world_size,
            options=options,
            given=given,
        )

    @cached_property
    def places(self) -> Places:
        """The places of conditions without noise."""
        return self.spec.places(self.given, self.video)

    @property
    def stored(self) -> list[Stored]:
        """How the weights of each transformer are stored."""
        options = self.options
        by_file = options.file_bytes or (None,) * self.spec.num_experts
        return [Stored(itemsize=options.itemsize, storage=options.storage, file_bytes=each) for each in by_file]

    @property
    def support(self) -> Support:
        """What decides the possible degrees."""
        options = self.options
        return Support.of(
            self.spec,
            self.video,
            self.sampler,
            self.method,
            provider=options.provider,
            kernel=options.kernel,
            beside=len(self.places.moments),
        )

    def grid(self) -> tuple[int, int]:
        """Latent frames of the video and tokens per frame."""
        return self.spec.grid(self.video.num_frames, self.video.height, self.video.width)

    def layout(self, degrees: Degrees) -> Layout:
        """The video on ranks of these degrees."""
        layout = lay_out(
            self.spec,
            degrees,
            self.video,
            self.sampler,
            self.method,
            itemsize=self.options.itemsize,
            local_route=self.options.local_route,
            even=self.options.provider != "torch",
            far=self.options.far,
            given=self.places,
        )
        if self.options.weights != "zero3":
            return layout
        return replace(layout, weight_share=self.spec.weight_bytes(layout.itemsize, ranks=prod(degrees))["transformer"])

    @cached_property
    def decode_cost(self) -> tuple[DecodeMode, int, int]:
        """Mode, peak bytes and operations of decoding on the busiest GPU: the most exact mode that fits beside the weights.

        Whole frames are decoded by one GPU, tiles by all. If none fits, the mode that needs least.
        """
        adapter, decode, video = self.spec.adapter, self.options.decode, self.video
        whole: list[DecodeMode] = [mode for mode in adapter.decode_modes if mode != "tiled"]
        size = self.spec.video.latent_shape(video.num_frames, video.height, video.width)[2:]
        kept = self.kept_weights(self.world_size)
        offloads = self.options.weights in OFFLOADS
        weights = kept["vae"] if offloads else sum(kept.values())
        costs: list[tuple[DecodeMode, int, int]] = []
        for mode in [decode.mode] if decode.mode in whole else whole:
            num_bytes, ops = decode_cost(self.spec, video.height, video.width, size[0], mode=mode, decode=decode)
            costs.append((mode, num_bytes, ops))
            if decode.mode != "tiled" and self.fits(weights + num_bytes):
                return costs[-1]
        if decode.mode not in whole:
            tiled = tiled_share(decode, self.spec.vae, size, world_size=self.world_size)
            if tiled is not None:
                costs.append(("tiled", tiled[0], round(tiled[1] * costs[-1][2])))
                if decode.mode == "tiled":
                    return costs[-1]
        return min(costs, key=lambda cost: cost[1])

    @cached_property
    def encode_cost(self) -> tuple[int, int]:
        """Peak bytes and operations of encoding the pictures that the checkpoint needs, on the first GPU."""
        return encode_cost(self.spec, self.video.num_frames, self.video.height, self.video.width)

    @property
    def methods(self) -> dict[str, Method]:
        """The methods to predict: the planned one with its settings, the others with defaults.

        Those with a slower kernel or with tiers are left out, and of the others that name their frames all but LVSA beside a method that
        names none, as a layout counts the frames of one method.
        """
        own = self.method.method
        others = {name: make_method(name) for name in METHODS}
        known = {
            name: made
            for name, made in others.items()
            if not has_rest_kernel(made)
            and not names_tiers(made)
            and (not names_frames(made) or (name == "lvsa" and not names_frames(own)))
        }
        return known | {self.method.name: self.method.method}

    def count_steps(self, *, computed: bool = False) -> dict[str, dict[Mode, int]]:
        """Count the steps of each mode of every method on the sampler's real timesteps; `computed`: without those that a cache's schedule skips."""
        video = self.video
        *_, frames, rows, columns = self.spec.video.latent_shape(video.num_frames, video.height, video.width)
        timesteps = self.spec.timesteps(self.sampler, (frames, rows, columns), window_frames=self.method.window_frames)
        experts = [self.spec.adapter.expert_at(timestep, self.spec.configs["model_index"]) for timestep in timesteps]
        native = self.grid()[0] <= self.method.window_frames  # where the engine runs the stock model
        counted = {}
        for name, made in self.methods.items():
            modes: list[Mode] = ["global"] * len(timesteps) if native else [step.mode for step in made.plan(timesteps)]
            counts = computed_steps(self.sampler, experts, modes) if computed else [True] * len(modes)
            counted[name] = dict(Counter(mode for mode, count in zip(modes, counts, strict=True) if count))
        return counted

    @property
    def modes(self) -> list[Mode]:
        """The modes of the method's steps."""
        steps = self.count_steps()[self.method.name]
        return [mode for mode in MODES if mode in steps]

    @property
    def idle_expert(self) -> str | None:
        """Where the idle transformer of two waits, if `model.idle_expert` decides it: `auto` until `placed` has."""
        return self.options.idle_expert if self.spec.num_experts > 1 and self.options.weights == "resident" else None

    def placed(self, degrees: Degrees, modes: Sequence[Mode]) -> "Case":
        """The case with a place for the idle transformer of two: the GPU if it fits there, otherwise the CPU."""
        if self.idle_expert != "auto":
            return self
        stays, leaves = self._both_places
        return stays if stays.holds(degrees, modes) else leaves

    @cached_property
    def _both_places(self) -> tuple["Case", "Case"]:
        stays, leaves = (replace(self.options, idle_expert=place) for place in ("stay", "leave"))
        return replace(self, options=stays), replace(self, options=leaves)

    def kept_weights(self, ranks: int) -> dict[str, int]:
        """Bytes of each part that stay on the busiest GPU: whole parts, or with zero3 its shares, if they stay on GPUs.

        Of two transformers both, or the larger one if the idle one leaves. With block_offload what is outside the blocks, while the part
        runs.
        """
        options = self.options
        shared = options.weights == "zero3"
        every = [
            self.spec.weight_bytes(options.itemsize, ranks=ranks if shared else 1, stored=None if shared else stored)
            for stored in self.stored
        ]
        kept, both = every[0], shared or self.idle_expert == "stay"
        kept["transformer"] = (sum if both else max)(each["transformer"] for each in every)
        if options.weights == "block_offload":
            kept |= {part: outside for part, (outside, _) in self._offloaded.items()}
        if shared and options.shards != "device":
            kept |= {"transformer": 0, "text_encoder": 0}
        return kept if options.text_device == "model" else kept | {"text_encoder": 0}

    def gathered(self) -> dict[str, int]:
        """Bytes of transformer and text encoder that are on the GPU for as long as a layer runs.

        What zero3 gathers, the blocks of block_offload, and of a quantised transformer the layer that is made whole.
        """
        options, gathered = self.options, {"transformer": 0, "text_encoder": 0}
        if options.weights == "zero3":
            gathered = self.spec.gathered_bytes(options.itemsize)
        if options.weights == "block_offload":
            gathered = {part: blocks for part, (_, blocks) in self._offloaded.items()}
        gathered["transformer"] += max(map(self.spec.whole_bytes, self.stored))
        return gathered if options.text_device == "model" else gathered | {"text_encoder": 0}

    @property
    def _offloaded(self) -> dict[str, tuple[int, int]]:
        """`ModelSpec.offloaded_bytes` of the largest transformer."""
        return max(map(self.spec.offloaded_bytes, self.stored), key=lambda part: part["transformer"])

    def memory(self, degrees: Degrees, modes: Sequence[Mode]) -> tuple[dict[str, int], int]:
        """Bytes by part, and the peak: text, pictures, denoising and decoding follow each other, so the largest of them counts."""
        if self.idle_expert == "auto":
            return self.placed(degrees, modes).memory(degrees, modes)
        weights, gathered, denoise = self.kept_weights(prod(degrees)), self.gathered(), self._denoising(degrees, modes)
        decoding, encoding = self.decode_cost[1], self.encode_cost[0]
        memory = {"weights": weights["transformer"] + weights["vae"], "text_encoder": weights["text_encoder"]}
        memory |= {"gathered": max(gathered.values()), **denoise, "vae_decode": decoding}
        memory |= {"vae_encode": encoding} if encoding else {}
        return memory, self._peak(weights, gathered, sum(denoise.values()), max(decoding, encoding))

    def holds(self, degrees: Degrees, modes: Sequence[Mode]) -> bool:
        """Whether the peak of `memory` fits, which most cases that do not fit show without a count of denoising or decoding."""
        if self.idle_expert == "auto":
            return self.placed(degrees, modes).holds(degrees, modes)
        weights, gathered = self.kept_weights(prod(degrees)), self.gathered()
        if not self.fits(self._peak(weights, gathered, 0, 0)):
            return False
        denoise = sum(self._denoising(degrees, modes).values())
        if not self.fits(self._peak(weights, gathered, denoise, 0)):
            return False
        return self.fits(self._peak(weights, gathered, denoise, max(self.decode_cost[1], self.encode_cost[0])))

    def _denoising(self, degrees: Degrees, modes: Sequence[Mode]) -> dict[str, int]:
        layout = self.layout(degrees)
        return max((denoise_peak(layout, mode) for mode in modes), key=lambda parts: sum(parts.values()))

    def _peak(self, weights: dict[str, int], gathered: dict[str, int], denoise: int, coding: int) -> int:
        """The peak with these bytes of denoising, and of decoding or encoding."""
        denoising, text = gathered["transformer"] + denoise, weights["text_encoder"]
        if self.options.weights == "cpu_offload":  # one part at a time
            return max(weights["transformer"] + denoising, text, weights["vae"] + coding)
        if self.options.weights == "block_offload":
            reading = text + gathered["text_encoder"]
            return weights["vae"] + max(weights["transformer"] + denoising, reading, coding)
        return sum(weights.values()) + max(denoising, coding, gathered["text_encoder"])

    def fits(self, num_bytes: int) -> bool:
        """Whether this many bytes fit the GPU."""
        return num_bytes <= self.gpu.usable_gib * GIB


def plan(case: Case) -> list[Plan]:
    """Every feasible (cfg, ring, ulysses) of the case's ranks, best first: those that fit, by predicted seconds.

    Raises UserError for a video that the model cannot make and for a number of ranks that no degrees reach.
    """
    video, name = case.video, case.method.name
    case.spec.video.check_video(video.num_frames, video.height, video.width)
    check_count(case.world_size)
    every = case.support.possible(case.world_size)
    steps, alone = case.count_steps(), _seconds(case, case.layout((1, 1, 1)))
    computed = case.count_steps(computed=True)
    plans = [_make_plan(case, degrees, steps=steps, computed=computed, alone=alone) for degrees in every]
    plans.sort(key=lambda p: (not p.fits, p.run_seconds[name], p.peak_bytes))
    return [replace(p, why=_why(p, plans, case)) for p in plans]


def _seconds(case: Case, layout: Layout) -> dict[Mode, dict[str, float]]:
    return {mode: step_seconds(layout, mode, case.gpu, case.options.timed_kernel) for mode in _modes_of(layout)}


def _modes_of(layout: Layout) -> list[Mode]:
    """The modes that these degrees support: attention inside views, to frames of a method's choice, or in tiers needs ring 1."""
    modes = [mode for mode in MODES if mode not in WHOLE_MODES or layout.degrees[1] == 1]
    return [mode for mode in modes if mode != "tiers" or layout.tier_tokens > 0]


def _run_seconds(steps: dict[Mode, int], seconds: dict[Mode, dict[str, float]]) -> float:
    return sum(count * sum(seconds[mode].values()) for mode, count in steps.items())


def _make_plan(
    case: Case,
    degrees: Degrees,
    *,
    steps: dict[str, dict[Mode, int]],
    computed: dict[str, dict[Mode, int]],
    alone: dict[Mode, dict[str, float]],
) -> Plan:
    layout = case.layout(degrees)
    seconds = _seconds(case, layout)
    cfg, ring, ulysses = degrees
    served = {name for name, made in case.methods.items() if not refused_axes(made.refused_axes, degrees)}
    steps, computed = ({name: each[name] for name in each if name in served} for each in (steps, computed))
    modes = [mode for mode in MODES if mode in steps[case.method.name]]
    case = case.placed(degrees, modes)
    memory, peak = case.memory(degrees, modes)
    runs = {name: _run_seconds(counts, seconds) for name, counts in computed.items()}
    return Plan(
        cfg=cfg,
        ring=ring,
        ulysses=ulysses,
        tokens=[length(shard) for shard in layout.sequence.shards],
        heads=[length(share) for share in layout.sequence.head_shares],
        local_route=layout.local_route,
        bytes_per_step={mode: layout.step_bytes(mode) for mode in seconds},
        memory=memory,
        peak_bytes=peak,
        fits=case.fits(peak),
        steps=steps,
        computed=computed,
        step_seconds=seconds,
        run_seconds=runs,
        decode_mode=case.decode_cost[0],
        decode_seconds=case.decode_cost[2] / (case.gpu.tf32_tflops * TERA * case.gpu.conv_fraction),
        encode_seconds=case.encode_cost[1] / (case.gpu.tf32_tflops * TERA * case.gpu.conv_fraction),
        idle_expert=case.idle_expert,
        efficiency={name: _run_seconds(computed[name], alone) / (case.world_size * runs[name]) for name in computed},
    )


def _why(p: Plan, plans: list[Plan], case: Case) -> str:
    """Describe why this plan has its place, compared with the first or the second."""
    best, method = plans[0], case.method.name
    if not p.fits:
        need, have = apart(p.peak_bytes, case.gpu.usable_gib * GIB)
        return f"needs {need} GiB of {have}"
    notes = _notes(p, next(mode for mode in MODES if mode in p.steps[method]), case)
    if p is not best:
        return f"predicted {p.run_seconds[method] / best.run_seconds[method]:.2f}x the time of {best.name}; {notes}"
    if len(plans) == 1:
        return "the only possible degrees" + (f"; {notes}" if case.world_size > 1 else "")
    after = plans[1]
    takes = f"takes {after.run_seconds[method] / p.run_seconds[method]:.2f}x as long" if after.fits else "does not fit"
    return f"least predicted time for {method} of those that fit ({after.name} {takes}); {notes}"


def _notes(p: Plan, mode: Mode, case: Case) -> str:
    """Describe the cost of the degrees (uneven heads, messages of a step of this mode) and what is not predicted."""
    options = case.options
    seconds = p.step_seconds[mode]
    share = seconds["communication"] / sum(seconds.values())
    note = f"messages that nothing hides take {share:.1%} of a {mode} step"
    if has_rest_kernel(case.method.method):
        note += f"; the keys outside the windows take {case.method.name} longer than this kernel's rate, which is what is predicted"
    if options.shards != "device":
        note += f"; what reading the shares from {options.shards.partition(':')[0]} takes is not predicted"
    uneven = max(p.heads) * p.ulysses / sum(p.heads)
    if uneven > 1:
        note += f"; {sum(p.heads)} heads over {p.ulysses} ranks give the busiest {uneven:.2f}x the mean of attention"
    return note
