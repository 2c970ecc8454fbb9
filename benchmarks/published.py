"""Published figures of dense runs on GPUs beside the planner's predictions, as a check of its assumptions."""

import functools
from dataclasses import dataclass

from benchmarks.tables import table
from engine.adapters.wan_published import PUBLISHED as CONFIGS
from engine.config import MethodConfig, SamplerConfig, VideoConfig
from engine.planner.gpu import read_gpu
from engine.planner.model import ModelSpec
from engine.planner.plan import Case, Options, plan

SMALL, LARGE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
STEPS = 50
# A prediction may be off by this share of the nearest published figure; half as much again is what another kernel would make.
BAND = 0.15


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Seconds of full attention with guidance, resident weights, one GPU.

    Attributes:
        model: of the published configurations.
        gpu: of configs/gpus.
        kernel: attention.kernel that stands for what was run.
        video: its frames and size.
        per_step: whether the seconds are of one step, or of all `STEPS`.
        seconds: smallest and largest that are published.
        source: where, and what was run.
    """

    model: str
    gpu: str
    kernel: str
    video: VideoConfig
    per_step: bool = False
    seconds: tuple[float, float]
    source: str

    @property
    def predicted(self) -> float:
        """The planner's seconds for the same."""
        spec = ModelSpec(name=self.model, source="published", configs=CONFIGS[self.model])
        case = Case(
            spec=spec,
            video=self.video,
            sampler=SamplerConfig(guidance_scale=5.0, num_steps=STEPS),
            method=MethodConfig(name="direct", window_frames=21),
            gpu=read_gpu(self.gpu),
            world_size=1,
            options=Options(kernel=self.kernel),
        )
        [only] = plan(case)
        return only.run_seconds["direct"] / (STEPS if self.per_step else 1)

    @property
    def over_published(self) -> float:
        """Predicted over published: over the nearer end of a range, 1 within it."""
        low, high = self.seconds
        return self.predicted / min(max(self.predicted, low), high)


AT_480P, AT_720P = VideoConfig(num_frames=81, height=480, width=832), VideoConfig(num_frames=81, height=720, width=1280)
WAN_README = "Wan2.1's README, its own code with FlashAttention"
LIGHT_X2V = "LightX2V's README, Wan2.1-I2V-14B"
FIGURES = (
    Figure(
        model=SMALL,
        gpu="a100",
        kernel="cuda_flash",
        video=VideoConfig(num_frames=321, height=480, width=832),
        seconds=(1610, 1610),
        source="arXiv:2605.31057, dense",
    ),
    Figure(
        model=SMALL,
        gpu="rtx4090",
        kernel="cuda_flash",
        video=AT_480P,
        seconds=(261.4, 261.4),
        source=WAN_README,
    ),
    Figure(model=LARGE, gpu="a100", kernel="cuda_flash", video=AT_720P, seconds=(3342.6, 3342.6), source=WAN_README),
    Figure(
        model=LARGE,
        gpu="h100",
        kernel="cuda_flash",
        video=AT_480P,
        per_step=True,
        seconds=(9.77, 9.77),
        source=f"{LIGHT_X2V}: stock diffusers",
    ),
    Figure(
        model=LARGE,
        gpu="h100",
        kernel="auto",
        video=AT_480P,
        per_step=True,
        seconds=(5.18, 7.35),
        source=f"{LIGHT_X2V}: LightX2V, SGLang, FastVideo",
    ),
)


@functools.cache
def published_table() -> str:
    """Each figure beside what the planner predicts."""
    made = []
    for figure in FIGURES:
        video, gpu = figure.video, read_gpu(figure.gpu)
        what = (
            f"{figure.model.partition('/')[2]}, {video.num_frames} frames of {video.height} x {video.width}, {gpu.name}"
        )
        unit = "s a step" if figure.per_step else f"s for {STEPS} steps"
        published = " to ".join(f"{seconds:g}" for seconds in dict.fromkeys(figure.seconds))
        made.append(
            [
                what,
                Options(kernel=figure.kernel).kernel_on(gpu),
                f"{figure.predicted:.{2 if figure.per_step else 0}f} {unit}",
                f"{published} {unit}",
                f"{figure.over_published:.2f}",
                figure.source,
            ]
        )
    return table(["run", "kernel", "predicted", "published", "ratio", "source"], made)
