"""The GPU's part of docs/performance.md, from the files that benchmarks/gpu.py wrote."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, SHAPES, Shape
from benchmarks.tables import NOT_MEASURED, errors, median_ms, table, verdict
from engine.planner.gpu import EIGH_DIM, GpuSpec, read_gpu
from engine.planner.timing import EXPOSED, link_rate, waiting_seconds
from freespec.windows import window_range
from parallel.shards import LayerShape, SequencePlan, layer_bytes_by_rank

FOLDER = RESULTS / "gpu"
Files = dict[str, dict[str, Any]]

# Goals: name, section, path to the figure, comparison, limit.
GOALS: list[tuple[str, str, tuple[str, ...], str, float]] = [
    ("dual / global attention, full Wan layer", "layer", ("wan", "ratios", "dual / global"), "<=", 1.08),
    ("fusion / dual attention", "layer", ("wan", "ratios", "fusion / dual"), "<=", 0.03),
    ("literal SVD fusion / ours", "layer", ("wan", "svd", "literal SVD / ours"), ">=", 5.0),
    ("dense branch / best bf16 matrix rate", "layer", ("wan", "ratios", "dense rate / matrix rate"), ">=", 0.75),
    (
        "Triton / strided dual (kept if it wins by 3 %)",
        "layer",
        ("wan", "ratios", "dual triton / dual strided"),
        "<=",
        0.97,
    ),
    ("FreeSpec (step, 0.5) / direct, 50 steps", "steps", ("runs", "freespec (step, 0.5)", "over direct"), "<=", 0.75),
    ("sliding_window / direct, 50 steps", "steps", ("runs", "sliding_window", "over direct"), "<=", 0.40),
    ("our direct / stock diffusers", "steps", ("ratios", "direct / stock diffusers"), "<=", 1.0),
    (
        "peak memory, dual step / global step",
        "steps",
        ("ratios", "peak memory, freespec dual / direct"),
        "<=",
        1.15,
    ),
]
# Figures without a limit.
BESIDE: list[tuple[str, str, tuple[str, ...]]] = [
    (
        "FreeSpec (default: timestep) / direct, 50 steps",
        "steps",
        ("runs", "freespec (default: timestep)", "over direct"),
    ),
    ("dual / global attention, LTX layer", "layer", ("ltx", "ratios", "dual / global")),
    ("fusion / dual attention, LTX layer", "layer", ("ltx", "ratios", "fusion / dual")),
]
# Predictions from arithmetic, by goal; `predicted_fusion` adds to them.
BOUNDS = {
    "dual / global attention, full Wan layer": "1.07 (1,560 tokens in query tiles of 128: 13 for 12.2)",
    "dual / global attention, LTX layer": "1.16 (330 tokens in query tiles of 128: 3 for 2.6)",
    "Triton / strided dual (kept if it wins by 3 %)": "0.94 at the same rate per tile (its tiles cross frames)",
    "peak memory, dual step / global step": "1.00 (counted, see Memory)",
}


def predicted_fusion() -> dict[str, str]:
    """Predict fusion / dual attention from the planner's description of an H200, for each of its kernels.

    Grams of both branches on tensor cores, the product with M in fp32, and the eigendecompositions, over one full attention.
    """
    gpu = read_gpu("h200")
    rows = {}
    for what, name in (("fusion / dual attention", "wan"), ("fusion / dual attention, LTX layer", "ltx")):
        shape = SHAPES[name]
        per_head = shape.num_tokens * shape.head_dim
        product = 2 * per_head * shape.head_dim * shape.heads
        grams = 2 * product / (gpu.bf16_tflops * 1e12 * gpu.gemm_fraction)
        applied = product / (gpu.fp32_tflops * 1e12 * gpu.fp32_fraction)
        fusion = grams + applied + gpu.eigh_seconds * shape.head_dim / EIGH_DIM
        dual = 4 * shape.num_tokens * per_head * shape.heads / (gpu.bf16_tflops * 1e12)
        found = ", ".join(
            f"{fusion * rate / dual:.3f} with {kernel} at {rate:g} of the peak"
            for kernel, rate in gpu.attention_fraction.items()
        )
        rows[what] = f"{found}; eigendecompositions {gpu.eigh_seconds * shape.head_dim / EIGH_DIM * 1e3:.0f} ms"
    return rows


def read(folder: Path = FOLDER) -> Files:
    """Read the file of each section; {} without any."""
    return {path.stem: json.loads(path.read_text()) | {"file": path.name} for path in sorted(folder.glob("*.json"))}


def look_up(files: Files, section: str, path: tuple[str, ...]) -> float | None:
    """A figure: the median where there are several; None if the section or the figure is missing."""
    value: Any = files.get(section, {}).get("results", {})
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value.get("median") if isinstance(value, dict) else value


def goals(files: Files, predicted: dict[str, str]) -> list[list[str]]:
    """Rows: what, goal, predicted, measured, whether it holds, file."""
    bounds = BOUNDS | predicted_fusion() | predicted
    rows = []
    for what, section, path, sign, limit in GOALS:
        value = look_up(files, section, path)
        holds = "" if value is None else verdict((value <= limit) == (sign == "<="))
        rows.append([what, f"{sign} {limit:g}", bounds.get(what, ""), *_measured(files, section, value, holds)])
    for what, section, path in BESIDE:
        value = look_up(files, section, path)
        rows.append([what, "", bounds.get(what, ""), *_measured(files, section, value, "")])
    return rows


def _measured(files: Files, section: str, value: float | None, holds: str) -> list[str]:
    if value is None:
        return [NOT_MEASURED, "", ""]
    return [f"{value:.3g}", holds, f"`gpu/{files[section]['file']}`"]


def sections(files: Files) -> list[str]:
    """The tables of every section; one line if there are no files."""
    if not files:
        return ["No file of `benchmarks/gpu.py` is here: not measured."]
    parts = []
    for name, show in SHOWN.items():
        if name in files:
            parts += [f"### {name}", _provenance(files[name]), *show(files[name]["results"])]
        else:
            parts += [f"### {name}", "Not measured."]
    return parts


def _provenance(content: dict[str, Any]) -> str:
    """Device, versions, clocks, and whether the section was finished."""
    at = content["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in at.get("packages", {}).items() if version)
    before = at.get("clocks_before")
    found = f"; {', '.join(f'{key} {value}' for key, value in before.items())}" if before else ""
    cuda = f", CUDA {at['cuda']}" if at.get("cuda") else ""
    status = "" if content["status"] == "done" else f" **{content['status']}**: {content.get('error', '')}."
    small = " **Tiny sizes, a check of the code and no measurement.**" if content["settings"]["small"] else ""
    return (
        f"{at.get('device_name')}{cuda}; {packages}{found}; {content['settings']['dtype']}; {at.get('date')}, "
        f"revision {at.get('git_revision')} (`gpu/{content['file']}`).{small}{status}"
    )


def _correctness(results: dict[str, Any]) -> list[str]:
    parts = []
    for name, found in results.items():
        if name.startswith("attention"):
            rows = [
                [
                    kernel,
                    *(f"{row[key]:.1e}" if key in row else "" for key in ("local out", "global out", "global lse")),
                    f"{row['control']:.2g}" if "control" in row else "",
                    row["does not run"] if "does not run" in row else verdict(row["within rounding"]),
                ]
                for kernel, row in found.items()
                if kernel != "left_out"
            ]
            header = ["kernel", "local", "global", "lse", "control: local for global", "within rounding"]
            parts.append(f"**{name}**, relative errors against fp64:\n\n{table(header, rows)}")
        else:
            figures = "; ".join(f"{key} {value:.1e}" for key, value in found.items() if not isinstance(value, bool))
            parts.append(f"**{name}**: {figures}; within rounding: {verdict(found['within rounding'])}")
    return parts


def _layer(results: dict[str, Any]) -> list[str]:
    parts = []
    for name, found in results.items():
        rows = [
            [
                variant,
                median_ms(row) if "wall_s" in row else "",
                f"{row['tflops']:.0f}" if row.get("tflops") else "",
                f"{row['peak_extra_mib']:.0f}" if "peak_extra_mib" in row else "",
                errors(row),
            ]
            for variant, row in found["variants"].items()
        ]
        head = f"**{name}**: frames x tokens {found['sizes']}, {found['heads']} heads x {found['head_dim']}."
        parts += [
            head,
            table(["variant", "ms", "TFLOP/s", "peak MiB beyond q, k, v", "error against fp64"], rows),
            "; ".join(f"{key} {value['median']:.3g}" for key, value in found["ratios"].items())
            + (f"; literal SVD / ours {found['svd']['literal SVD / ours']['median']:.3g}" if "svd" in found else ""),
        ]
        parts += _left_out(found)
    return parts


def _left_out(found: dict[str, Any]) -> list[str]:
    """A line with what does not run on this device, and why."""
    reasons = [f"{key} ({why})" for key, why in found["left_out"].items()]
    return [f"Left out: {'; '.join(reasons)}"] if reasons else []


def _steps(results: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            f"{row['wall_s']['median']:.3g}",
            str(row["rounds"]),
            "both" if row["passes"] == 2 else "one, doubled",
            f"{row['peak_gib']:.1f}",
        ]
        for name, row in results.get("steps", {}).items()
    ]
    runs = [
        [
            name,
            ", ".join(f"{count} {mode}" for mode, count in run["steps"].items()),
            f"{run['seconds']:.0f}",
            f"{run.get('over direct', float('nan')):.3g}",
        ]
        for name, run in results.get("runs", {}).items()
    ]
    literal = "; ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key}: {value}"
        for key, value in results.get("literal", {}).items()
    )
    left_out = [f"- {name}: {why}" for name, why in results.items() if isinstance(why, str)]
    left_out += [f"- {name}: {value:.1e}" for name, value in results.items() if isinstance(value, float)]
    return [
        table(["one step", "s", "rounds", "passes measured", "peak GiB"], rows),
        table(["50 steps, from the steps above", "steps", "s", "over direct"], runs),
        f"The paper's fusion by SVD: {literal or NOT_MEASURED}.",
        *(["\n".join(left_out)] if left_out else []),
    ]


def _ranks(results: dict[str, Any]) -> list[str]:
    gpu = read_gpu("h200")
    parts = [
        "What one rank computes; 1 is a P-th part of the whole. With its messages: at the bandwidth that `configs/gpus/` states for "
        f"{gpu.name} within a machine, {gpu.intra_node_gb_s:g} GB/s x {gpu.link_fraction:g}, none of them hidden."
    ]
    for name, found in results.items():
        if isinstance(found, dict):
            rows = [
                [
                    key,
                    median_ms(row),
                    f"{row['tflops']:.0f}" if "tflops" in row else "",
                    f"{row['peak_extra_mib']:.0f}",
                    f"{row['efficiency']:.2f}" if "efficiency" in row else "",
                    f"{efficiency_with_messages(row, SHAPES[name], gpu):.2f}" if "efficiency" in row else "",
                ]
                for key, row in found["rows"].items()
            ]
            header = [
                "share",
                "ms",
                "TFLOP/s",
                "peak MiB beyond its inputs",
                "efficiency",
                "with its messages (predicted)",
            ]
            parts += [f"**{name}**\n\n{table(header, rows)}", *_left_out(found)]
    return parts


def efficiency_with_messages(row: dict[str, Any], shape: Shape, gpu: GpuSpec) -> float:
    """The measured efficiency of a share, with what its rank sends of a full layer in bf16 over the GPU's links; a ring hides its blocks."""
    ranks, seconds, mode = row["ranks"], row["wall_s"]["median"], row["mode"]
    degrees = {"ring": 1, "ulysses": 1} | {row["axis"]: ranks}
    plan = SequencePlan(tokens=shape.num_tokens, heads=shape.heads, **degrees)
    halo = partial(
        window_range,
        num_frames=shape.num_frames,
        frame_tokens=shape.frame_tokens,
        window_frames=shape.window_frames,
    )
    weight = LayerShape(batch=1, head_dim=shape.head_dim, itemsize=2)
    by_rank = layer_bytes_by_rank(plan, "dual" if mode == "fusion" else mode, shape=weight, halo=halo)
    kinds = ("reduce",) if mode == "fusion" else ("all_to_all", "halo", "ring")
    rate = link_rate(ranks, gpu, world=ranks)
    sends = dict.fromkeys((*EXPOSED, "ring"), 0.0)
    sends |= {kind: max(of_rank[kind] for of_rank in by_rank) / rate for kind in kinds}
    waits = waiting_seconds(sends, seconds, blocks=plan.ring) + sends.get("reduce", 0.0)
    return row["efficiency"] * seconds / (seconds + waits)


def _decode(results: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            str(row["latent_frames"]),
            str(row["tiles"]),
            f"{row['seconds_per_latent_frame']:.3g}",
            f"{row['peak_gib']:.2f}" if "peak_gib" in row else "",
        ]
        for name, row in results.items()
    ]
    return [table(["way", "latent frames", "tiles", "s per latent frame", "peak GiB"], rows)]


def _trace(results: dict[str, Any]) -> list[str]:
    rows = [
        [f"`{row['name']}`", str(row["calls"]), f"{row['ms']:.3g}", f"{row['share']:.1%}"]
        for row in results.get("operators", [])[:10]
    ]
    return [table(["operator or kernel", "calls", "ms", "share"], rows)]


def _compiled(results: dict[str, Any]) -> list[str]:
    rows = [
        [name, str(row["graphs"]), str(row["layers"]), f"{row['compiled / eager']['median']:.3g}"]
        for name, row in results.items()
    ]
    return [table(["step", "graphs", "layers", "compiled / eager"], rows)]


def _optional(results: dict[str, Any]) -> list[str]:
    rows = []
    for name, found in results.items():
        if isinstance(found, str):
            continue
        if "not available" in found:
            rows.append([name, "not available", "", "", found["not available"]])
            continue
        ours, other = ("ours", "xfuser") if "xfuser" in found else ("same", "sage")
        seconds = [median_ms(found[key]) for key in (ours, other)]
        ratio = f"{found[f'{other} / {ours}']['median']:.3g}"
        rows.append([name, *seconds, ratio, f"relative difference {found['relative difference']:.1e}"])
    compared = [f"Compared: {results['compared']}."] if "compared" in results else []
    return [*compared, table(["package, layer", "ours, ms", "with the package, ms", "ratio", ""], rows)]


SHOWN: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "correctness": _correctness,
    "layer": _layer,
    "steps": _steps,
    "ranks": _ranks,
    "decode": _decode,
    "trace": _trace,
    "compiled": _compiled,
    "optional": _optional,
}
