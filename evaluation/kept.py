"""Measure each file once: its measures are kept in a JSON file, under a key of all that decides them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.files.trees import finite_or_none, read_kept
from engine.files.whole import write_json
from metrics.video import VideoReading


def read_measures(place: Path, key: Mapping[str, Any]) -> VideoReading | None:
    """Read the measures kept in a file; None if they are of another key, missing, or damaged, which a line on stderr says."""
    kept = read_kept(place, {"key": dict, "values": dict, "by_clip": dict}, what="the measures of a video")
    if kept is None or kept["key"] != key:
        return None
    values = {name: math.nan if value is None else value for name, value in kept["values"].items()}
    return VideoReading(values=values, by_clip=kept["by_clip"])


def keep_measures(place: Path, key: Mapping[str, Any], found: VideoReading) -> None:
    """Write measures under their key, with null for nan."""
    place.parent.mkdir(parents=True, exist_ok=True)
    values = {name: finite_or_none(value) for name, value in found.values.items()}
    write_json(place, {"key": key, "values": values, "by_clip": found.by_clip})
