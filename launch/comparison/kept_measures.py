"""The measures of a comparison in one small file, so that they outlive its videos: a video that is in it is not made again.

JSON Lines. The first line says what decides the videos, as comparison.json does, and names the measures; the others are one video each:

    {"settings": .., "variants": .., "prompts": .., "measures": [name, ..], "origins": [record, ..]}
    {"video": [label, prompt_index, seed], "origin": place in origins, "sha256": .., "values": [..], "by_clip": {..}, ..}
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.batch.locks import locked
from engine.checkpoint import atomic_path
from engine.errors import UserError
from launch.comparison.measure import Measured, measure_all, native_frames, not_world
from launch.comparison.store import Comparison, Video, refuse_changes, widen

Key = tuple[str, int, int]
_HEADER = {"settings", "variants", "prompts", "measures", "origins"}
_ORIGIN = ("device", "parallel", "versions", "git", "model")
_SECONDS_DIGITS = 4


def read_kept(comparison: Comparison) -> dict[Key, Measured]:
    """What the comparison's file has of its videos, by `Video.key`; nothing if it has no file or that is not there yet.

    Raises UserError for a file of another kind, and for one whose videos were made with other settings.
    """
    path = comparison.measures
    if path is None or not path.exists():
        return {}
    header, lines = _read(path)
    refuse_changes(path, header, _header(comparison), flag="--measures")
    names, origins = header["measures"], header["origins"]
    wanted = {video.key: video for video in comparison.videos}
    return {
        key: _measured(wanted[key], names, line, origins[line["origin"]])
        for key, line in lines.items()
        if key in wanted
    }


def measure_there(comparison: Comparison, videos: Sequence[Video] | None = None, *, progress: bool) -> list[Measured]:
    """The measures of the videos (all of the comparison's) that are there or kept, in their order; files come before kept ones."""
    videos = comparison.videos if videos is None else videos
    there = [video for video in videos if video.is_done]
    world = not_world(comparison) is None
    fresh = measure_all(there, clip_frames=native_frames(comparison), world=world, progress=progress)
    found = read_kept(comparison) | {each.video.key: each for each in fresh}
    return [found[video.key] for video in videos if video.key in found]


def keep(comparison: Comparison, measured: Sequence[Measured]) -> None:
    """Add measures to the comparison's file, if it has one, in the order of the videos; what the file has besides stays."""
    path = comparison.measures
    if path is None or not measured:
        return
    names = list(measured[0].values)
    lock = comparison.folder / "locks" / "measures.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock):  # two reports on some of the methods each would each add to what they read
            header = _header(comparison) | {"measures": names, "origins": []}
            before: dict[Key, Any] = {}
            if path.exists():
                old, before = _read(path)
                refuse_changes(path, old, header, flag="--measures")
                header = widen(old, header) | {"origins": old["origins"]}
                if old["measures"] != names:
                    raise UserError(f"{path} has other measures than are made now; give another --measures")
            lines = before | {each.video.key: _line(each, names, header["origins"]) for each in measured}
            labels = list(header["variants"])
            order = sorted(lines, key=lambda key: (key[2], key[1], labels.index(key[0])))
            text = "".join(_dump(line) for line in (header, *(lines[key] for key in order)))
            with atomic_path(path) as part:
                part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _header(comparison: Comparison) -> dict[str, Any]:
    told = comparison.describe()
    return told | {"settings": told["settings"] | {"clip_frames": native_frames(comparison)}}


def _line(each: Measured, names: Sequence[str], origins: list[dict[str, Any]]) -> dict[str, Any]:
    record = each.record
    origin = {key: record[key] for key in _ORIGIN} | {"measured_by": each.version}
    if origin not in origins:
        origins.append(origin)
    return {
        "video": list(each.video.key),
        "origin": origins.index(origin),
        "sha256": record["video"]["sha256"],
        "resumed_at": record["resumed_at"],
        "seconds": {key: round(record["seconds"][key], _SECONDS_DIGITS) for key in ("denoise", "decode")},
        "steps": [[step["mode"], round(step["seconds"], _SECONDS_DIGITS)] for step in record["steps"]],
        "values": [each.values[name] if math.isfinite(each.values[name]) else None for name in names],
        "by_clip": each.by_clip,
    }


def _measured(video: Video, names: Sequence[str], line: dict[str, Any], origin: dict[str, Any]) -> Measured:
    record = {key: origin[key] for key in _ORIGIN} | {key: line[key] for key in ("resumed_at", "seconds")}
    record |= {
        "video": {"sha256": line["sha256"]},
        "steps": [{"mode": mode, "seconds": seconds} for mode, seconds in line["steps"]],
    }
    values = {name: math.nan if value is None else value for name, value in zip(names, line["values"], strict=True)}
    return Measured(video=video, record=record, values=values, by_clip=line["by_clip"], version=origin["measured_by"])


def _read(path: Path) -> tuple[dict[str, Any], dict[Key, dict[str, Any]]]:
    try:
        header, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if header.keys() >= _HEADER:
            return header, {tuple(line["video"]): line for line in lines}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, AttributeError, KeyError, TypeError):
        pass  # said below, with the same words
    raise UserError(f"{path} does not hold kept measures, or not the whole of them; give another --measures")


def _dump(tree: dict[str, Any]) -> str:
    return json.dumps(tree, allow_nan=False, ensure_ascii=False, separators=(",", ":")) + "\n"
