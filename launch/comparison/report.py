"""The report of a comparison: index.html, report.json, summary.csv and .md, videos.csv and plots/, written together."""

import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files.tables import write_csv
from engine.files.whole import write_text
from evaluation.study import markdown
from evaluation.study.page import write_page
from evaluation.study.plots import draw_clips, draw_metrics, draw_times, save_figure
from evaluation.study.summary import Row, as_json, clips, comparable, summarise, times
from launch.comparison.checks import is_native
from launch.comparison.kept_measures import add_kept, measure_there
from launch.comparison.measure import Measured, has_world, native_frames, not_world, strange_prompts, units
from launch.comparison.store import Comparison
from launch.outputs import writing_report
from metrics.bootstrap import LEVEL, RESAMPLES
from metrics.similarity import num_clips
from metrics.version import source_digest
from metrics.video import VIDEO_UNITS

_CLIP_TITLES = {
    "clip_colour_similarity": "colour similarity to the first clip",
    "clip_structural_similarity": "SSIM with the first clip",
    "identity_kept": "share of frames with the first clip's shape and colour",
}

# Of what was not the same for all videos: each video of a long comparison may have a commit of its own.
SHOWN_VALUES = 4


class NothingToReportError(UserError):
    """No prompt and seed has a video of every method yet."""


def write_report(comparison: Comparison, *, folder: Path, baseline: str, progress: bool) -> str:
    """Measure what is there, keep the measures, and write the report into `folder`; returns a line that says what it stands on.

    Files are named relative to that folder, so that both may be moved together. Compared are the prompts and seeds that every variant has a video of; NothingToReportError if there are none yet.
    """
    world = has_world(comparison)
    clip_frames = native_frames(comparison)
    labels = [variant.label for variant in comparison.variants]
    found = measure_there(comparison, progress=progress)
    add_kept(comparison, found)
    measured = comparable(found, labels)
    if not measured:
        raise NothingToReportError(
            f"{comparison.folder} has no prompt and seed with a video of every method yet; nothing to report"
        )
    rows = summarise(measured, labels, units(world=world), baseline)
    time = times(measured, labels)
    series = {metric: clips(measured, labels, metric) for metric in _CLIP_TITLES if metric != "identity_kept" or world}
    series = {metric: found for metric, found in series.items() if any(found.values())}
    notes = _notes(comparison, measured, rows, clip_frames=clip_frames, baseline=baseline)
    with writing_report(folder):
        plots = _write_plots(folder / "plots", rows, labels, time, series)
        _write_tables(folder, rows, measured)
        report = {
            "comparison": comparison.describe(),
            "pairs": _pairs(comparison, measured),
            "notes": notes,
            "baseline": baseline,
            "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "unit": "prompt", "seed": 0},
            "noise": {variant.label: variant.config.noise[0] for variant in comparison.variants},
            "world": world,
            "summary": [_row(row) for row in rows],
            "times": time,
            "clips": {
                metric: {label: [as_json(e) for e in each] for label, each in found.items()}
                for metric, found in series.items()
            },
            "videos": [_video(each, folder) for each in measured],
        }
        write_text(folder / "report.json", json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
        page = write_page(
            title=f"{len(labels)} methods, {comparison.config.video.num_frames} frames: {', '.join(labels)}",
            notes=notes,
            videos=_viewer(comparison, measured, folder),
            rows=rows,
            times=time,
            plots=[(path.relative_to(folder).as_posix(), text) for path, text in plots],
        )
        write_text(folder / "index.html", page)
        write_text(folder / "summary.md", markdown.tables(report))
    return f"{folder / 'index.html'}: {notes[0]}"


def _notes(
    comparison: Comparison, measured: Sequence[Measured], rows: Sequence[Row], *, clip_frames: int, baseline: str
) -> list[str]:
    """What the numbers stand on, in sentences."""
    pairs, prompts = _pairs(comparison, measured), {each.video.prompt_index for each in measured}
    partial = f" of {pairs['asked']} asked for (the others are not finished by every method)"
    video, sampler = comparison.config.video, comparison.config.sampler
    notes = [
        f"{len(measured)} videos: {len(comparison.variants)} methods on {pairs['made']} pairs of prompt and seed"
        f"{partial if pairs['made'] < pairs['asked'] else ''}"
        f", {len(prompts)} prompts; differences are from {baseline}.",
        f"{video.num_frames} frames of {video.height} x {video.width}, native are {clip_frames}; "
        f"{sampler.num_steps} steps, guidance {sampler.guidance_scale:g}. The noise of a prompt and seed is the same "
        f"draw for every method; initial noise: {_noises(comparison)}.",
        "Measured on the encoded files. Measures of any video are estimates named as what they compute; "
        "docs/compare.md says how to read each and where it fails.",
        _on_world(comparison),
        *_without_value(rows, num_frames=video.num_frames, clip_frames=clip_frames),
    ]
    if is_native(comparison.config):
        notes.append(
            "No video is longer than the native window, where every method is the base model: what differs is initial noise "
            "and rotary table alone."
        )
    return notes + _kept(comparison, measured) + _mixtures(measured)


def _on_world(comparison: Comparison) -> str:
    """Which videos have exact measures of the embedded world, and why others have none."""
    reason, count = not_world(comparison), len(comparison.prompts)
    if reason is None:
        return "The exact measures of the embedded world are included: every prompt is one of its captions."
    if not has_world(comparison):
        return f"The exact measures of the embedded world do not apply: {reason}."
    known = count - len(strange_prompts(comparison))
    return f"The exact measures of the embedded world are means over {known} of {count} prompts: {reason}."


def _without_value(rows: Sequence[Row], *, num_frames: int, clip_frames: int) -> list[str]:
    """A sentence for the measures that no video has a value of, with the reason."""
    values: dict[str, bool] = {}
    for row in rows:
        values[row.metric] = values.get(row.metric, False) or row.mean.count > 0
    reasons: dict[str, list[str]] = {}
    for metric in (metric for metric, has_value in values.items() if not has_value):
        reasons.setdefault(_why_no_value(metric, num_frames, clip_frames), []).append(metric)
    return [f"No video has a value of {', '.join(metrics)}: {reason}." for reason, metrics in reasons.items()]


def _why_no_value(metric: str, num_frames: int, clip_frames: int) -> str:
    """Why a video of so many frames, of a model whose native length is `clip_frames`, has none; metrics/ has the definitions."""
    if metric.startswith("clip_") and num_clips(num_frames, clip_frames) < 2:
        least = next(count for count in itertools.count(clip_frames) if num_clips(count, clip_frames) > 1)
        return f"{num_frames} frames are one clip of native length ({clip_frames}); from {least} on there are two to compare"
    if metric in ("shape_kept", "colour_kept", "rgb_drift", "background_drift") and num_frames <= clip_frames:
        return f"it is told from the frames after the native length ({clip_frames}), and there are {num_frames} in all"
    if metric.startswith("repetition") and num_frames <= 2 * clip_frames:
        return f"it needs more than two native lengths, {2 * clip_frames} frames, and there are {num_frames}"
    if metric == "repetition_straight":
        return "no prompt is a caption of straight motion, or the object is seen too seldom"
    if metric in VIDEO_UNITS:
        return f"{num_frames} frames are too few to compare"
    return "no object of the world is seen where it is told from"


def _kept(comparison: Comparison, measured: Sequence[Measured]) -> list[str]:
    """Sentences on videos of which only the measures are here."""
    gone = sum(not each.video.is_done for each in measured)
    here = source_digest()
    older = sum(each.version != here for each in measured)
    notes = [f"{gone} of the videos are not here: their measures are kept in {comparison.kept_file}."] if gone else []
    if older:
        notes.append(f"{older} videos were measured by another version of metrics/ or of its libraries than is here.")
    return notes


def _pairs(comparison: Comparison, measured: Sequence[Measured]) -> dict[str, int]:
    """Pairs of prompt and seed: those that are compared, and those that were asked for."""
    made = {(each.video.prompt_index, each.video.seed) for each in measured}
    return {"made": len(made), "asked": len(comparison.prompts) * len(comparison.seeds)}


def _noises(comparison: Comparison) -> str:
    """The initial noise of each variant, or one word if all have the same."""
    words = {variant.label: variant.config.noise[0] for variant in comparison.variants}
    if len(set(words.values())) == 1:
        return f"{next(iter(words.values()))} for all"
    return ", ".join(f"{label} {word}" for label, word in words.items())


def _mixtures(measured: Sequence[Measured]) -> list[str]:
    """Sentences about what was not the same for all videos, such as the weights, the device or the commit."""
    kinds: dict[str, Iterable[str]] = {
        "devices": (
            f"{each.record['device']['name']} with {each.record['device']['cpu_threads']} threads" for each in measured
        ),
        "numbers of ranks": (str(each.record["parallel"]["ranks"]) for each in measured),
        "commits": (str((each.record["git"] or {}).get("revision", "unknown"))[:12] for each in measured),
        "versions of torch": (str(each.record["versions"]["torch"]) for each in measured),
    }
    found = {what: sorted(set(values)) for what, values in kinds.items()}
    return _mixed_weights(measured) + [
        f"The videos were made on different {what}: {_some(values)}; compare times with care."
        for what, values in found.items()
        if len(values) > 1
    ]


def _some(values: Sequence[str]) -> str:
    """The first few of many."""
    more = f" and {len(values) - SHOWN_VALUES} more" if len(values) > SHOWN_VALUES else ""
    return f"{', '.join(values[:SHOWN_VALUES])}{more}"


def _mixed_weights(measured: Sequence[Measured]) -> list[str]:
    """A sentence that names every file of the checkpoint, or its commit, that was not the same for all videos."""
    tellings = [_weights(each.record["model"]) for each in measured]
    mixed = []
    for name in sorted({name for telling in tellings for name in telling}):
        counts = Counter(telling.get(name, "none") for telling in tellings)
        if len(counts) > 1:
            mixed.append(f"{name} {', '.join(f'{value[:12]} of {count}' for value, count in sorted(counts.items()))}")
    if not mixed:
        return []
    return [
        f"The videos were made with different weights and must not be compared: {'; '.join(mixed)} videos; "
        "delete those of one checkpoint, records and kept measures too, and make them again."
    ]


def _weights(model: dict[str, Any]) -> dict[str, str]:
    """What a record says of where its weights came from: the commit, and the SHA-256 of each file by name."""
    single = model.get("single_file")
    commit = {"commit": model["commit"]} if "commit" in model else {}
    return commit | model.get("sha256", {}) | ({single["name"]: single["sha256"]} if single else {})


def _beside(path: Path, folder: Path) -> str:
    """A file's address relative to the report's folder, with forward slashes."""
    return Path(os.path.relpath(path, folder)).as_posix()


def _viewer(comparison: Comparison, measured: Sequence[Measured], folder: Path) -> dict[str, Any]:
    """What the page plays, by prompt and seed, files relative to the page; what is not here is left out."""
    prompts: dict[int, dict[int, list[dict[str, str]]]] = {}
    events: dict[int, list[dict[str, Any]]] = {}
    for each in measured:
        if not each.video.is_done:
            continue
        file = _beside(each.video.files.video, folder)
        of_seed = prompts.setdefault(each.video.prompt_index, {}).setdefault(each.video.seed, [])
        of_seed.append({"label": each.video.label, "file": file})
        told = each.record.get("timeline") or []
        events[each.video.prompt_index] = [{name: event[name] for name in ("text", "start", "stop")} for event in told]
    return {
        "fps": comparison.config.video.fps,
        "prompts": [
            {
                "text": f"{index:03d} {comparison.prompts[index]}",
                "events": events[index],
                "seeds": [{"seed": seed, "videos": videos} for seed, videos in sorted(seeds.items())],
            }
            for index, seeds in sorted(prompts.items())
        ],
    }


def _write_plots(
    folder: Path, rows: Sequence[Row], labels: Sequence[str], time: dict[str, Any], series: dict[str, Any]
) -> list[tuple[Path, str]]:
    figures = [
        ("metrics", draw_metrics(rows, labels), "every measure: mean over prompts and 95 % interval"),
        ("times", draw_times(time), "time of denoising"),
    ]
    if series:
        figures.append(
            ("clips", draw_clips(series, _CLIP_TITLES), "clip after clip: mean over prompts and 95 % interval")
        )
    return [(save_figure(figure, folder / name)[0], text) for name, figure, text in figures]


def _write_tables(folder: Path, rows: Sequence[Row], measured: Sequence[Measured]) -> None:
    write_csv(folder / "summary.csv", [_flat_row(row) for row in rows])
    write_csv(folder / "videos.csv", [_flat_video(each, folder) for each in measured])


def _flat_row(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {"label": row.label, "metric": row.metric, "unit": row.unit}
    flat |= as_json(row.mean) or {}
    found = as_json(row.difference) or dict.fromkeys(("mean", "low", "high", "count"))
    return flat | {f"difference_{key}": value for key, value in found.items()} | {"differs": row.differs}


def _flat_video(each: Measured, folder: Path) -> dict[str, Any]:
    shown = _video(each, folder)
    return {key: shown[key] for key in ("label", "prompt_index", "seed", "file")} | {
        "denoise_seconds": each.record["seconds"]["denoise"],
        **shown["values"],
    }


def _row(row: Row) -> dict[str, Any]:
    shown = {"label": row.label, "metric": row.metric, "unit": row.unit, "differs": row.differs}
    return shown | {"mean": as_json(row.mean), "difference": as_json(row.difference)}


def _video(each: Measured, folder: Path) -> dict[str, Any]:
    return {
        "label": each.video.label,
        "prompt_index": each.video.prompt_index,
        "prompt": each.video.prompt,
        "seed": each.video.seed,
        "file": _beside(each.video.files.video, folder) if each.video.is_done else None,
        "values": {name: None if math.isnan(value) else value for name, value in each.values.items()},
        "by_clip": each.by_clip,
        "resumed_at": each.record["resumed_at"],
    }
