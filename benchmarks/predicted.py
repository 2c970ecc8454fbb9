"""What the planner predicts of whole runs, for docs/predictions.md; nothing in it is measured."""

import functools
import re
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import ROOT
from benchmarks.tables import table, verdict
from engine.config import ModelConfig, RunConfig
from engine.planner.gpu import GpuSpec, read_gpu
from engine.planner.memory import GIB
from engine.planner.model import read_model
from engine.planner.plan import Case, Plan, plan
from engine.presets import read_preset
from freespec.methods import METHODS

PRESETS = tuple(ROOT / "configs" / f"{name}.yaml" for name in ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "ltx-video-2b"))
GPUS = ("h200", "a100")
EFFICIENCY_GOAL = 0.9
LONG = {PRESETS[0]: (321, 641, 1281), PRESETS[2]: (481, 961, 1921)}  # frames
LONG_FAR = 4096
MARKS = "abcdefgh"  # of footnotes


def predicted_table(
    configs: Sequence[RunConfig], gpus: Sequence[GpuSpec], *, world_sizes: Sequence[int] = (1, 2, 4, 8)
) -> list[dict[str, Any]]:
    """One row per configuration, GPU and number of ranks, for the best degrees: everything in it is predicted.

    Keys: model, num_frames, gpu, gpus, degrees, fits, peak_gib, weights_gib, text_gib, decode_mode, seconds_decode, and for
    each method NAME that these degrees serve seconds_NAME (denoising) and efficiency_NAME. `elsewhere` has of every method that
    they do not serve the best degrees that do, if any fit, and its seconds there.
    """
    rows = []
    for config in configs:
        spec = read_model(ModelConfig(path=config.model.path, revision=config.model.revision))
        for gpu in gpus:
            for world_size in world_sizes:
                plans = plan(Case.of(config, spec, gpu=gpu, world_size=world_size))
                best = plans[0]
                row = {"model": spec.name, "gpu": gpu.name, "gpus": world_size, "degrees": best.name, "fits": best.fits}
                row |= {"num_frames": config.video.num_frames, "peak_gib": best.peak_bytes / GIB}
                row |= {"weights_gib": best.memory["weights"] / GIB, "text_gib": best.memory["text_encoder"] / GIB}
                row |= {"decode_mode": best.decode_mode, "seconds_decode": best.decode_seconds}
                row |= {f"seconds_{name}": seconds for name, seconds in best.run_seconds.items()}
                row |= {f"efficiency_{name}": share for name, share in best.efficiency.items()}
                rows.append(row | {"elsewhere": _served_elsewhere(plans)})
    return rows


def _served_elsewhere(plans: Sequence[Plan]) -> dict[str, tuple[str, float]]:
    """Degrees and seconds of each method that the first plan does not serve, of the fastest plan that serves it and fits."""
    found: dict[str, tuple[str, float]] = {}
    for p in filter(lambda p: p.fits, plans):
        for name in p.run_seconds.keys() - plans[0].run_seconds.keys():
            if name not in found or p.run_seconds[name] < found[name][1]:
                found[name] = p.name, p.run_seconds[name]
    return found


@functools.cache
def predicted_ratios() -> dict[str, str]:
    """Predicted ratios of Wan2.1-1.3B on one H200."""
    step = read_preset(str(PRESETS[0]), settings={"method.freespec.domain": "step"})
    found = {}
    for name, config in (("step, 0.5", step), ("default: timestep", read_preset(str(PRESETS[0])))):
        [row] = predicted_table([config], [read_gpu("h200")], world_sizes=(1,))
        found[f"FreeSpec ({name}) / direct, 50 steps"] = f"{row['seconds_freespec'] / row['seconds_direct']:.2f}"
        found["sliding_window / direct, 50 steps"] = f"{row['seconds_sliding_window'] / row['seconds_direct']:.2f}"
    return found


@functools.cache
def eight_gpus() -> list[list[str]]:
    """Rows of goals with the predicted efficiency of eight GPUs, which one GPU cannot measure."""
    rows = []
    for preset, what in ((PRESETS[0], ""), (PRESETS[2], ", LTX-Video 2B")):
        [row] = predicted_table([read_preset(str(preset))], [read_gpu("h200")], world_sizes=(8,))
        efficiency = row["efficiency_freespec"]
        predicted = f"{efficiency:.2f} ({row['degrees']})"
        name = f"efficiency of 8 GPUs, FreeSpec{what}"
        rows.append(
            [name, f">= {EFFICIENCY_GOAL}", predicted, "predicted only", verdict(efficiency >= EFFICIENCY_GOAL), ""]
        )
    return rows


@functools.cache
def predictions() -> str:
    """The best layout of each preset on one and eight GPUs, and minutes of denoising by each method."""
    found = predicted_table(
        [read_preset(str(path)) for path in PRESETS], [read_gpu(name) for name in GPUS], world_sizes=(1, 8)
    )
    others = dict.fromkeys(degrees for row in found for degrees, _ in row["elsewhere"].values())
    marks = dict(zip(others, MARKS, strict=False))
    names = [name for name in METHODS if any(f"seconds_{name}" in row or name in row["elsewhere"] for row in found)]
    rows = [
        [
            f"{row['model'].partition('/')[2].removesuffix('-Diffusers')}, {row['num_frames']}",
            row["gpu"],
            str(row["gpus"]),
            " x ".join(re.findall(r"\d+", row["degrees"])) + ("" if row["fits"] else " (does not fit)"),
            f"{row['peak_gib']:.1f}",
            *(predicted_minutes(row, name, marks) for name in names),
            f"{row['efficiency_freespec']:.0%}",
        ]
        for row in found
    ]
    header = ["model, frames", "GPU", "GPUs", "cfg x ring x ulysses", "peak GiB"]
    header += [f"{name}, min" for name in names] + ["efficiency, freespec"]
    notes = [f"{mark}: on {degrees}, the fastest that the method can have." for degrees, mark in marks.items()]
    return "\n\n".join([table(header, rows), *notes])


@functools.cache
def long_videos() -> str:
    """FreeSpec with a fixed number of far keys beside `direct`, at 4, 8 and 16 times the native length on 1, 8 and 32 GPUs."""
    rows = []
    for path, lengths in LONG.items():
        for num_frames in lengths:
            settings = {"video.num_frames": num_frames, "attention.far": LONG_FAR}
            config = read_preset(str(path), settings=settings)
            for row in predicted_table([config], [read_gpu(GPUS[0])], world_sizes=(1, 8, 32)):
                seconds, direct = row["seconds_freespec"], row["seconds_direct"]
                rows.append(
                    [
                        row["model"].partition("/")[2].removesuffix("-Diffusers"),
                        str(num_frames),
                        str(row["gpus"]),
                        " x ".join(re.findall(r"\d+", row["degrees"])) + ("" if row["fits"] else " (does not fit)"),
                        f"{row['peak_gib']:.1f}",
                        f"{seconds / 60:.2f}",
                        f"{seconds / num_frames:.3f}",
                        f"{direct / 60:.2f}",
                        f"{seconds / direct:.2f}",
                        f"{row['efficiency_freespec']:.0%}",
                    ]
                )
    header = ["model", "frames", "GPUs", "cfg x ring x ulysses", "peak GiB", "freespec, min", "s per frame"]
    return table([*header, "direct, min", "freespec / direct", "efficiency, freespec"], rows)


def predicted_minutes(row: dict[str, Any], name: str, marks: dict[str, str]) -> str:
    """A method's minutes on the row's layout, or marked, on the best layout that serves it."""
    if f"seconds_{name}" in row:
        return f"{row[f'seconds_{name}'] / 60:.1f}"
    if name not in row["elsewhere"]:
        return "-"
    degrees, seconds = row["elsewhere"][name]
    return f"{seconds / 60:.1f} ({marks[degrees]})"
