"""Choose the best plan that fits, or raise one line with the memory needed and available, and the smallest change that would fit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.config import VideoConfig
from engine.errors import UserError
from engine.given.known import lengths_with
from engine.planner.gpu import MOST_GPUS
from engine.planner.layout import Degrees
from engine.planner.memory import GIB
from engine.planner.plan import MODES, Case, Plan, plan
from engine.planner.providers import FixedDegrees, keeps
from engine.ranks.layouts import describe
from engine.shown import apart
from freespec.methods import Mode

MOST_DOUBLINGS = 5


def choose(case: Case, fixed: FixedDegrees = (None, None, None), *, plans: list[Plan] | None = None) -> Plan:
    """Return the best plan that fits and keeps the degrees (cfg, ring, ulysses) that are not None, of those that `plan` made.

    Raises UserError if there is none, with the memory needed and available, and the smallest change that would fit.
    """
    every = plan(case) if plans is None else plans
    kept = [p for p in every if keeps(p.degrees, fixed)]
    if not kept:
        case.support.possible(case.world_size, fixed)  # raises
    if not kept[0].fits:
        smallest = min(kept, key=lambda p: p.peak_bytes)
        need = _describe_need(smallest.name, smallest.memory, smallest.peak_bytes, case)
        raise UserError(f"{need}; {describe_changes(case, fixed)}")
    return kept[0]


def choose_by_memory(case: Case, ordered: Sequence[Degrees], fixed: FixedDegrees) -> Degrees:
    """Return the first of these degrees that fits the GPU, without predicting time.

    For a single candidate, and for a kernel whose speed on this GPU is not described. Raises UserError, as `choose` does, if none fits.
    """
    case.spec.video.check_video(case.video.num_frames, case.video.height, case.video.width)
    steps = case.count_steps()[case.method.name]
    modes = [mode for mode in MODES if mode in steps]
    needs = {degrees: case.memory(degrees, modes) for degrees in ordered}
    for degrees, (_, peak) in needs.items():
        if case.fits(peak):
            return degrees
    smallest = min(needs, key=lambda degrees: needs[degrees][1])
    need = _describe_need(describe(smallest), *needs[smallest], case)
    raise UserError(f"{need}; {describe_changes(case, fixed)}")


def describe_changes(case: Case, fixed: FixedDegrees) -> str:
    """Describe the smallest change that makes the case fit, and other single changes that do."""
    trial = _Trial(case=case, fixed=fixed, modes=tuple(case.count_steps()[case.method.name]))
    changes = list(_changes(trial))
    for weights in ("block_offload", "cpu_offload", "zero3"):  # with as little on the GPU as possible
        if (
            not changes
            and case.options.weights == "resident"
            and (weights != "zero3" or case.options.quantised is None)
            and (weights == "cpu_offload" or not _keeps_blocks(case))
        ):
            lean = replace(case, options=replace(case.options, weights=weights))
            changes = [f"model.weights {weights} with {change}" for change in _changes(replace(trial, case=lean))]
    if not changes:
        return "no single change makes it fit: use a GPU with more memory"
    others = f" (or {', or '.join(changes[1:])})" if len(changes) > 1 else ""
    return f"the smallest change that fits is {changes[0]}{others}"


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """Whether a changed case fits on any degrees; other numbers of GPUs may have other degrees than the fixed ones."""

    case: Case
    fixed: FixedDegrees
    modes: tuple[Mode, ...]

    def fits(self, **change: Any) -> bool:
        """Whether the case with this change fits, by memory alone."""
        case = replace(self.case, **change)
        fixed = self.fixed if case.world_size == self.case.world_size else (None, None, None)
        native = case.grid()[0] <= case.method.window_frames
        modes: list[Mode] = ["global"] if native else [mode for mode in MODES if mode in self.modes]
        return any(case.holds(d, modes) for d in case.support.served(case.world_size) if keeps(d, fixed))


def _changes(trial: _Trial) -> Iterator[str]:
    """Single changes that fit, the smallest first; a shorter and a smaller video come last."""
    case = trial.case
    for words, change in _placements(case):
        if trial.fits(options=replace(case.options, **change)):
            yield words
    if case.sampler.cache != "none":
        sampler = replace(case.sampler, cache="none", cache_threshold=None, cache_interval=None, cache_ratios=None)
        if trial.fits(sampler=sampler):
            yield "sampler.cache none"
    doubled = (case.world_size * 2**power for power in range(1, MOST_DOUBLINGS + 1))
    doubled = (count for count in doubled if count <= MOST_GPUS)
    if more := next((count for count in doubled if trial.fits(world_size=count)), None):
        yield f"{more} GPUs"
    if shorter := _largest(_shorter(case), trial):
        yield f"video.num_frames {shorter.num_frames}"
    if smaller := _largest(_smaller(case), trial):
        yield f"video.height {smaller.height} and video.width {smaller.width}"


def _placements(case: Case) -> Iterator[tuple[str, dict[str, Any]]]:
    """Other places and dtypes of weights, with the options that they change; one that changes the video comes last."""
    options, keeps_blocks = case.options, _keeps_blocks(case)
    if options.text_device == "model" and options.weights != "cpu_offload":
        yield "parallel.text_device cpu", {"text_device": "cpu"}
        if options.weights == "resident":
            yield "model.weights cpu_offload", {"weights": "cpu_offload"}
    if case.idle_expert == "stay":
        yield "model.idle_expert leave", {"idle_expert": "leave"}
    if options.weights == "resident" and case.world_size > 1 and options.quantised is None and not keeps_blocks:
        yield "model.weights zero3", {"weights": "zero3"}
    if options.weights == "zero3" and options.shards == "device":
        yield "model.shards cpu", {"shards": "cpu"}
    if options.weights in ("resident", "cpu_offload") and not keeps_blocks:
        yield "model.weights block_offload", {"weights": "block_offload"}
    if options.quantised is None and options.weights != "zero3" and not options.compile:
        yield "model.storage fp8", {"storage": "fp8"}


def _keeps_blocks(case: Case) -> bool:
    """Whether compiled blocks, or a cache that skips some, exclude places that bring the weights of each block while it runs."""
    return case.options.compile or case.sampler.cache != "none"


def _describe_need(name: str, memory: Mapping[str, int], peak_bytes: int, case: Case) -> str:
    """Describe what the degrees called `name` need in GiB, and what there is."""
    parts = ", ".join(f"{part.replace('_', ' ')} {num / GIB:.1f}" for part, num in memory.items() if num)
    gpus = f"one {case.gpu.name}" if case.world_size == 1 else f"each of {case.world_size} {case.gpu.name}"
    need, have = apart(peak_bytes, case.gpu.usable_gib * GIB)
    return (
        f"does not fit: {name} needs {need} GiB on {gpus}, where tensors can have {have} GiB "
        f"({parts}; decoding comes after denoising)"
    )


def _shorter(case: Case) -> list[VideoConfig]:
    """Fewer frames, but at least the native length and enough for the given frames, fewest first."""
    spec, video = case.spec.video, case.video
    lengths = range(spec.num_frames(case.method.window_frames), video.num_frames, spec.temporal_factor)
    return [replace(video, num_frames=frames) for frames in lengths_with(case.given, spec, lengths, fps=video.fps)]


def _smaller(case: Case) -> list[VideoConfig]:
    """Smaller videos of about the same aspect ratio, smallest first; none if the size is that of a video to continue."""
    if case.given is not None and case.given.extend is not None:
        return []
    video, (rows, columns) = case.video, case.spec.video.size_multiples
    sizes = [
        (video.height * share // 100 // rows, video.width * share // 100 // columns) for share in range(20, 100, 5)
    ]
    return [
        replace(video, height=height * rows, width=width * columns)
        for height, width in dict.fromkeys(sizes)
        if height and width and (height * rows, width * columns) != (video.height, video.width)
    ]


def _largest(videos: list[VideoConfig], trial: _Trial) -> VideoConfig | None:
    """The largest of these videos, in ascending order, that fits."""
    low, high = 0, len(videos)  # all of videos[:low] fit, none of videos[high:] does
    while low < high:
        middle = (low + high) // 2
        if trial.fits(video=videos[middle]):
            low = middle + 1
        else:
            high = middle
    return videos[low - 1] if low else None
