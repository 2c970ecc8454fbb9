"""plan.py: predict degrees, memory and time before anything is loaded."""

import json
from dataclasses import asdict, replace
from typing import Any

from engine.checks import check_beside
from engine.config import RunConfig
from engine.given.frames import GivenFrames
from engine.given.known import check_given, check_places, count_begun, refuse_extend
from engine.paths import failing_as
from engine.planner.arrange import check_settings
from engine.planner.cached import SCHEDULED
from engine.planner.choose import choose
from engine.planner.gpu import GpuSpec
from engine.planner.memory import GIB
from engine.planner.model import ModelSpec, read_model
from engine.planner.plan import MODES, Case, Plan, plan
from engine.planner.split import describe_unused_cache
from engine.shown import apart
from launch.arguments.plan import Arguments

NOTE = "Every time is predicted from datasheets and assumed fractions of them (see `sources` in the GPU's file)."


def run(given: Arguments) -> None:
    """Plan, and print the chosen plan first."""
    config, spec = given.config, read_model(given.config.model)
    refuse_extend(given.given, spec.video)
    check_settings(config, spec)
    notes = [*_look_at_given(given.given, config, spec), *describe_unused_cache(config)]
    case = Case.of(config, spec, gpu=given.gpu, world_size=given.gpus, given=given.given)
    plans = plan(case)
    parallel = config.parallel
    best = choose(case, (parallel.cfg, parallel.ring, parallel.ulysses), plans=plans)
    plans = [best, *(p for p in plans if p is not best)]
    print(json.dumps(as_json(case, plans, notes), indent=2) if given.json else as_text(case, config, plans, notes))


def _look_at_given(given: GivenFrames | None, config: RunConfig, spec: ModelSpec) -> list[str]:
    """Refuse given frames that a run would refuse; returns what is counted.

    Pictures are not opened, and neither they nor that video have to be here.
    """
    video, of = config.video, spec.video
    size = {"num_frames": video.num_frames, "fps": video.fps}
    if given is not None:
        check_places(given, of, **size)
    check_beside(config, of, given, num_frames=video.num_frames)
    if given is None:
        needs = " and ".join(f"--given {place}=FILE" for place in of.needs)
        return [f"given: this checkpoint needs {needs}, counted as if it were given"] if needs else []
    extend = given.extend
    if extend is None:
        return []
    with failing_as(f"cannot look for --extend {extend}"):
        is_here = extend.exists()
    if not is_here:
        return [f"given: --extend {extend} is not here, so its size and length are not checked"]
    notes = check_given(replace(given, images=()), of, **size, height=video.height, width=video.width)
    begun = count_begun(extend, of)
    check_places(given, of, **size, begun=begun)
    filled = (
        f"{begun} of {of.latent_shape(video.num_frames, video.height, video.width)[2]} latent frames, "
        f"{of.num_frames(begun)} of {video.num_frames} frames"
    )
    return [f"given: --extend {extend} fills {filled}", *(f"given: {note}" for note in notes)]


def as_json(case: Case, plans: list[Plan], notes: list[str]) -> dict[str, Any]:
    """All plans as JSON, the chosen one first."""
    return {
        "predicted": NOTE,
        "notes": notes,
        "model": {"name": case.spec.name, "source": case.spec.source, "parameters": case.spec.parameters},
        "gpu": asdict(case.gpu),
        "gpus": case.world_size,
        "video": asdict(case.video),
        "method": case.method.name,
        "options": asdict(case.options),
        "kernel": case.options.kernel_on(case.gpu),
        "plans": [asdict(p) for p in plans],
    }


def as_text(case: Case, config: RunConfig, plans: list[Plan], notes: list[str]) -> str:
    """Print the chosen plan in full, and a line for each of the others."""
    best = plans[0]
    lines = [
        *_heading(case, config),
        *notes,
        "",
        f"chosen: {best.name}",
        f"  why: {best.why}",
        *_shares(best, case),
        *_weights(case, best),
        *_memory(best, case.gpu),
        *_cache(case),
        *_steps(best),
        *_runs(best, case.world_size),
        "",
        "every plan, best first (seconds of denoising; GiB of the busiest GPU):",
        *_table(plans),
        "",
        NOTE,
    ]
    return "\n".join(lines)


def _heading(case: Case, config: RunConfig) -> list[str]:
    video, spec, beside = config.video, case.spec, len(case.places.moments)
    frames, frame_tokens = case.grid()
    pictures = f" and {beside} picture{'s' * (beside > 1)} beside them" if beside else ""
    return [
        f"{spec.name} on {case.world_size} x {case.gpu.name}: {video.num_frames} frames of {video.height} x {video.width}, "
        f"{frames} latent frames{pictures} of {frame_tokens} tokens = {(frames + beside) * frame_tokens} tokens",
        f"numbers of the model: {spec.source}; {spec.heads} heads of {spec.head_dim}, {spec.layers} layers, "
        f"{'2 x ' if spec.num_experts > 1 else ''}{spec.parameters['transformer'] / 1e9:.2f} billion parameters",
    ]


def _shares(best: Plan, case: Case) -> list[str]:
    layout = case.layout(best.degrees)
    far = f"  far keys of dual steps: {layout.kept} of {layout.frame_tokens} tokens of each frame outside the windows"
    return [
        f"  tokens per rank: {_span(best.tokens)}; heads per rank inside attention: {_span(best.heads)}; "
        f"local steps by {best.local_route}; attention by {case.options.kernel_on(case.gpu)}",
        *([far] if layout.kept else []),
    ]


def _weights(case: Case, best: Plan) -> list[str]:
    """Describe where the weights lie, unless they are resident."""
    options = case.options
    if best.idle_expert == "leave":
        return [
            "  weights: of the two transformers the idle one waits on the CPU (model.idle_expert); moving it is not in the predicted time"
        ]
    if options.weights == "resident":
        return ["  weights: both transformers stay on each GPU (model.idle_expert)"] if best.idle_expert else []
    if options.weights == "block_offload":
        return [
            "  weights: block_offload, two blocks at a time on each GPU, the rest on its CPU; copies that denoising does not hide are not "
            "in the predicted time"
        ]
    if options.weights == "cpu_offload":
        return ["  weights: cpu_offload, one part at a time on each GPU"]
    place = {"device": "on each GPU", "cpu": "of each GPU on the CPU"}.get(options.shards, "of each GPU in a file")
    return [
        f"  weights: zero3, a share of 1/{case.world_size} {place}; gathered layers are whole for as long as they run"
    ]


def _memory(best: Plan, gpu: GpuSpec) -> list[str]:
    parts = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in best.memory.items())
    need, have = apart(best.peak_bytes, gpu.usable_gib * GIB)
    return [f"  peak memory: {need} GiB of {have} for tensors (GiB: {parts})"]


def _cache(case: Case) -> list[str]:
    """Say what of a step cache is predicted."""
    cache = case.sampler.cache
    if cache == "none":
        return []
    time = (
        "its schedule decides which steps are computed, and a skipped one is counted as no time"
        if cache in SCHEDULED
        else "the time that it saves is not predicted: values decide which steps are computed, and all are counted"
    )
    return [f"  sampler.cache {cache}: its memory is counted (step cache); {time}"]


def _steps(best: Plan) -> list[str]:
    lines = []
    for mode in best.step_seconds:
        seconds = ", ".join(f"{part} {value:.3f}" for part, value in best.step_seconds[mode].items())
        sent = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in best.bytes_per_step[mode].items() if size)
        total = sum(best.step_seconds[mode].values())
        lines.append(f"  {mode} step: {total:.3f} s predicted ({seconds}); sends, MB: {sent or 'nothing'}")
    return lines


def _runs(best: Plan, world_size: int) -> list[str]:
    lines = []
    for method, seconds in best.run_seconds.items():
        computed = best.computed[method]
        steps = ", ".join(
            f"{count} {mode}" if computed[mode] == count else f"{computed[mode]} of {count} {mode}"
            for mode, count in best.steps[method].items()
        )
        shared = f", {best.efficiency[method]:.1%} of {world_size} times one GPU" if world_size > 1 else ""
        lines.append(f"  {method}: {seconds:.1f} s predicted to denoise ({steps}){shared}")
    if best.encode_seconds:
        lines.append(f"  encoding the pictures (on one GPU): {best.encode_seconds:.1f} s predicted")
    return [
        *lines,
        f"  decoding ({best.decode_mode}, on {'all GPUs' if best.decode_mode == 'tiled' else 'one GPU'}): {best.decode_seconds:.1f} s predicted",
    ]


def _table(plans: list[Plan]) -> list[str]:
    # A dash marks a mode that some degrees lack, such as views where the tokens stay split.
    modes = [mode for mode in MODES if any(mode in p.step_seconds for p in plans)]
    methods = list(dict.fromkeys(name for p in plans for name in p.run_seconds))
    rows = [["cfg", "ring", "ulysses", "tokens", "heads", "GiB", *modes, *methods, "fits"]]
    rows += [
        [
            *map(str, p.degrees),
            _span(p.tokens),
            _span(p.heads),
            f"{p.peak_bytes / GIB:.1f}",
            *(f"{sum(p.step_seconds[mode].values()):.3f}" if mode in p.step_seconds else "-" for mode in modes),
            *(f"{p.run_seconds[method]:.1f}" if method in p.run_seconds else "-" for method in methods),
            "yes" if p.fits else "no",
        ]
        for p in plans
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _span(sizes: list[int]) -> str:
    return str(sizes[0]) if min(sizes) == max(sizes) else f"{min(sizes)}-{max(sizes)}"
