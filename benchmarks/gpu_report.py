"""The GPU tables of docs/performance.md, from the files that benchmarks/gpu.py writes."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, SHAPES, Shape
from benchmarks.tables import NOT_MEASURED, table, verdict
from engine.planner.gpu import EIGH_DIM, GpuSpec, read_gpu
from engine.planner.timing import EXPOSED, link_rate, waiting_seconds
from freespec.windows import window_range
from parallel.shards import LayerShape, SequencePlan, layer_bytes_by_rank

FOLDER = RESULTS / "gpu"
Files = dict[str, dict[str, Any]]

# Sections in order, and where their results have the rows of a table: a pattern of the path to them.
ROWS = {
    "correctness": "[^/]+",
    "layer": "[^/]+/variants",
    "steps": "steps|runs",
    "ranks": "[^/]+/rows",
    "decode": "",
    "trace": "operators",
    "compiled": "",
    "optional": "",
}
_MESSAGES = (
    "What one rank computes; 1 is a P-th part of the whole. With its messages: at the bandwidth that `configs/gpus/` states for "
    "{gpu.name} within a machine, {gpu.intra_node_gb_s:g} GB/s x {gpu.link_fraction:g}, none of them hidden."
)

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
    ("dual with 1/8 of the far keys / global attention", "layer", ("wan", "ratios", "far / global"), "<=", 0.45),
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
    "dual / global attention, full Wan layer": "1.07 (13 tiles of 128 queries for 12.2)",
    "dual / global attention, LTX layer": "1.16 (3 tiles of 128 queries for 2.6)",
    "Triton / strided dual (kept if it wins by 3 %)": "0.94 (its tiles cross frames)",
    "dual with 1/8 of the far keys / global attention": "0.352 (operations)",
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
            f"{fusion * rate / dual:.3f} with {kernel}" for kernel, rate in gpu.attention_fraction.items()
        )
        rows[what] = f"{found}; `eigh` {gpu.eigh_seconds * shape.head_dim / EIGH_DIM * 1e3:.0f} ms"
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
        return ["Not measured: there are no files of `benchmarks/gpu.py`."]
    parts = []
    for name in ROWS:
        found = files.get(name)
        parts += [f"### {name}", *([_provenance(found), *show(name, found["results"])] if found else ["Not measured."])]
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


def show(section: str, results: dict[str, Any]) -> list[str]:
    """A section's tables, whose rows are where `ROWS` says, and every other figure as a line of a list."""
    if section == "ranks":
        return [_MESSAGES.format(gpu=read_gpu("h200")), *_parts(_with_messages(results), ROWS[section], ())]
    return _parts(results, ROWS[section], ())


def _parts(tree: dict[str, Any], where: str, at: tuple[str, ...]) -> list[str]:
    if re.fullmatch(where, "/".join(at)):
        return [_rows_table(tree, at), *_parts(tree.get("left_out", {}), where, (*at, "left_out"))]
    groups = {name: value for name, value in tree.items() if isinstance(value, dict) and "median" not in value}
    lines = [f"- {', '.join((*at, name))}: {_cell(value)}" for name, value in tree.items() if name not in groups]
    inner = [part for name, group in groups.items() for part in _parts(group, where, (*at, name))]
    return ["\n".join(lines), *inner] if lines else inner


def _rows_table(tree: dict[str, Any], at: tuple[str, ...]) -> str:
    rows = {name: _flat(row) for name, row in tree.items() if name != "left_out"}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    return table([", ".join(at), *columns], cells)


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """The cells of a row by column; groups within it (errors of both branches) have a column for each of theirs."""
    if isinstance(value, dict) and "median" not in value:
        return {column: text for key, each in value.items() for column, text in _flat(each, f"{name} {key}").items()}
    return {name.strip() or "value": _cell(value)}


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        value = value["median"]
    if isinstance(value, bool):
        return verdict(value)
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def _with_messages(results: dict[str, Any]) -> dict[str, Any]:
    """The results of the section `ranks` with a predicted column."""
    gpu, found = read_gpu("h200"), {}
    for name, of_model in results.items():
        found[name] = of_model
        if isinstance(of_model, dict):
            rows = {key: dict(row) for key, row in of_model["rows"].items()}
            for row in rows.values():
                if "efficiency" in row:
                    row["efficiency with messages (predicted)"] = efficiency_with_messages(row, SHAPES[name], gpu)
            found[name] = of_model | {"rows": rows}
    return found


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
