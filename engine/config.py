"""The configuration of a run: one tree of frozen dataclasses, filled from a YAML preset and dotted overrides."""

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, Literal

from engine.errors import UserError, as_user_error
from engine.paths import is_pickle
from freespec.far_keys import check_far, parse_far
from freespec.kernel_names import COMPLEMENTS, DUALS, NAMES
from freespec.methods import (
    LVSA,
    METHODS,
    SPLIT_BEFORE,
    FreeLOC,
    FreeLong,
    FreeLongPP,
    FreeNoise,
    FreePCA,
    FreeSpec,
    Method,
    Noise,
    UltraViCo,
    describe_split,
    find_method,
    make_method,
)
from freespec.methods.base import check_rest_kernel
from freespec.riflex import Riflex
from freespec.windows import default_stride

# Larger numbers are typing errors; a library would fail on them, or memory run out, after everything is loaded.
MOST_FRAMES = 1_000_000
MOST_SIDE = 16_384
MOST_FPS = 1000
VideoKind = Literal["mp4", "gif", "webp", "png"]
VIDEO_KINDS: dict[str, VideoKind] = {".mp4": "mp4", ".gif": "gif", ".webp": "webp", "": "png"}
"""Output format by file ending; `png` is a folder of frames."""

ANY_FRAME = "any"
"""Among the places at which a checkpoint was trained for pictures: every frame of the video."""

# By the ending of a video. Browsers show frames of 10 ms or less for 100 ms; GIF counts in hundredths of a second.
MOST_RATES = {".mp4": MOST_FPS, ".gif": 50, ".webp": 90}
MOST_STEPS = 10_000
DEFAULT_STEPS = 50
MOST_TIMESTEP = 1000.0  # pure noise
# A run begins at pure noise, timestep 1000; lists of timesteps begin there, or a rounding below.
LEAST_FIRST_LEVEL = 0.9
MOST_TOKENS = 65_536
# Settings that each step cache reads, with diffusers' defaults; the ratios of `mag` have none.
CACHE_DEFAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "first_block": {"threshold": 0.05},
    "mag": {"threshold": 0.06, "ratios": None},
    "taylorseer": {"interval": 5},
}
# Timeout of a collective, in seconds. Some backends count milliseconds in 32 bits, which overflow after 24 days.
MOST_TIMEOUT = 7 * 24 * 3600
CACHED_TRACE = "skips layers, which have no branches for a trace (output.trace, analyze.py)"
# `high:` or `low:` where `split_expert` has not read it: in capitals, twice, or in a list or map that YAML reads otherwise.
_UNREAD_SIDE = re.compile(r"(?:^|[\[{,])\s*(?:high|low)\s*:", re.IGNORECASE)
COMPILED_TRACE = "with model.compile, blocks do not expose branches for a trace (output.trace, analyze.py)"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The checkpoint to load, and how to load it.

    Attributes:
        path: folder in Diffusers layout (relative to the working directory, then to the repository) or a hub name.
        revision: branch, tag or commit of a hub name; None takes the default branch.
        offline: never contact the hub; files missing from the local cache are an error.
        single_file: a .safetensors file in the authors' layout, local or on the hub (ORGANISATION/NAME/FILE), that replaces the
            transformer (LTX-Video: and the VAE) of `path`; configurations stay those of `path`. Or a .gguf file with a
            quantised transformer (pip install '.[gguf]'). With two transformers [high:FILE, low:FILE], for that of the noisy steps
            and for the other, or one of them.
        loras: LoRAs that are fused into the transformer's weights at load, each NAME@SCALE (1 without @SCALE): a
            .safetensors file or a folder with one, local or on the hub (ORGANISATION/NAME/FILE, or ORGANISATION/NAME with
            pytorch_lora_weights.safetensors). With two transformers high:NAME@SCALE is for that of the noisy
            steps, low:NAME@SCALE for the other.
        dtype: of transformer and text encoder: `auto` is bfloat16 on CUDA and float32 on CPU; the VAE is always float32.
        storage: how the transformer's weights are stored: `full` as `dtype`; `fp8` as float8_e4m3, each layer cast to `dtype` while it
            runs; `torchao_int8` and `torchao_fp8` as 8 bits with a scale for each row (pip install '.[torchao]'). LoRAs are fused
            before. Not with zero3, compile or a .gguf file.
        device: `auto` is CUDA if available.
        weights: where they are kept. `resident`: whole, on the device of every rank. `cpu_offload`: each part on the CPU until
            it is used, then whole on the device (CUDA only). `block_offload`: each block of the transformer on the CPU until it
            runs, with the next one prefetched; the text encoder likewise, one block at a time (CUDA only). `zero3`: transformer and
            text encoder sharded over the ranks by DeepSpeed's ZeRO-3 (pip install '.[deepspeed]'); a layer is gathered while it
            runs.
        shards: where a rank keeps its share with `zero3`: `device`, `cpu`, or `nvme:FOLDER`, a file on a fast drive.
        idle_expert: place of the idle one of two transformers (Wan2.2 A14B) with `resident` weights: `stay` on the device, `leave` to
            the CPU until its steps, or `auto`: leave if the video would not fit on a GPU of configs/gpus otherwise. With
            `cpu_offload` and `block_offload` it always leaves, with `zero3` its shares stay.
        compile: compile the transformer's blocks with torch.compile, once per kind of step; the first step of a kind waits for it.
            Not with zero3 or output.trace.
    """

    path: str
    revision: str | None = None
    offline: bool = False
    single_file: str | tuple[str, ...] | None = None
    loras: tuple[str, ...] = ()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    storage: Literal["full", "fp8", "torchao_int8", "torchao_fp8"] = "full"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    weights: Literal["resident", "cpu_offload", "block_offload", "zero3"] = "resident"
    shards: str = "device"
    idle_expert: Literal["auto", "stay", "leave"] = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        """Reject unknown places, shards without sharding, and weight files that can run code."""
        self._check_single_files()
        self._check_quantised()
        for lora in self.loras:
            name, scale = split_scale(split_expert(lora)[1])
            _check(name != "", f"model.loras names no file in {lora!r}; give NAME or NAME@SCALE")
            _check(
                not is_pickle(name),
                f"the LoRA {name} is a pickle, which can run code and is not read; give a .safetensors file",
            )
            _check(
                math.isfinite(scale) and scale != 0,
                f"the scale of the LoRA {lora} must be a finite number other than 0",
            )
        names = [split_scale(lora)[0] for lora in self.loras]
        _check(len(set(names)) == len(names), f"model.loras names a LoRA twice ({', '.join(names)}); add their scales")
        _check(
            self.shards in ("device", "cpu") or (self.shards_folder is not None and self.shards != "nvme:"),
            f"model.shards must be device, cpu or nvme:FOLDER, got {self.shards!r}",
        )
        _check(
            self.shards == "device" or self.weights == "zero3",
            f"model.shards {self.shards} requires model.weights zero3, and model.weights is {self.weights}",
        )
        _check(
            self.idle_expert == "auto" or self.weights == "resident",
            f"model.idle_expert {self.idle_expert} requires model.weights resident, and model.weights is {self.weights}; leave it out",
        )
        _check(
            not self.compile or self.weights not in ("zero3", "block_offload"),
            f"model.compile cannot compile layers that model.weights {self.weights} brings while they run; use resident or cpu_offload",
        )

    def _check_single_files(self) -> None:
        """Reject files that are not read, and more of them than there are transformers."""
        _check(self.single_file != (), "model.single_file names no file; give one, or leave it out (null)")
        given = dict(split_expert(file) for file in self.single_files)
        listed = self.single_file if isinstance(self.single_file, str) else f"[{', '.join(self.single_file or ())}]"
        takes = f"model.single_file takes one file, or [high:FILE, low:FILE] for two transformers, got {listed}"
        for name in given.values():
            _check(
                _UNREAD_SIDE.search(name) is None,
                f"{takes}; write high: and low: in lower case, once for each file, with no space after them, and both in brackets",
            )
            _check(
                not is_pickle(name),
                f"model.single_file {name} is a pickle, which can run code and is not read; give a .safetensors file",
            )
            _check(
                name.endswith((".safetensors", ".gguf")),
                f"model.single_file must be a .safetensors or a .gguf file, got {name!r}",
            )
        _check(
            len(self.single_files) < 2 or (len(self.single_files) == 2 and None not in given and len(given) == 2), takes
        )
        _check(
            len({*given.values()}) == len(given),
            f"model.single_file has one file for both transformers, {listed}; each has its own weights, give two files",
        )

    def _check_quantised(self) -> None:
        """Reject settings that quantised weights exclude."""
        quantised = f"model.storage {self.storage}"
        if self.gguf_files:
            files = " and ".join(split_expert(file)[1] for file in self.gguf_files)
            _check(self.storage == "full", f"{quantised} would quantise {files} again; leave one of the two out")
            _check(
                not self.loras,
                f"LoRAs are added to the weights, and those of {files} are quantised; leave model.loras out, or take the "
                "transformer in bf16 (with model.storage fp8 if memory is short)",
            )
            quantised = f"the GGUF file {files}"
        elif self.storage == "full":
            return
        _check(
            self.weights != "zero3",
            f"model.weights zero3 shards plain tensors of one dtype, and the weights of {quantised} are stored otherwise; use resident, cpu_offload or block_offload",
        )
        _check(
            not self.compile,
            f"model.compile was not tried with {quantised}, whose layers change their weights as they run; switch it off",
        )

    @property
    def single_files(self) -> tuple[str, ...]:
        """The files of `single_file`: FILE, or high:FILE and low:FILE, in this order, or one of these."""
        return (self.single_file,) if isinstance(self.single_file, str) else tuple(sorted(self.single_file or ()))

    @property
    def gguf_files(self) -> tuple[str, ...]:
        """Those of them whose weights are quantised."""
        return tuple(file for file in self.single_files if file.endswith(".gguf"))

    @property
    def shards_folder(self) -> str | None:
        """The folder of `nvme:FOLDER`."""
        kind, colon, folder = self.shards.partition(":")
        return folder if colon and kind == "nvme" else None


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """The video that is made.

    Attributes:
        num_frames: frames of the video, 4k + 1 for Wan and 8k + 1 for LTX-Video.
        height: pixels, a multiple of 16 for Wan, of 32 for LTX-Video.
        width: pixels, likewise.
        fps: frames per second of the file, at most 1000.
    """

    num_frames: int
    height: int
    width: int
    fps: int = 16

    def __post_init__(self) -> None:
        """Reject sizes that no model supports; checks that depend on the model run once it is loaded."""
        for name, most in (("num_frames", MOST_FRAMES), ("fps", MOST_FPS), ("height", MOST_SIDE), ("width", MOST_SIDE)):
            value = getattr(self, name)
            _check(1 <= value <= most, f"video.{name} must lie in [1, {most}], got {_short(value)}")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How noise becomes latents.

    Attributes:
        num_steps: denoising steps; null is 50, or as many as `timesteps` or `sigmas` has.
        scheduler: `checkpoint` is the checkpoint's own; `euler`, `unipc` and `lcm` are diffusers' FlowMatchEuler, UniPC with flow
            prediction and FlowMatchLCM (which draws noise in each step), with the checkpoint's timestep shift.
        timesteps: those of the steps one by one, 1000 for pure noise, as the model sees them: no shift applies. The last step
            ends without noise.
        sigmas: the same as noise levels, timestep / 1000.
        guidance_scale: classifier-free guidance; 1 or less runs no unconditional pass.
        guidance_scale_2: that of the second of two transformers (Wan2.2 A14B); null takes guidance_scale.
        flow_shift: timestep shift of the scheduler; None keeps the checkpoint's.
        shift: for schedulers whose shift grows with the number of tokens (LTX-Video to 0.9.1): `native` uses that of the native
            length, method.window_frames, for longer videos; `actual` uses the video's own, as the stock pipeline does.
            Others, like Wan's, have one shift for any length.
        seed: of the CPU generator that draws the noise, the same for any device and number of ranks.
        negative_prompt: text of the unconditional pass; on the command line and in presets `@FILE` is the one line of a text file.
        max_text_tokens: tokens that a prompt is padded to; a longer prompt is an error.
        noise: `iid` is independent in every frame, `freenoise` repeats the frames of the first window in shuffled order, `mean_reuse`
            repeats their mean over time; `method` is the method's published noise (iid for direct, sliding_window and freespec,
            freenoise for freenoise and freelong, mean_reuse for freepca).
        noise_stride: latent frames that `freenoise` shuffles at a time; None is the stride of the method's noise
            (method.freenoise.stride) if it has one and `noise` is `method`, else a quarter of the window.
        cache: reuse of earlier steps by diffusers' caches: `none`; `first_block` skips the other blocks where the first one changes
            little; `mag` skips steps by `cache_ratios`; `taylorseer` computes every `cache_interval`-th step and extrapolates the
            others. Not with compile, zero3, block_offload or output.trace.
        cache_threshold: largest relative change of the first block's residual (first_block), or largest accumulated error (mag), at
            which a step is skipped; null is diffusers' 0.05 and 0.06.
        cache_interval: steps from one computed step to the next of `taylorseer`; null is diffusers' 5.
        cache_ratios: for `mag`, the magnitude of each step's residual over that of the step before, measured on the model
            (`python -m benchmarks.caches --ratios`); fewer than the steps are spread over them, nearest first.
    """

    num_steps: int | None = None
    scheduler: Literal["checkpoint", "euler", "unipc", "lcm"] = "checkpoint"
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    guidance_scale: float = 5.0
    guidance_scale_2: float | None = None
    flow_shift: float | None = None
    shift: Literal["native", "actual"] = "native"
    seed: int = 0
    negative_prompt: str = ""
    max_text_tokens: int = 512
    noise: Literal["method", "iid", "freenoise", "mean_reuse"] = "method"
    noise_stride: int | None = None
    cache: Literal["none", "first_block", "mag", "taylorseer"] = "none"
    cache_threshold: float | None = None
    cache_interval: int | None = None
    cache_ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Reject settings that would not denoise, or denoise wrongly."""
        self._check_levels()
        self._check_cache()
        for name, value, most in (
            ("num_steps", self.steps, MOST_STEPS),
            ("max_text_tokens", self.max_text_tokens, MOST_TOKENS),
        ):
            _check(1 <= value <= most, f"sampler.{name} must lie in [1, {most}], got {_short(value)}")
        _check(math.isfinite(self.guidance_scale), f"sampler.guidance_scale must be finite, got {self.guidance_scale}")
        second = self.guidance_scale_2
        _check(second is None or math.isfinite(second), f"sampler.guidance_scale_2 must be finite, got {second}")
        _check(
            second is None or self.guidance_scale > 1.0,
            f"sampler.guidance_scale_2 {second} has no effect: with sampler.guidance_scale {self.guidance_scale:g} there is no "
            "unconditional pass; leave it out (null)",
        )
        _check(
            self.flow_shift is None or (math.isfinite(self.flow_shift) and self.flow_shift > 0),
            f"sampler.flow_shift must be more than 0, got {self.flow_shift}",
        )
        _check(0 <= self.seed < 2**63, f"sampler.seed must lie in [0, 2**63), got {self.seed}")
        _check(
            self.noise_stride is None or self.noise_stride >= 1,
            f"sampler.noise_stride must be 1 or more frames, got {self.noise_stride}",
        )
        # With `method` the method decides whether there is a stride, and one command may run several methods.
        _check(
            self.noise_stride is None or self.noise in ("method", "freenoise"),
            f"sampler.noise_stride {self.noise_stride} requires sampler.noise freenoise, and sampler.noise is {self.noise}; "
            "leave it out",
        )

    @property
    def cache_settings(self) -> dict[str, Any]:
        """The settings that `cache` reads, by field, with its defaults: what records and ids have of them."""
        given = {f"cache_{name}": default for name, default in CACHE_DEFAULTS[self.cache].items()}
        return {
            name: default if getattr(self, name) is None else getattr(self, name) for name, default in given.items()
        }

    @property
    def steps(self) -> int:
        """The number of steps; in a `RunConfig` also `num_steps`."""
        if self.num_steps is not None:
            return self.num_steps
        return DEFAULT_STEPS if self.levels is None else len(self.levels)

    @property
    def guidance(self) -> tuple[float, float]:
        """The guidance scales of the first and of the second transformer."""
        return self.guidance_scale, self.guidance_scale if self.guidance_scale_2 is None else self.guidance_scale_2

    def check_cfg(self, cfg: int | None) -> None:
        """Raise UserError for more ranks along the cfg axis than there are passes."""
        _check(
            cfg in (None, 1) or self.guidance_scale > 1.0,
            f"parallel.cfg is {cfg}, but sampler.guidance_scale {self.guidance_scale} runs one pass only; use parallel.cfg 1",
        )

    @property
    def levels(self) -> tuple[float, ...] | None:
        """The noise level at which each step begins, 1 for pure noise; None if the scheduler chooses them."""
        return self.sigmas if self.timesteps is None else tuple(t / MOST_TIMESTEP for t in self.timesteps)

    def _check_cache(self) -> None:
        """Reject settings that the cache does not read, or would read wrongly."""
        read = CACHE_DEFAULTS[self.cache]
        for name in ("threshold", "interval", "ratios"):
            readers = ", ".join(kind for kind, names in CACHE_DEFAULTS.items() if name in names)
            _check(
                getattr(self, f"cache_{name}") is None or name in read,
                f"sampler.cache_{name} is for sampler.cache {readers}, and sampler.cache is {self.cache}; leave it out (null)",
            )
        threshold, interval, ratios = self.cache_threshold, self.cache_interval, self.cache_ratios
        _check(
            threshold is None or (math.isfinite(threshold) and threshold > 0),
            f"sampler.cache_threshold must be more than 0, got {threshold}",
        )
        _check(interval is None or interval >= 2, f"sampler.cache_interval must be 2 or more steps, got {interval}")
        _check(
            self.cache != "mag" or bool(ratios),
            "sampler.cache mag needs sampler.cache_ratios, which depend on the checkpoint; measure them with "
            "python -m benchmarks.caches --ratios",
        )
        _check(
            not ratios or len(ratios) <= self.steps,
            f"sampler.cache_ratios has {len(ratios or ())} ratios for {self.steps} steps; give one ratio for each step, or fewer",
        )
        wrong = next((value for value in ratios or () if not (math.isfinite(value) and value > 0)), None)
        _check(wrong is None, f"sampler.cache_ratios must be more than 0, got {wrong}")

    def _check_levels(self) -> None:
        """Reject timesteps that do not run from noise to a video, and settings that have no effect on them."""
        name, most = ("sigmas", 1.0) if self.timesteps is None else ("timesteps", MOST_TIMESTEP)
        given = getattr(self, name)
        if given is None:
            return
        what = f"sampler.{name}"
        _check(
            self.timesteps is None or self.sigmas is None,
            "sampler.timesteps and sampler.sigmas are alternatives; give one",
        )
        _check(1 <= len(given) <= MOST_STEPS, f"{what} must name 1 to {MOST_STEPS} steps, got {len(given)}")
        wrong = next((value for value in given if not 0 < value <= most), None)  # NaN is in no range
        end = ", without the final 0" if wrong == 0 else ""
        _check(wrong is None, f"{what} must lie in (0, {most:g}], got {wrong}{end}")
        _check(
            given[0] >= LEAST_FIRST_LEVEL * most,
            f"{what} must begin at {most:g}, pure noise, or close to it ({LEAST_FIRST_LEVEL * most:g}), got {given[0]:g}",
        )
        up = next((i for i in range(1, len(given)) if given[i] >= given[i - 1]), 0)
        _check(up == 0, f"{what} must fall from step to step, and {given[up - 1]:g} is followed by {given[up]:g}")
        _check(
            self.num_steps in (None, len(given)),
            f"sampler.num_steps is {self.num_steps} and {what} are {len(given)}; leave num_steps out (null)",
        )
        _check(
            self.flow_shift is None,
            f"sampler.flow_shift {self.flow_shift} has no effect on {what}, which are used as given; leave it out (null)",
        )
        _check(
            self.shift == "native",
            f"sampler.shift {self.shift} has no effect on {what}; leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The method for long videos.

    Attributes:
        name: direct, sliding_window, freenoise, freelong, freelong_pp, freepca, ultravico, lvsa, freeloc or freespec, or a class of your own as package.module:Class.
        window_frames: latent frames that the local branch sees: the native length of the model.
        freenoise: settings of `freenoise`, read by that method only.
        freelong: settings of `freelong`, read by that method only.
        freelong_pp: settings of `freelong_pp`, read by that method only.
        freepca: settings of `freepca`, read by that method only.
        ultravico: settings of `ultravico`, read by that method only.
        lvsa: settings of `lvsa`, read by that method only.
        freeloc: settings of `freeloc`, read by that method only.
        freespec: settings of `freespec`, read by that method only.
        settings: settings of a class of your own, by name.
    """

    name: str = "freespec"
    window_frames: int
    freenoise: FreeNoise = field(default_factory=FreeNoise)
    freelong: FreeLong = field(default_factory=FreeLong)
    freelong_pp: FreeLongPP = field(default_factory=FreeLongPP)
    freepca: FreePCA = field(default_factory=FreePCA)
    ultravico: UltraViCo = field(default_factory=UltraViCo)
    lvsa: LVSA = field(default_factory=LVSA)
    freeloc: FreeLOC = field(default_factory=FreeLOC)
    freespec: FreeSpec = field(default_factory=FreeSpec)
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Reject unknown names, empty windows and unused settings."""
        _check(self.window_frames >= 1, f"method.window_frames must be 1 or more, got {self.window_frames}")
        find_method(self.name)  # raises, naming the nearest
        if self.name in METHODS:
            where = f"are method.{self.name}.*" if self.name in self._groups else "are none"
            _check(not self.settings, f"method.settings are for a class of your own; those of {self.name} {where}")
        else:
            _check_plain(self.settings)
            make_method(self.name, **self.settings)  # raises for settings that the class does not know or take
        self.method.check_window(self.window_frames)

    @property
    def method(self) -> Method:
        """The method object that this configuration describes."""
        group = self._groups.get(self.name)
        return make_method(self.name, **self.settings) if group is None else group

    @property
    def _groups(self) -> dict[str, Method]:
        return {
            "freenoise": self.freenoise,
            "freelong": self.freelong,
            "freelong_pp": self.freelong_pp,
            "freepca": self.freepca,
            "ultravico": self.ultravico,
            "lvsa": self.lvsa,
            "freeloc": self.freeloc,
            "freespec": self.freespec,
        }


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The dense attention kernel, and rotary positions.

    Attributes:
        kernel: auto, plain, cpu_flash, cuda_flash, cuda_cudnn, cuda_efficient or cuda_fa3; one that cannot run is an error.
            `auto` is the fastest on CUDA in half precision, measured at the video's shape when an engine starts; the record has the
            choice and all times.
        dual: how dual steps compute both branches: `strided`, dense calls of the kernel on views; `triton`, one kernel for
            window and other keys; `auto` is strided, until triton is measured to be faster.
        complement: kernel for the keys outside the windows in dual steps: the `same` one, or `sage`, SageAttention in
            int8 (CUDA, the package sageattention 2). The local branch and global steps are never quantised.
        far: number of keys outside the windows that dual steps attend to: `all`, a share of each frame such as `1/8`, or a total
            such as 4096, spread evenly over the frames outside the window.
        riflex: RIFLEx, which lowers one temporal frequency of the rotary table for long videos; off by default.
    """

    kernel: str = "auto"
    dual: str = "auto"
    complement: str = "same"
    far: int | str = "all"
    riflex: Riflex = field(default_factory=Riflex)

    def __post_init__(self) -> None:
        """Reject unknown names before anything is loaded."""
        names = ("auto", *NAMES)
        _check(self.kernel in names, f"unknown attention.kernel {self.kernel!r}; choose one of {', '.join(names)}")
        duals = ("auto", *DUALS)
        _check(self.dual in duals, f"unknown attention.dual {self.dual!r}; choose one of {', '.join(duals)}")
        _check(
            self.complement in COMPLEMENTS,
            f"unknown attention.complement {self.complement!r}; choose one of {', '.join(COMPLEMENTS)}",
        )
        parse_far(self.far)  # raises


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks share one video; their number is the product of the three degrees.

    Attributes:
        plan: `auto` lets the planner choose degrees that are null, `manual` requires all three.
        cfg: 2 runs the conditional and the unconditional pass on one half of the ranks each; null lets the planner choose.
        ring: ranks over which the tokens stay split inside attention; null lets the planner choose.
        ulysses: ranks over which attention splits the heads; null lets the planner choose.
        local_route: how local steps cross the ulysses axis: `halo`, `all_to_all`, or `auto` for fewer bytes.
        provider: library for the all-to-all: `torch`, or `deepspeed` (even shards and heads only); `xfuser` computes the whole
            attention of the method direct with xDiT's hybrid attention instead (CUDA, even shards and heads only).
        timeout: seconds, a week at most, after which a collective that waits for a lost rank is an error.
        text_device: where the text encoder runs, on rank 0 only: `model` is the device of the model.
    """

    plan: Literal["auto", "manual"] = "auto"
    cfg: int | None = None
    ring: int | None = None
    ulysses: int | None = None
    local_route: Literal["auto", "halo", "all_to_all"] = "auto"
    provider: Literal["torch", "deepspeed", "xfuser"] = "torch"
    timeout: float = 600.0
    text_device: Literal["model", "cpu"] = "model"

    def __post_init__(self) -> None:
        """Reject degrees below 1 and a cfg degree above 2."""
        for name in ("cfg", "ring", "ulysses"):
            degree = getattr(self, name)
            _check(degree is None or degree >= 1, f"parallel.{name} must be 1 or more, got {degree}")
        _check(self.cfg in (None, 1, 2), f"parallel.cfg must be 1 or 2 (there are two passes), got {self.cfg}")
        _check(
            0 < self.timeout <= MOST_TIMEOUT,
            f"parallel.timeout must be more than 0 and at most {MOST_TIMEOUT} seconds (a week), got {self.timeout}",
        )
        degrees = (self.cfg, self.ring, self.ulysses)
        _check(
            self.plan == "auto" or None not in degrees,
            f"parallel.plan manual needs parallel.cfg, ring and ulysses, got {degrees}",
        )


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How latents become frames.

    Attributes:
        mode: `whole` decodes each frame in one piece on rank 0, exactly; `tiled` in overlapping tiles over all ranks, which
            is faster on many and differs a little; `framewise`, for LTX-Video, whose exact decode takes all frames at once,
            a few latent frames at a time, also when tiled; `auto` is the most exact whose memory fits.
        tiles: how tiles and chunks of the video are placed. `full`: all of the size below, spread evenly with at least the overlap that
            the strides leave. `diffusers`: at multiples of the stride, cut at the border and blended as diffusers does, bit for bit.
        tile_height: pixels, a multiple of the VAE's spatial compression; a frame no larger than a tile is decoded whole.
        tile_width: pixels, likewise.
        stride_height: most pixels from one tile to the next, at most a tile; the rest of it is blended.
        stride_width: pixels, likewise.
        tile_frames: video frames that are decoded at a time where the mode cuts the video, a multiple of the VAE's temporal
            compression; a video no longer than that is not cut. Unused by Wan, whose exact decode streams.
        stride_frames: most video frames from one such piece to the next, likewise, at most a piece; the rest of it is blended.
        timestep: timestep given to a VAE that is conditioned on one (LTX-Video from 0.9.1 on); others ignore it.
        noise_scale: share of noise, drawn from the run's seed, added to the latents of such a VAE.
    """

    mode: Literal["auto", "whole", "framewise", "tiled"] = "auto"
    tiles: Literal["full", "diffusers"] = "full"
    tile_height: int = 256
    tile_width: int = 256
    stride_height: int = 192
    stride_width: int = 192
    tile_frames: int = 16
    stride_frames: int = 8
    timestep: float = 0.05
    noise_scale: float = 0.025

    def __post_init__(self) -> None:
        """Reject tiles that leave gaps; what depends on the VAE is checked once its configuration is read."""
        for side in ("height", "width", "frames"):
            tile, stride = getattr(self, f"tile_{side}"), getattr(self, f"stride_{side}")
            _check(
                1 <= stride <= tile,
                f"decode.stride_{side} must lie in [1, decode.tile_{side}], got stride {stride} and tile {tile}",
            )
        for name in ("timestep", "noise_scale"):
            _check(0 <= getattr(self, name) <= 1, f"decode.{name} must lie in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """The files of a run.

    Attributes:
        path: the video: a file that ends in .mp4, .gif or .webp, or `NAME/`, a folder of PNG frames. Its record (.json) and
            contact sheet (.png) get the same stem. With several prompts `-000` and so on is added to the stem.
        overwrite: whether existing files are replaced; otherwise they are an error before anything is computed.
        save_latents: safetensors file of the latents; None keeps them beside the video until it is complete.
        snapshot_every: steps between snapshots of the run beside the video, from which a killed run continues; 0 writes one
            only when a run is stopped or fails.
        trace: also write effective rank and fusion weights per step and layer, and a plot of them.
        sheet_frames: evenly spaced frames on the contact sheet.
        crf: quality of mp4 (H.264) and WebP, 0 (lossless) to 51; GIF and PNG have none.
        metadata: whether the video carries its prompt, seed, method, settings and version.
        progress: bars on stderr for load, denoise and decode; `auto` shows them on a terminal only.
    """

    path: str = "runs/video.mp4"
    overwrite: bool = False
    save_latents: str | None = None
    snapshot_every: int = 5
    trace: bool = False
    sheet_frames: int = 12
    crf: int = 12
    metadata: bool = True
    progress: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        """Reject settings of files that cannot be written."""
        name = PurePath(self.path).name
        if self.path.endswith("/"):
            # With a dot, its record would have the name of another video's record.
            _check(
                name != "" and "." not in name,
                f"the folder of output.path must have a name without a dot, got {self.path!r}",
            )
        else:
            ending = PurePath(self.path).suffix
            _check(
                ending in MOST_RATES,
                f"output.path must end in {', '.join(MOST_RATES)}, or in / for a folder of PNG frames, got {self.path!r}",
            )
        _check(
            self.snapshot_every >= 0,
            f"output.snapshot_every must be 0 (only when stopped) or more, got {self.snapshot_every}",
        )
        _check(self.sheet_frames >= 1, f"output.sheet_frames must be 1 or more, got {self.sheet_frames}")
        _check(0 <= self.crf <= 51, f"output.crf must lie in [0, 51], got {self.crf}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The whole configuration of a run; saved, with defaults resolved, beside every video.

    Attributes:
        model: the checkpoint.
        video: size and length.
        sampler: steps, guidance and seed.
        method: the method and its settings.
        parallel: how the ranks share one video.
        attention: the kernel.
        decode: how latents become frames.
        output: the files.
    """

    model: ModelConfig
    video: VideoConfig
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    method: MethodConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        """Check what two groups of settings must agree on; records and ids have the number of steps."""
        object.__setattr__(self, "sampler", replace(self.sampler, num_steps=self.sampler.steps))
        kind, stride = self.noise
        _check(
            kind != "freenoise" or stride <= self.method.window_frames,
            f"{self._noise_stride_name} {stride} is more than the {self.method.window_frames} frames of method.window_frames",
        )
        self._check_file()
        self.sampler.check_cfg(self.parallel.cfg)
        with as_user_error():
            check_far(self.attention.far, self.method.method, self.method.name)
            check_rest_kernel(
                self.method.method, self.method.name, dual=self.attention.dual, complement=self.attention.complement
            )
        xfuser = self.parallel.provider == "xfuser"
        _check(
            not xfuser or self.method.name == "direct",
            f"parallel.provider xfuser computes full attention only: use it with method.name direct, not {self.method.name}",
        )
        self._check_cache()
        if self.output.trace:
            self.check_traceable()

    def _check_cache(self) -> None:
        """Reject what a step cache excludes."""
        cache, model = f"sampler.cache {self.sampler.cache}", self.model
        if self.sampler.cache == "none":
            return
        _check(not model.compile, f"{cache} decides between blocks, which model.compile would compile; switch it off")
        _check(
            model.weights not in ("zero3", "block_offload"),
            f"{cache} skips blocks, and model.weights {model.weights} fetches them in the order of an earlier step; use resident or cpu_offload",
        )

    def check_traceable(self) -> None:
        """Raise UserError for a setting with which no spectra are measured."""
        _check(not self.model.compile, f"{COMPILED_TRACE}; set model.compile false, or do not trace")
        cache = self.sampler.cache
        _check(cache == "none", f"sampler.cache {cache} {CACHED_TRACE}; set sampler.cache none, or do not trace")
        _check(
            self.parallel.provider != "xfuser",
            "parallel.provider xfuser does not expose branches to trace; use parallel.provider torch, or do not trace",
        )

    def _check_file(self) -> None:
        """Reject what the format of the video cannot hold."""
        ending, video = PurePath(self.output.path).suffix, self.video
        most = MOST_RATES.get(ending, MOST_FPS)
        _check(
            video.fps <= most,
            f"{ending} takes at most {most} frames per second, and video.fps is {video.fps}; lower it, or write an .mp4",
        )
        _check(
            ending != ".webp" or max(video.height, video.width) < MOST_SIDE,
            f".webp takes sides of less than {MOST_SIDE} pixels, got {video.height} x {video.width}; write an .mp4",
        )

    @property
    def noise(self) -> tuple[Noise, int]:
        """The kind of the initial noise, and the stride of `freenoise` in frames."""
        sampler, method = self.sampler, self.method
        kind = method.method.noise if sampler.noise == "method" else sampler.noise
        return kind, self.noise_stride or default_stride(method.window_frames)

    @property
    def noise_stride(self) -> int | None:
        """`sampler.noise_stride`, or the method's own where the noise is that of the method; None is a quarter of the window."""
        own = self.method.method.noise_stride if self.sampler.noise == "method" else None
        return self.sampler.noise_stride or own

    @property
    def _noise_stride_name(self) -> str:
        """Name of the setting that `noise_stride` came from."""
        if self.sampler.noise_stride is not None:
            return "sampler.noise_stride"
        return f"noise_stride of {self.method.name}" if ":" in self.method.name else f"method.{self.method.name}.stride"


def split_scale(lora: str) -> tuple[str, float]:
    """Name and scale of NAME@SCALE; a name may contain an @."""
    name, _, scale = lora.rpartition("@")
    try:
        return (name, float(scale)) if name else (lora, 1.0)
    except ValueError:
        return lora, 1.0


def split_expert(given: str) -> tuple[str | None, str]:
    """`high` or `low`, and the rest, of high:NAME; None without one of them."""
    side, colon, rest = given.partition(":")
    return (side, rest) if colon and side in ("high", "low") else (None, given)


def describe_old_setting(key: str, value: object) -> str | None:
    """The current settings that replace one of older versions; None for any other name."""
    name = key.removeprefix("method.").removesuffix(".split")
    return describe_split(name, value) if key == f"method.{name}.split" and name in SPLIT_BEFORE else None


def _check_plain(settings: dict[str, Any]) -> None:
    """Check that settings can go into the record and the run's id, as JSON."""
    try:
        json.dumps(settings, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"method.settings must be numbers, words, lists and maps: {error}") from error


def _short(value: int) -> str:
    """A number for a message, shortened if it has many digits."""
    return str(value) if abs(value) < 10**20 else f"a number of {value.bit_length()} bits"


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
