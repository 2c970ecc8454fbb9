"""Tables and plots of an analysis: CSV, PNG and SVG, and a summary in report.json."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.files.claims import writing_report
from engine.files.tables import write_csv
from engine.files.trees import finite_or_none
from engine.files.whole import write_text
from engine.media.contact_sheet import spaced
from engine.media.read_video import read_frames
from evaluation.analysis.layers import choose_layers, layer_file, layer_rows, layer_summary, preset_of
from evaluation.analysis.plots import (
    Strip,
    draw_flows,
    draw_frames,
    draw_heads,
    draw_low_rank,
    draw_progress,
    draw_windows,
)
from evaluation.analysis.spectra import Rows, SpectraStore, concentration, mean_and_error, over_prompts
from evaluation.comparison.kept_measures import measure_every
from evaluation.comparison.measure import Measured, not_world
from evaluation.comparison.plots import save_figure
from evaluation.comparison.store import Comparison
from evaluation.measure import Measurer
from metrics.bootstrap import paired_interval
from metrics.video import VIDEO_UNITS

_SHOWN = ("flow_mean", "flow_strongest", "laplacian_variance", "interpolation_error")
_MOMENTS = 6


def write_analysis(
    folder: Path,
    spectra: SpectraStore,
    low_rank: Comparison | None,
    ratios: dict[str, float],
    *,
    layers: Comparison | None,
    made_with: dict[str, Any],
    measurer: Measurer,
) -> str:
    """Write all tables and plots; returns a line with the folder and whether the rank falls.

    Comparisons are None if none of their videos are asked for; `made_with` are the settings, method, checkpoint and prompts for report.json.
    """
    with writing_report(folder):
        spectra_summary = _write_spectra(folder, spectra.read())
        report: dict[str, Any] = {"comparison": made_with, "spectra": spectra_summary}
        if low_rank is not None:
            measured = measure_every(low_rank, measurer=measurer)
            report["low_rank"] = _write_low_rank(folder, low_rank, measured, ratios)
        if layers is not None:
            report["layers"] = _write_layers(folder, layers, measure_every(layers, measurer=measurer), made_with)
        text = json.dumps(report, indent=2, allow_nan=False)
        write_text(folder / "report.json", text + "\n")
    late = spectra_summary["stages"]["late"]["windows"]
    native, widest = late[0]["mean"]["mean"], late[-1]["mean"]["mean"]
    return (
        f"{folder}: effective rank late in the run {native:.2f} at the native window, {widest:.2f} at "
        f"{late[-1]['multiple']:g} x native; it falls in {100 * spectra_summary['heads_that_fall']:.0f} % of the heads"
    )


def _write_spectra(folder: Path, rows: Rows) -> dict[str, Any]:
    write_csv(folder / "spectra.csv", rows)
    write_csv(
        folder / "spectra-progress.csv",
        over_prompts(rows, ("multiple", "window_frames", "step", "progress", "timestep")),
    )
    heads = ("layer", "head", "multiple", "window_frames")
    write_csv(folder / "spectra-heads.csv", over_prompts(rows, heads))
    write_csv(folder / "spectra-heads-progress.csv", over_prompts(rows, (*heads, "step", "progress", "timestep")))
    save_figure(draw_progress(rows), folder / "rank-progress")
    save_figure(draw_windows(rows), folder / "rank-windows")
    save_figure(draw_heads(rows), folder / "rank-heads")
    return concentration(rows)


def _write_low_rank(
    folder: Path, comparison: Comparison, measured: Sequence[Measured], ratios: dict[str, float]
) -> Rows:
    table = [
        {"ratio": ratios[each.video.label], "prompt": each.video.prompt_index, "seed": each.video.seed}
        | {name: each.values[name] for name in VIDEO_UNITS}
        for each in measured
    ]
    write_csv(folder / "low-rank.csv", table)
    summary = low_rank_summary(table)
    write_csv(folder / "low-rank-summary.csv", summary)
    save_figure(draw_low_rank(summary, [(name, VIDEO_UNITS[name]) for name in _SHOWN]), folder / "low-rank-measures")
    for index, prompt in enumerate(comparison.prompts):
        strips = [_strip(each, ratios) for each in measured if each.video.prompt_index == index]
        moments = spaced(len(strips[0].frames), _MOMENTS)
        save_figure(draw_frames(strips, moments, title=prompt), folder / f"low-rank-frames-{index:03d}")
        save_figure(draw_flows(strips, moments, title=prompt), folder / f"low-rank-flows-{index:03d}")
    return _finite(summary)


def _write_layers(
    folder: Path, comparison: Comparison, measured: Sequence[Measured], made_with: dict[str, Any]
) -> dict[str, Any]:
    rows = layer_rows(measured, world=not_world(comparison) is None)
    summary = layer_summary(rows)
    chosen = choose_layers(summary)
    write_csv(folder / "layers.csv", rows)
    write_csv(folder / "layers-summary.csv", summary)
    checkpoint = made_with["settings"]["checkpoint"]
    write_text(layer_file(folder), preset_of(chosen, checkpoint=checkpoint, prompts=len(comparison.prompts)))
    return {"means": _finite(summary), "chosen": chosen}


def _finite(rows: Rows) -> Rows:
    """Rows for JSON, which lacks nan."""
    return [{key: finite_or_none(x) if isinstance(x, float) else x for key, x in row.items()} for row in rows]


def low_rank_summary(table: Rows) -> Rows:
    """Mean and standard error of each measure at each ratio, and its difference from the largest ratio, paired by prompt.

    `difference`, `low` and `high` are nan where no prompt has both, the last two for fewer than six prompts. `table` has one row
    for each prompt and ratio.
    """
    prompts = list(dict.fromkeys(row["prompt"] for row in table))
    ratios = sorted({row["ratio"] for row in table}, reverse=True)
    at = {(row["prompt"], row["ratio"]): row for row in table}
    summary: Rows = []
    for ratio in ratios:
        for metric, unit in VIDEO_UNITS.items():
            values, whole = (np.array([at[prompt, each][metric] for prompt in prompts]) for each in (ratio, ratios[0]))
            found = values[np.isfinite(values)].tolist()
            if not found:
                continue
            mean, error = mean_and_error(found)
            paired = paired_interval(values, whole)
            row = {"ratio": ratio, "metric": metric, "unit": unit, "mean": mean, "error": error, "prompts": len(found)}
            summary.append(row | {"difference": paired.mean, "low": paired.low, "high": paired.high})
    return summary


def _strip(each: Measured, ratios: dict[str, float]) -> Strip:
    frames = read_frames(each.video.files.video)
    note = f"flow {each.values['flow_mean']:.2f} px/frame"
    return Strip(name=f"{100 * ratios[each.video.label]:g} % kept", note=note, frames=frames)
