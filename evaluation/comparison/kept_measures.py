"""Keep the measures of a comparison in one small file, so that they outlive its videos, which are then not made again.

JSON Lines. The first line describes the videos, as batch.json does, and names the measures; the others are one video each:

    {"configs": .., "variants": .., "prompts": .., "clip_frames": .., "measures": [name, ..], "origins": [part of a record, ..]}
    {"video": [label, prompt_index, seed], "origin": place in origins, "sha256": .., "values": [..], "by_clip": {..}, ..}
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.batch.items import NOTHING, SHAPE, check_same, describe, lacking_inside
from engine.errors import UserError
from engine.files.checks import check_places
from engine.files.locks import locked
from engine.files.trees import Shape, finite_or_none, lacking, parse_json
from engine.files.whole import atomic_path
from evaluation.comparison.measure import Measured, measure_all, units_of
from evaluation.comparison.store import RECORD, Comparison, Key, Video
from evaluation.measure import Measurer

_HEADER: Shape = SHAPE | {"variants": dict, "clip_frames": int, "measures": list, "origins": list}
_ORIGIN = ("device", "parallel", "versions", "git", "model")
_SECONDS_DIGITS = 4
_STEP = ("seconds", "cpu_seconds")  # numbers of a step; files of older versions have the first


def check_kept(comparison: Comparison) -> None:
    """Raise UserError for a file that cannot be used, before a folder is claimed or a video made."""
    if comparison.kept_file is not None:
        check_places([comparison.kept_file, _lock(comparison.kept_file)])
        read_kept(comparison)


def read_kept(comparison: Comparison) -> dict[Key, Measured]:
    """Read the kept measures of the comparison's videos, by `Video.key`; empty without a file.

    Raises UserError for a file of another kind, other settings, or other measures.
    """
    path = comparison.kept_file
    if path is None or not path.exists():
        return {}
    header, lines = _read(path)
    _refuse_others(path, header, comparison)
    wanted = {video.key: video for video in comparison.videos}
    try:
        return {key: _measured(wanted[key], header, line) for key, line in lines.items() if key in wanted}
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(_broken(path)) from error


def measure_there(
    comparison: Comparison, videos: Sequence[Video] | None = None, *, measurer: Measurer
) -> list[Measured]:
    """Measure the existing videos (by default of the whole comparison) and read the kept measures of the others, in order."""
    videos = comparison.videos if videos is None else videos
    there = [video for video in videos if video.is_done]
    fresh = measure_all(comparison, there, measurer)
    found = read_kept(comparison) | {each.video.key: each for each in fresh}
    return [found[video.key] for video in videos if video.key in found]


def measure_every(
    comparison: Comparison, videos: Sequence[Video] | None = None, *, measurer: Measurer
) -> list[Measured]:
    """`measure_there` for videos that were all made; UserError if one is missing, since means would cover other prompts."""
    videos = comparison.videos if videos is None else videos
    measured = measure_there(comparison, videos, measurer=measurer)
    if len(measured) < len(videos):
        raise UserError(
            f"{len(videos) - len(measured)} of {len(videos)} videos of {comparison.folder} are gone since they were made or "
            "found in the kept measures; the same command makes them again"
        )
    return measured


def add_kept(comparison: Comparison, measured: Sequence[Measured]) -> None:
    """Add new measures to the comparison's file, if it has one, in the order of the videos.

    Measures read from the file are not written back: another report may have replaced them meanwhile.
    """
    path = comparison.kept_file
    measured = [each for each in measured if each.video.is_done]
    if path is None or not measured:
        return
    header = _header(comparison, NOTHING)
    try:
        with locked(_lock(path)):  # else concurrent reports would lose each other's measures
            lines: dict[Key, Any] = {}
            if path.exists():
                old, lines = _read(path)
                _refuse_others(path, old, comparison)
                header = _header(comparison, old)
            lines = lines | {each.video.key: _line(each, header) for each in measured}
            labels = list(header["variants"])
            order = sorted(lines, key=lambda key: (key[2], key[1], labels.index(key[0])))
            with atomic_path(path) as part:
                part.write_text("".join(_dump(each) for each in (header, *map(lines.get, order))), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _header(comparison: Comparison, before: Mapping[str, Any]) -> dict[str, Any]:
    return describe(comparison.batch, before) | {
        "clip_frames": comparison.model.native_frames,
        "measures": list(units_of(comparison)),
        "origins": before.get("origins", []),
    }


def _refuse_others(path: Path, before: dict[str, Any], comparison: Comparison) -> None:
    check_same(path, before, comparison.batch, where="--measures")
    now = _header(comparison, before)
    if before["clip_frames"] != now["clip_frames"]:
        raise UserError(
            f"{path} has measures of clips of {before['clip_frames']} frames, and these are of {now['clip_frames']}; "
            "give another --measures"
        )
    if before["measures"] != now["measures"]:
        others = sorted(set(before["measures"]) ^ set(now["measures"])) or ["their order"]
        raise UserError(
            f"{path} has {len(before['measures'])} measures of each video, and {len(now['measures'])} are made of these "
            f"(what differs: {', '.join(others)}); give another --measures"
        )


def _line(each: Measured, header: dict[str, Any]) -> dict[str, Any]:
    record, origins = each.record, header["origins"]
    origin = {key: record[key] for key in _ORIGIN} | {"measured_by": each.version}
    if origin not in origins:
        origins.append(origin)
    values = [each.values[name] for name in header["measures"]]
    return {
        "video": list(each.video.key),
        "origin": origins.index(origin),
        "sha256": record["video"]["sha256"],
        "resumed_at": record["resumed_at"],
        "seconds": {key: round(record["seconds"][key], _SECONDS_DIGITS) for key in ("denoise", "decode")},
        "steps": [[step["mode"], *_rounded(step)] for step in record["steps"]],
        "values": list(map(finite_or_none, values)),
        "by_clip": each.by_clip,
    }


def _rounded(step: Mapping[str, Any]) -> list[float]:
    return [round(step[key], _SECONDS_DIGITS) for key in _STEP if key in step]


def _measured(video: Video, header: dict[str, Any], line: dict[str, Any]) -> Measured:
    if line["origin"] < 0:  # a negative index would count from the end
        raise LookupError(line["origin"])
    origin = header["origins"][line["origin"]]
    record = {key: origin[key] for key in _ORIGIN} | {key: line[key] for key in ("resumed_at", "seconds")}
    record |= {
        "video": {"sha256": line["sha256"]},
        "steps": [dict(zip(("mode", *_STEP), step, strict=False)) for step in line["steps"]],
    }
    wrong = lacking(record, RECORD) or lacking(line, {"sha256": str, "by_clip{}": list})
    if wrong or not isinstance(origin["measured_by"], str):
        raise ValueError(wrong)
    found = zip(header["measures"], line["values"], strict=True)
    values = {name: math.nan if value is None else float(value) for name, value in found}
    return Measured(video=video, record=record, values=values, by_clip=line["by_clip"], version=origin["measured_by"])


def _read(path: Path) -> tuple[dict[str, Any], dict[Key, dict[str, Any]]]:
    try:
        # Not splitlines: a prompt may contain other line ends of Unicode.
        header, *lines = [parse_json(line, str(path)) for line in path.read_bytes().removesuffix(b"\n").split(b"\n")]
        found = {tuple(line["video"]): line for line in lines}
        typed = lacking(header, _HEADER) is None and lacking_inside(header) is None
        if typed and {label for label, _, _ in found} <= header["variants"].keys():
            return header, found
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, AttributeError, LookupError, TypeError):
        pass  # reported below
    raise UserError(_broken(path))


def _broken(path: Path) -> str:
    return f"{path} does not contain kept measures, or is incomplete; give another --measures"


def _dump(tree: dict[str, Any]) -> str:
    return json.dumps(tree, allow_nan=False, ensure_ascii=False, separators=(",", ":")) + "\n"
