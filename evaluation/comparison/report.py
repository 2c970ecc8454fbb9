"""The report on compared videos: index.html, report.json, summary.csv and .md, videos.csv and plots/, written together."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files.claims import writing_report
from engine.files.tables import write_csv
from engine.files.trees import finite_or_none
from engine.files.whole import write_text
from evaluation import markdown
from evaluation.comparison.kept_measures import add_kept, measure_there
from evaluation.comparison.measure import Measured, has_world, not_world, strange_prompts, units_of
from evaluation.comparison.page import write_page
from evaluation.comparison.plots import draw_clips, draw_metrics, draw_times, save_figure
from evaluation.comparison.store import Comparison
from evaluation.comparison.summary import Row, as_json, clips, comparable, summarise, times
from evaluation.events import version_of
from evaluation.measure import Measurer
from metrics.bootstrap import LEVEL, RESAMPLES
from metrics.course import READING
from metrics.similarity import num_clips
from metrics.video import VIDEO_UNITS

_CLIP_TITLES = {
    "clip_colour_similarity": "colour similarity to the first clip",
    "clip_structural_similarity": "SSIM with the first clip",
    "identity_kept": "share of frames with the first clip's shape and colour",
}

# Why no video has a value of a measure, whatever its length.
_NO_VALUE = {
    "repetition_straight": "no prompt is a caption of straight motion, or the object is seen too seldom",
    "moves": "no event moves straight for long enough",
    "kept": "no two neighbouring events share shape, colour or background",
    "switch": "nothing that is seen in a frame changes between two events",
}

# Values listed of what differs between videos, such as the commits of a long comparison.
SHOWN_VALUES = 4


class NothingToReportError(UserError):
    """No prompt and seed has a video of every method yet."""


def write_report(comparison: Comparison, *, folder: Path, baseline: str, measurer: Measurer) -> str:
    """Measure the videos, keep the measures, and write the report into `folder`; return a line that summarises it.

    Compares prompts and seeds for which every variant has a video; NothingToReportError if there are none.
    """
    found = measure_there(comparison, measurer=measurer)
    add_kept(comparison, found)
    measured = comparable(found, comparison.labels)
    if not measured:
        raise NothingToReportError(
            f"{comparison.folder} has no prompt and seed with a video of every method yet; nothing to report"
        )
    with writing_report(folder):
        return _write(comparison, measured, folder=folder, baseline=baseline)


def _write(comparison: Comparison, measured: Sequence[Measured], *, folder: Path, baseline: str) -> str:
    """Write the report on these videos; files are named relative to `folder`, so that both may be moved together."""
    labels, described = comparison.labels, comparison.describe()
    rows = summarise(measured, labels, units_of(comparison), baseline)
    time = times(measured, labels, baseline)
    series = {metric: clips(measured, labels, metric) for metric in _CLIP_TITLES}
    series = {metric: found for metric, found in series.items() if any(found.values())}
    notes = _notes(comparison, measured, rows, baseline=baseline)
    plots = _write_plots(folder / "plots", rows, labels, time, series)
    _write_tables(folder, rows, measured)
    report = {
        "comparison": described,
        "pairs": _pairs(comparison, measured),
        "notes": notes,
        "baseline": baseline,
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "unit": "prompt", "seed": 0},
        "noise": comparison.noise,
        "world": has_world(comparison),
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


def _notes(comparison: Comparison, measured: Sequence[Measured], rows: Sequence[Row], *, baseline: str) -> list[str]:
    """Describe the basis of the numbers, in sentences."""
    pairs, prompts, clip_frames = (
        _pairs(comparison, measured),
        {each.video.prompt_index for each in measured},
        comparison.model.native_frames,
    )
    partial = f" of {pairs['asked']} asked for (the others are not finished by every method)"
    video, sampler = comparison.config.video, comparison.config.sampler
    notes = [
        f"{len(measured)} videos: {len(comparison.labels)} methods on {pairs['made']} pairs of prompt and seed"
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
    if comparison.long_measures:
        notes.append(f"Measures of the course of a long video have no good direction of their own: {READING}.")
    if comparison.is_native:
        notes.append(
            "No video is longer than the native window, where every method is the base model: what differs is initial noise "
            "and rotary table alone."
        )
    return notes + _kept(comparison, measured) + _mixtures(measured)


def _on_world(comparison: Comparison) -> str:
    """Which videos have exact measures of the embedded world, and why others have none."""
    reason, count = not_world(comparison), len(comparison.prompts)
    known = count - len(strange_prompts(comparison))
    if reason is None:
        return "The exact measures of the embedded world are included: every prompt is one of its captions."
    if not known:
        return f"The exact measures of the embedded world do not apply: {reason}."
    return f"The exact measures of the embedded world are means over {known} of {count} prompts: {reason}."


def _without_value(rows: Sequence[Row], *, num_frames: int, clip_frames: int) -> list[str]:
    """Explain, in a sentence, which measures no video has a value of."""
    values: dict[str, bool] = {}
    for row in rows:
        values[row.metric] = values.get(row.metric, False) or row.mean.count > 0
    reasons: dict[str, list[str]] = {}
    for metric in (metric for metric, has_value in values.items() if not has_value):
        reasons.setdefault(_why_no_value(metric, num_frames, clip_frames), []).append(metric)
    return [f"No video has a value of {', '.join(metrics)}: {reason}." for reason, metrics in reasons.items()]


def _why_no_value(metric: str, num_frames: int, clip_frames: int) -> str:
    """Explain why videos of this length have no value, for a native length of `clip_frames`; metrics/ has the definitions."""
    if metric.startswith("clip_") and num_clips(num_frames, clip_frames) < 2:
        least = next(count for count in itertools.count(clip_frames) if num_clips(count, clip_frames) > 1)
        return f"{num_frames} frames are one clip of native length ({clip_frames}); from {least} on there are two to compare"
    if metric in ("shape_kept", "colour_kept", "rgb_drift", "background_drift") and num_frames <= clip_frames:
        return (
            f"it is measured on the frames after the native length ({clip_frames}), and there are {num_frames} in all"
        )
    if metric.startswith("repetition") and num_frames <= 2 * clip_frames:
        return f"it needs more than two native lengths, {2 * clip_frames} frames, and there are {num_frames}"
    if metric in _NO_VALUE:
        return _NO_VALUE[metric]
    if metric in VIDEO_UNITS:
        return f"{num_frames} frames are too few to compare"
    return "no object of the world is seen in the frames it is measured on"


def _kept(comparison: Comparison, measured: Sequence[Measured]) -> list[str]:
    """Describe videos of which only the measures are kept."""
    gone = sum(not each.video.is_done for each in measured)
    older = sum(each.version != version_of(each.video.prompt, long=comparison.long_measures) for each in measured)
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
    if len(set(comparison.noise.values())) == 1:
        return f"{next(iter(comparison.noise.values()))} for all"
    return ", ".join(f"{label} {word}" for label, word in comparison.noise.items())


def _mixtures(measured: Sequence[Measured]) -> list[str]:
    """Describe what differed between videos, such as the weights, the device or the commit."""
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
    """Name the files of the checkpoint, or its commit, that differed between videos."""
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
    """Return the origin of a record's weights: the commit, and the SHA-256 of each file by name."""
    files = [(key, file) for key in ("single_file", "single_file_2") if (file := model.get(key))]
    single = {f"{key} {file['name']}": file["sha256"] for key, file in files}
    commit = {"commit": model["commit"]} if "commit" in model else {}
    loras = {f"{lora['name']} at {lora['scale']:g}": lora["sha256"] for lora in model.get("loras", [])}
    return commit | model.get("sha256", {}) | single | loras


def _beside(path: Path, folder: Path) -> str:
    """A file's address relative to the report's folder, with forward slashes."""
    return Path(os.path.relpath(path, folder)).as_posix()


def _viewer(comparison: Comparison, measured: Sequence[Measured], folder: Path) -> dict[str, Any]:
    """List the videos that the page plays, by prompt and seed, with paths relative to it; missing ones are left out."""
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
        "values": {name: finite_or_none(value) for name, value in each.values.items()},
        "by_clip": each.by_clip,
        "resumed_at": each.record["resumed_at"],
    }
