"""Write docs/performance.md from the JSON files in benchmarks/results/: what was expected beside what was measured.

python -m benchmarks.report
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_report, published
from benchmarks.measure import RESULTS, ROOT
from benchmarks.predicted import predicted_table
from engine.config import RunConfig
from engine.files.tables import emptier
from engine.planner.gpu import read_gpu
from freespec.methods import METHODS
from launch.cli.parser import parse_run

PREDICTED = tuple(ROOT / "configs" / f"{name}.yaml" for name in ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "ltx-video-2b"))
PAGE = ROOT / "docs" / "performance.md"
BENCHMARKS = ("attention", "fusion", "parallel", "memory", "timeline")
BY_SHAPE = ("attention", "fusion")  # one result for each shape
DEVICES = ("cpu", "cuda")
Run = dict[str, Any]
NOT_MEASURED = "not measured"
PEAKS = ("global", "dual", "masked")
PARTS = ("grams", "eigh", "apply")  # of a fusion
EFFICIENCY_GOAL = 0.9
MARKS = "abcdefgh"  # of footnotes

INTRO = """# Performance

Written by `python -m benchmarks.report` from the files in `benchmarks/results/`, which have every variant and spread; do not edit.

```bash
make bench        # on a CPU, less than five minutes: attention, fusion, ranks, memory, timelines, and this page
make bench-gpu    # on a GPU, less than nine minutes, without a network: benchmarks/gpu.py, and this page
```

Every variant runs once per round. Times are medians over rounds, ratios medians of the ratios within a round. CPU time is the fairer ratio on a
machine that does other work. What was tried and dropped is in [decisions.md](decisions.md).
"""

# What must hold: benchmark, device, shapes (the first that was measured counts), ratio, largest value.
EXPECTED = [
    ("attention", "cpu", ("wan", "wan-short"), "dual / global", 1.3),
    ("attention", "cpu", ("wan", "wan-short"), "dual / two calls", 1.0),
    ("fusion", "cpu", ("wan", "wan-short"), "fusion / SVD in fp32", 0.2),
    *(
        ("timeline", "cpu", (model,), f"{how} / plain", 1.05)
        for model in ("tiny-wan", "tiny-ltx")
        for how in ("cut", "scene", "fade", "relay")
    ),
]


def latest() -> dict[tuple[str, str], Run]:
    """The newest file of each benchmark and device, by the date in its name.

    Shapes that only older files have measured stay, as runs of their own in `older`.
    """
    runs: dict[tuple[str, str], Run] = {}
    files = [path for name in BENCHMARKS for path in RESULTS.glob(f"{name}-*.json")]
    for path in sorted(files, key=lambda path: path.stem[-10:]):
        run = json.loads(path.read_text()) | {"file": path.name}
        key = run["benchmark"], run["environment"]["device"]
        before = [runs[key], *runs[key]["older"]] if key in runs else []
        runs[key] = run | {"older": _not_in(run["results"], before) if run["benchmark"] in BY_SHAPE else []}
    return runs


def _not_in(results: list[dict[str, Any]], runs: list[Run]) -> list[Run]:
    shapes, kept = {result["shape"] for result in results}, []
    for run in runs:
        rest = [result for result in run["results"] if result["shape"] not in shapes]
        shapes |= {result["shape"] for result in rest}
        kept += [run | {"results": rest}] if rest else []
    return kept


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def expectations(runs: dict[tuple[str, str], Run]) -> str:
    """The figures to reach, and whether they are reached."""
    rows = []
    for benchmark, device, shapes, name, limit in EXPECTED:
        newest = runs.get((benchmark, device))
        every = [newest, *newest["older"]] if newest else []
        by_shape = {result["shape"]: result for run in every for result in run["results"]}
        found = [by_shape[shape] for shape in shapes if shape in by_shape and name in by_shape[shape]["ratios"]]
        cells = [NOT_MEASURED, ""]
        if found:
            value = found[0]["ratios"][name]
            wall, cpu = value["wall_s"]["median"], value["cpu_s"]["median"]
            [shown] = ratios(found[0], [name])
            cells = [shown, verdict(wall, cpu, limit, device)]
        where = f"{device.upper()}, {found[0]['shape'] if found else shapes[0]}"
        rows.append([name, where, f"<= {limit}", *cells])
    return table(["ratio", "where", "expected", "time (CPU time)", "holds"], rows)


def verdict(wall: float, cpu: float, limit: float, device: str) -> str:
    """Both clocks must agree; where only one is within the limit, the page says which."""
    if device == "cuda" or (wall <= limit) == (cpu <= limit):
        return "yes" if wall <= limit else "**no**"
    return "in CPU time only" if cpu <= limit else "in time only"


def provenance(run: Run) -> str:
    """One paragraph: device, versions, date and load."""
    at, settings = run["environment"], run["settings"]
    cuda = f", CUDA {at['cuda']}" if at["cuda"] else f", {at['threads']} threads on {at['cores']} cores"
    text = (
        f"{at['device_name']}{cuda}; torch {at['torch']}, {settings['dtype']}, {settings['repeats']} rounds; {at['date']}, revision "
        f"{at['git_revision'] or 'unknown'}; load average {at['load_average']:.1f} to {at['load_average_end']:.1f}"
    )
    return f"{text}{'; ' + at['note'] if at['note'] else ''} (`{run['file']}`)."


def section(title: str, benchmark: str, runs: dict[tuple[str, str], Run], show: Callable[[Run], str]) -> list[str]:
    """All devices of one benchmark."""
    parts = [f"## {title}"]
    for device in DEVICES:
        run = runs.get((benchmark, device))
        for each in [run, *run["older"]] if run else []:
            parts += [show(each), provenance(each)]
        if run is None:
            parts.append(f"{'GPU' if device == 'cuda' else 'CPU'}: {NOT_MEASURED}.")
    return parts


def layer(result: dict[str, Any]) -> list[str]:
    """Which layer was measured, as cells of a row."""
    return [result["shape"], result["sizes"], f"{result['heads']} x {result['head_dim']}"]


def ratios(result: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Ratios of times, and of CPU times in parentheses."""
    found = [result["ratios"].get(name) for name in names]
    return [f"{each['wall_s']['median']:.3g} ({each['cpu_s']['median']:.3g})" if each else "" for each in found]


def attention(run: Run) -> str:
    """Every shape of the attention benchmark in a row."""
    names = ["local / global", "two calls / global", "dual / global", "dual / two calls"]
    rows = []
    for result in run["results"]:
        variants = result["variants"]
        peaks = " / ".join(f"{variants[name]['peak_extra_mib']:.0f}" for name in PEAKS)
        error = max(variants["dual"]["error"].values())
        rows.append([*layer(result), *ratios(result, names), peaks, f"{error:.1e}"])
    header = ["layer", "frames x tokens", "heads x D", *names, f"MiB beyond q, k, v: {' / '.join(PEAKS)}"]
    return table([*header, "error of dual against fp64"], rows)


def fusion(run: Run) -> str:
    """Every shape of the fusion benchmark in a row."""
    names = ["fusion / SVD in fp32", "fusion / SVD in fp64", "fusion / dual attention"]
    rows = []
    for result in run["results"]:
        parts = " + ".join(milliseconds(result["variants"][name]["wall_s"]["median"]) for name in PARTS)
        errors = [f"{result['variants'][name]['error']:.1e}" for name in ("fusion", "SVD in fp32")]
        rows.append([*layer(result), parts, *ratios(result, names), *errors])
    header = ["layer", "frames x tokens", "heads x D", f"ms: {' + '.join(PARTS)}", *names]
    return table([*header, "error against the SVD in fp64", "error of the SVD in fp32"], rows)


def milliseconds(seconds: float) -> str:
    """Three digits, and no exponent."""
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def parallel(runs: dict[tuple[str, str], Run], device: str) -> str:
    """Times of every layout, the rates of every collective, and whether the planned bytes were sent."""
    run = runs.get(("parallel", device))
    if run is None:
        return f"{'GPU' if device == 'cuda' else 'CPU'}: {NOT_MEASURED}."
    modes = list(dict.fromkeys(row["mode"] for row in run["results"]))
    layouts: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in run["results"]:
        # files from before the predictions have none
        ratio = f" ({row['measured_over_predicted']:.2g})" if row.get("measured_over_predicted") else ""
        layout = row["shape"], row["ranks"], f"{row['ring']} x {row['ulysses']}"
        layouts.setdefault(layout, {})[row["mode"]] = f"{row['ms']:.3g}{ratio}"
    rows = [[*map(str, layout), *(found.get(mode, "") for mode in modes)] for layout, found in layouts.items()]
    header = ["layer", "ranks", "ring x ulysses", *(f"{mode}, ms (of predicted)" for mode in modes)]
    planned = [row.get("bytes_as_planned") for row in run["results"]]
    sent = f"Bytes that were sent as planned, exactly: {planned.count(True)} of {len(planned)} rows."
    by_ranks = run["settings"]["gb_per_second"]
    kinds = list(next(iter(by_ranks.values()), {}))
    rates = [[ranks, *(f"{by_kind[kind]:.2f}" for kind in kinds)] for ranks, by_kind in by_ranks.items()]
    links = table(["ranks", *(f"{kind.replace('_', '-')} GB/s" for kind in kinds)], rates) if rates else ""
    return "\n\n".join(part for part in (table(header, rows), sent, links, provenance(run)) if part)


def scaling(runs: dict[tuple[str, str], Run]) -> str:
    """What several GPUs would reach by one GPU's measured compute and the links that its description states."""
    run = runs.get(("parallel", "cuda"))
    if run is None:
        return ""
    links = run["settings"].get("links")
    if links is None:
        return f"The links of this GPU are not described in `configs/gpus/`, so nothing is predicted (`{run['file']}`)."
    rows = [
        [
            f"{row['shape']} {row['mode']}",
            str(row["ranks"]),
            f"{row['ms']:.3g}",
            f"{sum(row['bytes'].values()) / 1e6:.1f}",
            f"{row['with_links_ms']:.3g}",
            f"{row['efficiency']:.0%}" if row["efficiency"] else "",
        ]
        for row in run["results"]
        if row["ranks"] > 1
    ]
    header = [
        "layer",
        "GPUs",
        "compute of the busiest, ms (measured)",
        "sends, MB",
        "with its messages, ms (predicted)",
    ]
    text = (
        f"Messages at {links['intra_node_gb_s']:g} GB/s x {links['link_fraction']:g}, as `configs/gpus/` states for {links['gpu']} "
        f"within a machine; nothing but a ring's blocks is taken to be hidden (`{run['file']}`)."
    )
    return f"{table([*header, 'efficiency (predicted)'], rows)}\n\n{text}"


def memory(runs: dict[tuple[str, str], Run]) -> str:
    """Peaks of a step, counted on tensors without numbers."""
    run = runs.get(("memory", "cpu"))
    if run is None:
        return "Not counted."
    rows = [
        [
            row["model"].partition("/")[2],
            f"{row['ring']} x {row['ulysses']}",
            *(f"{row['gib'][mode]:.2f}" for mode in ("global", "local", "dual")),
            f"{row['ratios']['dual / global']:.3f}",
            f"{row['weights_gib']:.1f}",
            f"{row['ratios']['with weights']:.3f}",
        ]
        for row in run["results"]
    ]
    header = ["model, 321 frames", "ring x ulysses", "global, GiB", "local, GiB", "dual, GiB", "dual / global"]
    return table([*header, "weights, GiB", "dual / global with weights"], rows) + f"\n\n(`{run['file']}`)"


@functools.cache
def predicted_ratios() -> dict[str, str]:
    """What the planner says of the ratios that a GPU should show: Wan2.1-1.3B on one H200."""
    step = load_preset(PREDICTED[0], "--method.freespec.domain", "step")
    found = {}
    for name, config in (("step, 0.5", step), ("default: timestep", load_preset(PREDICTED[0]))):
        [row] = predicted_table([config], [read_gpu("h200")], world_sizes=(1,))
        found[f"FreeSpec ({name}) / direct, 50 steps"] = f"{row['seconds_freespec'] / row['seconds_direct']:.2f}"
        found["sliding_window / direct, 50 steps"] = f"{row['seconds_sliding_window'] / row['seconds_direct']:.2f}"
    return found


@functools.cache
def eight_gpus() -> list[list[str]]:
    """The predicted efficiency of eight GPUs, as rows of goals: it stays a prediction on one GPU."""
    rows = []
    for preset, what in ((PREDICTED[0], ""), (PREDICTED[2], ", LTX-Video 2B at 481 frames")):
        [row] = predicted_table([load_preset(preset)], [read_gpu("h200")], world_sizes=(8,))
        efficiency = row["efficiency_freespec"]
        holds = "yes" if efficiency >= EFFICIENCY_GOAL else "**no**"
        predicted = f"{efficiency:.2f} ({row['degrees']})"
        name = f"efficiency of 8 GPUs, FreeSpec{what}"
        rows.append([name, f">= {EFFICIENCY_GOAL}", predicted, "predicted only", f"{holds}, as predicted", ""])
    return rows


@functools.cache
def predictions() -> str:
    """What the planner says of whole runs; nothing in it is measured."""
    configs = [load_preset(path) for path in PREDICTED]
    found = predicted_table(configs, [read_gpu("h200"), read_gpu("a100")], world_sizes=(1, 8))
    others = dict.fromkeys(degrees for row in found for degrees, _ in row["elsewhere"].values())
    marks = dict(zip(others, MARKS, strict=False))
    rows = [
        [
            f"{row['model'].partition('/')[2].removesuffix('-Diffusers')}, {row['num_frames']}",
            row["gpu"],
            str(row["gpus"]),
            " x ".join(re.findall(r"\d+", row["degrees"])) + ("" if row["fits"] else " (does not fit)"),
            f"{row['peak_gib']:.1f}",
            *(predicted_minutes(row, name, marks) for name in METHODS),
            f"{row['efficiency_freespec']:.0%}",
        ]
        for row in found
    ]
    header = ["model, frames", "GPU", "GPUs", "cfg x ring x ulysses", "peak GiB"]
    header += [f"{name}, min" for name in METHODS] + ["efficiency, freespec"]
    notes = [f"{mark}: on {degrees}, the fastest that the method can have." for degrees, mark in marks.items()]
    return "\n\n".join([table(header, rows), *notes])


def predicted_minutes(row: dict[str, Any], name: str, marks: dict[str, str]) -> str:
    """A method's minutes on the row's layout, or with a mark on the best that it can have instead."""
    if f"seconds_{name}" in row:
        return f"{row[f'seconds_{name}'] / 60:.1f}"
    if name not in row["elsewhere"]:
        return "-"
    degrees, seconds = row["elsewhere"][name]
    return f"{seconds / 60:.1f} ({marks[degrees]})"


def load_preset(path: Path, *overrides: str) -> RunConfig:
    """A preset as the commands read it."""
    _, config = parse_run(
        ["--config", str(path), *overrides], name="report", description="", add_arguments=lambda parser: None
    )
    return config


def page() -> str:
    """The text of docs/performance.md."""
    runs, gpu = latest(), gpu_report.read()
    parts = [
        INTRO.strip(),
        "## Goals on a GPU",
        "Wan2.1-1.3B at 321 frames (81 latent frames of 1,560 tokens, 30 layers, both passes), each a ratio within one run. "
        "Predictions are sums from `configs/gpus/h200.json`.",
        table(
            ["what", "goal", "predicted", "measured", "holds", "file"],
            [*gpu_report.goals(gpu, predicted_ratios()), *eight_gpus()],
        ),
        "## Expected and measured",
        "`plain` is the denoising of one prompt, the others of two events of a timeline.",
        expectations(runs),
        *(provenance(run) for (benchmark, _), run in runs.items() if benchmark == "timeline"),
        *section("Attention", "attention", runs, attention),
        *section("Fusion", "fusion", runs, fusion),
        "## Ranks",
        "Processes of one machine over gloo: bytes are those of any machine; with more ranks than cores times show overhead, not scaling. "
        "Predicted is one rank's time, times the busiest rank's share (no less than the cores allow), plus bytes over the measured rates, which "
        "are of 16 MiB a rank, and for `reduce` of the Gram matrices of Wan2.1-1.3B.",
        parallel(runs, "cpu"),
        parallel(runs, "cuda"),
        scaling(runs),
        "## Memory",
        "Peak of a forward of one block beyond its inputs, counted on meta tensors; blocks are alike and free their buffers. On a ring a dual "
        "step also holds the keys of its windows.",
        memory(runs),
        "## GPU, section by section",
        *gpu_report.sections(gpu, table),
        "## Predicted whole runs",
        "**Predicted, not measured**, from datasheets and assumed fractions of their peaks (`configs/gpus/`). Minutes of denoising with default "
        "settings; peak GiB on the busiest GPU: weights in bf16, the text encoder (GPU 0), and the worst moment of a forward or of decoding. "
        "`launch/plan.py` prints the same for your video, GPU and every layout.",
        predictions(),
        "### Predicted beside published",
        "Dense attention with both passes on one GPU; the same model predicts what others have published. A figure that is off by "
        f"more than {published.BAND:.0%} fails `tests/benchmarks/test_published.py`.",
        table(["run", "kernel", "predicted", "published", "ratio", "source"], published.rows()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page; with tables fewer than it has, only if `--overwrite` is given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a page that has more tables than this one would"
    )
    options, text = parser.parse_args(argv), page()
    lost = emptier(PAGE.read_text(encoding="utf-8"), text) if PAGE.exists() and not options.overwrite else []
    if lost:
        sys.exit(
            f"error: {PAGE} has tables of more than {RESULTS} holds ({'; '.join(lost)}), and stays as it is; add --overwrite to replace it"
        )
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
