"""What the planner predicts of whole runs, for docs/predictions.md and docs/memory.md; nothing in it is measured."""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import ROOT
from benchmarks.tables import table, verdict
from engine.config import ModelConfig, RunConfig
from engine.load.single_file import SingleFile
from engine.planner.gpu import GpuSpec, read_gpu
from engine.planner.memory import GIB
from engine.planner.model import ModelSpec, read_model
from engine.planner.plan import Case, Plan, plan
from engine.presets import read_preset
from freespec.methods import METHODS

PRESETS = tuple(ROOT / "configs" / f"{name}.yaml" for name in ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "ltx-video-2b"))
GPUS = ("h200", "a100")
EFFICIENCY_GOAL = 0.9
LONG = {PRESETS[0]: (321, 641, 1281), PRESETS[2]: (481, 961, 1921)}  # frames
LONG_FAR = 4096
PAIR, PAIR_LENGTHS = "wan2.2-t2v-a14b", (81, 161, 321)  # frames
PAIR_PLACES = ("cpu_offload", "block_offload")
GGUF_BLOCKS = {"Q8_0": (32, 34), "Q4_K": (256, 144)}  # numbers and bytes of a block, in gguf's GGML_QUANT_SIZES
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


@functools.cache
def pair_memory() -> str:
    """The peak of Wan2.2 A14B on a card of 24 GB, full, in fp8, and with two GGUF files whose matrices in blocks are of one type."""
    gpu = read_gpu("rtx4090")
    config = read_preset(PAIR)
    spec = read_model(config.model)
    itemsize, full = 2, spec.weight_bytes(2)["transformer"]
    fp8 = Case.of(replace(config, model=replace(config.model, storage="fp8")), spec, gpu=gpu, world_size=1)
    stored: dict[str, dict[str, Any]] = {"bf16": {}, "`storage fp8`": {"storage": "fp8"}}
    sizes = [full, spec.weight_bytes(itemsize, stored=fp8.stored[0])["transformer"]]
    for kind in GGUF_BLOCKS:
        num_bytes = gguf_bytes(spec, kind, itemsize)
        sizes.append(num_bytes)
        stored[f"GGUF {kind}"] = {"file_bytes": (num_bytes, num_bytes)}
    rows = [["each transformer", *(f"{size / GIB:.1f}" for size in sizes)]]
    for num_frames in PAIR_LENGTHS:
        case = Case.of(replace(config, video=replace(config.video, num_frames=num_frames)), spec, gpu=gpu, world_size=1)
        modes = case.modes
        for place in PAIR_PLACES:
            peaks = []
            for change in stored.values():
                one = replace(case, options=replace(case.options, weights=place, **change))
                peak = one.memory((1, 1, 1), modes)[1]
                peaks.append(f"{peak / GIB:.1f}" + ("" if one.fits(peak) else ", no"))
            rows.append([f"{num_frames} frames, `{place}`", *peaks])
    return table(["", *stored], rows)


def gguf_bytes(spec: ModelSpec, kind: str, itemsize: int) -> int:
    """Bytes of a transformer whose matrices inside blocks are of one type of GGUF, all else as numbers of `itemsize`."""
    with torch.device("meta"):
        made = spec.adapter.build("transformer", spec.configs["transformer"])
    shapes = {key: tuple(tensor.shape) for key, tensor in made.state_dict().items()}
    numbers, num_bytes = GGUF_BLOCKS[kind]
    matrices = [
        key for key in shapes if key.startswith("blocks.") and key.endswith(".weight") and len(shapes[key]) == 2
    ]
    quantised = {key: math.prod(shapes[key]) // numbers * num_bytes for key in matrices}
    file = SingleFile(path=Path(f"{kind}.gguf"), parts=("transformer",), shapes=shapes, quantised=quantised)
    return file.stored_bytes(itemsize)


def predicted_minutes(row: dict[str, Any], name: str, marks: dict[str, str]) -> str:
    """A method's minutes on the row's layout, or marked, on the best layout that serves it."""
    if f"seconds_{name}" in row:
        return f"{row[f'seconds_{name}'] / 60:.1f}"
    if name not in row["elsewhere"]:
        return "-"
    degrees, seconds = row["elsewhere"][name]
    return f"{seconds / 60:.1f} ({marks[degrees]})"
