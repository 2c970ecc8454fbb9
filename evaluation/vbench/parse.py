"""Parse results of VBench-Long per video: group its clips by video, and check for known faults.

One file holds one dimension: `{dimension: [headline, rows]}` for the two consistency dimensions and `[headline, rows,
rows again]` for the others, a row per clip. Facts: Vchitect/VBench at commit 45e79ec.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from engine.errors import UserError
from engine.files.trees import parse_json
from evaluation.vbench.dimensions import CONSISTENCY, DIMENSIONS, ROW_SCALE
from evaluation.vbench.stage import CLIPS

# The headline is a mean over clips or frames; a larger difference from the mean over clips means another scale.
HEADLINE_TOLERANCE = 0.02
_SAME = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class DimensionScores:
    """One dimension of one view.

    Attributes:
        dimension: its name.
        headline: VBench-Long's own number: a mean weighted by clips.
        videos: 0..1 by stem: the mean over the clips of a video.
        notes: notes for the reader.
    """

    dimension: str
    headline: float
    videos: Mapping[str, float]
    notes: tuple[str, ...] = ()

    @property
    def video_mean(self) -> float:
        """Mean over videos, each counted once."""
        return math.fsum(self.videos.values()) / len(self.videos)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    stem: str
    clip: str
    value: float
    clip_to_clip: float | None
    mapped: float | None


def read_results(path: Path, dimension: str, clips: Mapping[str, int]) -> DimensionScores:
    """Read one of VBench-Long's result files; `clips` has the number of clips of each stem of the view.

    Raises UserError, in one line, for a file that is missing, cut or of another shape, for nan, for videos or clips
    that are missing, double or foreign, for a video whose clips were not compared with each other although it has
    several, and for values on another scale than the dimension's.
    """
    headline, rows, again = _read(path, dimension)
    grouped = _group(rows, dimension, clips, path)
    videos = {stem: _score(stem, grouped[stem], dimension, path) for stem in sorted(grouped)}
    _check_again(again, dimension, clips, videos, path)
    _check_scale(headline, [row.value for row in rows], videos, dimension, path)
    return DimensionScores(
        dimension=dimension, headline=headline, videos=videos, notes=tuple(_notes(dimension, grouped))
    )


def _read(path: Path, dimension: str) -> tuple[float, list[_Row], list[_Row]]:
    try:
        # VBench writes nan and infinity as JSON does not know them; they are found below, by name of the video.
        tree = parse_json(path.read_bytes(), str(path), remedy="evaluate again")
    except OSError as error:
        raise UserError(f"VBench wrote no {path.name} in {path.parent} ({error.strerror})") from error
    if dimension not in DIMENSIONS:
        raise ValueError(f"{dimension} is not one of {', '.join(DIMENSIONS)}")
    if not isinstance(tree, dict) or dimension not in tree:
        held = ", ".join(tree) if isinstance(tree, dict) else type(tree).__name__
        raise UserError(f"{path} holds no {dimension} but {held or 'nothing'}")
    value = tree[dimension]
    lengths = (2,) if dimension in CONSISTENCY else (2, 3)
    if not isinstance(value, list) or len(value) not in lengths or not all(isinstance(v, list) for v in value[1:]):
        raise UserError(f"{path}: {dimension} is not [score, rows{'' if dimension in CONSISTENCY else ', rows'}]")
    headline = _number(value[0], f"{path}: the score of {dimension}")
    rows, again = ([_row(row, dimension, path) for row in part] for part in (value[1], (value[2:] or [[]])[0]))
    if not rows:
        raise UserError(f"{path}: {dimension} has no rows; VBench found no clips")
    return headline, rows, again


def _row(row: Any, dimension: str, path: Path) -> _Row:
    if not isinstance(row, dict) or not isinstance(row.get("video_path"), str) or "video_results" not in row:
        raise UserError(f"{path}: a row of {dimension} lacks video_path or video_results: {json.dumps(row)[:100]}")
    stem, clip = name_of(row["video_path"], path)
    what = f"{path}: {dimension} of {clip or stem}"
    parts = {
        name: _number(row[key], what) if key in row else None
        for name, key in (
            ("clip_to_clip", "clip2clip_score"),
            ("mapped", "mapped_clip2clip_score"),
        )
    }
    return _Row(stem=stem, clip=clip, value=_number(row["video_results"], what), **parts)


def name_of(video_path: str, source: Path) -> tuple[str, str]:
    """Return (stem of the video, stem of the clip) of a row's path; the clip is "" for the row of a whole video.

    A row names a clip, `VIEW/split_clip/STEM/STEM_001.mp4`, or, where VBench-Long meant to group, that with a further
    `/STEM.mp4`. There it cuts STEM at its first underscore, and the look-up between clips fails: such a name is
    refused.
    """
    parts = PurePosixPath(video_path.replace("\\", "/")).parts
    if CLIPS not in parts:
        return PurePosixPath(parts[-1]).stem, ""
    place = len(parts) - 1 - parts[::-1].index(CLIPS)
    inner = parts[place + 1 :]
    if len(inner) not in (2, 3) or not inner[1].startswith(f"{inner[0]}_"):
        raise UserError(f"{source}: cannot tell which video {video_path!r} belongs to")
    if len(inner) == 3 and PurePosixPath(inner[2]).stem != inner[0]:
        raise UserError(
            f"{source}: VBench cut the name {inner[0]!r} to {PurePosixPath(inner[2]).stem!r}; names must have "
            "no underscore"
        )
    return inner[0], PurePosixPath(inner[1]).stem


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{what} is {value!r}, not a number")
    return float(value)


def _group(rows: Sequence[_Row], dimension: str, clips: Mapping[str, int], path: Path) -> dict[str, list[_Row]]:
    grouped: dict[str, list[_Row]] = {}
    for row in rows:
        grouped.setdefault(row.stem, []).append(row)
    if foreign := sorted(grouped.keys() - clips.keys()):
        raise UserError(f"{path}: {dimension} has {foreign[0]}, which is not one of the {len(clips)} videos")
    if missing := sorted(clips.keys() - grouped.keys()):
        raise UserError(f"{path}: {dimension} lacks {missing[0]} and {len(missing) - 1} more of {len(clips)} videos")
    for stem, group in grouped.items():
        whole = len(group) == 1 and not group[0].clip
        if not whole and len(group) != clips[stem]:
            raise UserError(f"{path}: {dimension} of {stem} has {len(group)} clips, {clips[stem]} were expected")
        if len({row.clip for row in group}) < len(group):
            raise UserError(f"{path}: {dimension} of {stem} has a clip twice")
    return grouped


def _score(stem: str, rows: Sequence[_Row], dimension: str, path: Path) -> float:
    scale = ROW_SCALE[dimension]
    score = scale * math.fsum(row.value for row in rows) / len(rows)
    if not -_SAME <= score <= 1 + _SAME:
        raise UserError(f"{path}: {dimension} of {stem} is {score:.4f}, outside 0..1")
    if dimension in CONSISTENCY and len(rows) > 1 and any(not row.clip_to_clip for row in rows):
        raise UserError(
            f"{path}: the {len(rows)} clips of {stem} were not compared with each other (clip2clip 0 or "
            "absent): stale first "
            "frames or a name that VBench cut; its score would be the one within clips alone"
        )
    return score


def _check_again(
    again: Sequence[_Row], dimension: str, clips: Mapping[str, int], videos: Mapping[str, float], path: Path
) -> None:
    """Check that the third part repeats the scores."""
    if not again:
        return
    for stem, rows in _group(again, dimension, clips, path).items():
        mean = ROW_SCALE[dimension] * math.fsum(row.value for row in rows) / len(rows)
        if abs(mean - videos[stem]) > _SAME:
            raise UserError(
                f"{path}: {dimension} of {stem} is {videos[stem]:.6f} in one list and {mean:.6f} in the other"
            )


def _check_scale(
    headline: float, values: Sequence[float], videos: Mapping[str, float], dimension: str, path: Path
) -> None:
    clip_mean = ROW_SCALE[dimension] * math.fsum(values) / len(values)
    video_mean = math.fsum(videos.values()) / len(videos)
    nearest = min(abs(headline - clip_mean), abs(headline - video_mean))
    if nearest > HEADLINE_TOLERANCE:
        raise UserError(
            f"{path}: the score of {dimension} is {headline:.4f} and the mean of its rows {clip_mean:.4f}: this "
            "version of "
            "VBench uses another scale"
        )


def _notes(dimension: str, grouped: Mapping[str, Sequence[_Row]]) -> list[str]:
    notes = []
    single = [stem for stem, rows in grouped.items() if len(rows) == 1]
    if dimension in CONSISTENCY and single:
        notes.append(
            f"{dimension}: {len(single)} of {len(grouped)} videos have a single clip, so nothing between clips "
            "is measured"
        )
    unmapped = [s for s, rows in grouped.items() if len(rows) > 1 and any(row.mapped == 0 for row in rows)]
    if dimension in CONSISTENCY and unmapped:
        notes.append(
            f"{dimension}: VBench maps the score between clips of {len(unmapped)} videos to 0 and then leaves it out"
        )
    if any(len(rows) == 1 and not rows[0].clip for rows in grouped.values()):
        notes.append(f"{dimension}: this version of VBench gives one number per video, not per clip")
    return notes
