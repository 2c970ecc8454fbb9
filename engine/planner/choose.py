"""The best plan that fits, or one line that says what needs how much and the smallest change that would fit."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from engine.config import MethodConfig, SamplerConfig, VideoConfig
from engine.errors import UserError
from engine.planner.gpu import GpuSpec
from engine.planner.memory import GIB
from engine.planner.model import ModelSpec
from engine.planner.plan import Options, Plan, plan

MORE_GPUS = 64


def choose(
    spec: ModelSpec,
    video: VideoConfig,
    sampler: SamplerConfig,
    method: MethodConfig,
    gpu: GpuSpec,
    world_size: int,
    *,
    options: Options | None = None,
    fixed: tuple[int | None, int | None, int | None] = (None, None, None),
) -> Plan:
    """The best plan that fits and keeps the degrees (cfg, ring, ulysses) that are not None.

    Raises UserError if there is none: what needs how much, what there is, and the smallest change that would fit.
    """
    options = options or Options()
    every = plan(spec, video, sampler, method, gpu, world_size, options=options)
    plans = [p for p in every if all(want in (None, have) for want, have in zip(fixed, p.degrees, strict=True))]
    if not plans:
        wanted = ", ".join(
            f"parallel.{axis} {degree}" for axis, degree in zip(("cfg", "ring", "ulysses"), fixed, strict=True) if degree
        )
        raise UserError(
            f"{world_size} GPUs cannot have {wanted}; possible are {'; '.join(p.name for p in every)}"
        )
    if plans[0].fits:
        return plans[0]

    def try_it(**changes: object) -> bool:
        """Whether a change of video, options or GPUs lets some degrees fit; other GPUs may have other degrees."""
        arguments = {"video": video, "world_size": world_size, "options": options} | changes
        fixed_now = (None, None, None) if arguments["world_size"] != world_size else fixed
        found = plan(
            spec, arguments["video"], sampler, method, gpu, arguments["world_size"], options=arguments["options"]
        )
        return any(
            p.fits and all(want in (None, have) for want, have in zip(fixed_now, p.degrees, strict=True)) for p in found
        )

    smallest = min(plans, key=lambda p: p.peak_bytes)
    changes = list(changes_that_fit(spec, video, options, world_size, try_it))
    advice = f"the smallest change that fits: {'; or '.join(changes)}" if changes else "no single change makes it fit"
    raise UserError(f"{describe_need(smallest, gpu, world_size)}; {advice}")


def describe_need(smallest: Plan, gpu: GpuSpec, world_size: int) -> str:
    """What needs how many GiB, and what there is, for the plan that needs least."""
    parts = ", ".join(f"{name.replace('_', ' ')} {num / GIB:.1f}" for name, num in smallest.memory.items() if num)
    return (
        f"does not fit: {smallest.name} needs {smallest.peak_bytes / GIB:.1f} GiB on each of {world_size} {gpu.name}, which "
        f"have {gpu.usable_gib:.1f} GiB for tensors (GiB: {parts}; the VAE decodes after denoising)"
    )


def changes_that_fit(
    spec: ModelSpec, video: VideoConfig, options: Options, world_size: int, fits: Callable[..., bool]
) -> Iterator[str]:
    """Single changes that make it fit, the smallest first, as words for a person; `fits(**change)` tries one."""
    if options.text_device == "model" and options.offload == "none":
        if fits(options=replace(options, text_device="cpu")):
            yield "parallel.text_device cpu (the text encoder on the CPU)"
        if fits(options=replace(options, offload="model")):
            yield "model.offload model"
    counts = (n for n in range(world_size + 1, MORE_GPUS + 1) if n % world_size == 0)
    if more := next((n for n in counts if fits(world_size=n)), None):
        yield f"{more} GPUs"
    if frames := _fewest_changes(_shorter(spec, video), fits):
        yield f"video.num_frames {frames.num_frames}"
    if size := _fewest_changes(_smaller(spec, video), fits):
        yield f"video.height {size.height} and video.width {size.width}"


def _shorter(spec: ModelSpec, video: VideoConfig) -> list[VideoConfig]:
    """Fewer frames, from one latent frame to one less than there are."""
    step = spec.video.temporal_factor
    return [replace(video, num_frames=frames) for frames in range(1, video.num_frames, step)]


def _smaller(spec: ModelSpec, video: VideoConfig) -> list[VideoConfig]:
    """About the same shape in smaller sizes, smallest first."""
    multiple_h, multiple_w = spec.size_multiples
    sizes = []
    for percent in range(20, 100, 2):
        height = video.height * percent // 100 // multiple_h * multiple_h
        width = video.width * percent // 100 // multiple_w * multiple_w
        if height and width and (not sizes or (sizes[-1].height, sizes[-1].width) != (height, width)):
            sizes.append(replace(video, height=height, width=width))
    return sizes


def _fewest_changes(videos: list[VideoConfig], fits: Callable[..., bool]) -> VideoConfig | None:
    """The largest of these videos, which ascend, that fits."""
    low, high = 0, len(videos)  # videos[:low] fit, videos[high:] do not
    while low < high:
        middle = (low + high) // 2
        if fits(video=videos[middle]):
            low = middle + 1
        else:
            high = middle
    return videos[low - 1] if low else None
