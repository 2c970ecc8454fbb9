"""Read and check the run's record in a latents file, and restore its configuration."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError

from engine.config import RunConfig
from engine.errors import UserError
from engine.files.trees import parse_json
from engine.presets import parse_tree

ADVICE = "give latents that launch/generate.py saved"

# The parts of a run's configuration that decoding reads.
_PARTS = ("model", "video", "decode", "output")


def read_record(metadata: dict[str, str], source: Path) -> dict[str, Any]:
    """Read the record in a latents file of generate.py; UserError for latents of another origin."""
    if "record" not in metadata:
        raise UserError(f"{source} has no record of its run; {ADVICE}")
    record = parse_json(metadata["record"], f"the record in {source}", remedy=ADVICE)
    try:
        json.dumps(record, allow_nan=False)
    except ValueError as error:
        raise UserError(f"the record in {source} holds NaN or infinity; {ADVICE}") from error
    if not isinstance(record, dict):
        raise UserError(f"the record in {source} is {record!r:.40} instead of a mapping; {ADVICE}")
    for name, kind in (("config", dict), ("seed", int), ("seconds", dict)):
        if not isinstance(record.get(name), kind) or isinstance(record[name], bool):
            raise UserError(f"the record in {source} has {record.get(name)!r} for its {name}; {ADVICE}")
    for name, is_right in (("timeline", is_timeline), ("given", is_given)):
        if record.get(name) is not None and not is_right(record[name]):
            raise UserError(f"the record in {source} has {record[name]!r:.60} for its {name}; {ADVICE}")
    return record


def is_timeline(value: Any) -> bool:
    """Whether a value is the events of a record, see `engine.text.timeline.Direction.described`."""
    return isinstance(value, list) and all(
        isinstance(event, dict)
        and isinstance(event.get("text"), str)
        and all(type(event.get(name)) is int for name in ("start", "stop"))
        for event in value
    )


def is_given(value: Any) -> bool:
    """Whether a value is a record's entry about given frames, see `engine.given.frames.GivenFrames.record`."""
    if not isinstance(value, dict) or value.get("shows") not in ("whole", "new"):
        return False
    extend = value.get("extend")
    return (extend is None and value["shows"] == "whole") or (
        isinstance(extend, dict) and type(extend.get("stop")) is int and extend["stop"] > 0
    )


def restore_config(tree: dict[str, Any], source: Path) -> RunConfig:
    """Restore the RunConfig of a record; UserError if this version does not know one of its settings."""
    try:
        for part, settings in tree.items():
            if not isinstance(settings, dict):
                raise UserError(f"{part} is {settings!r:.40}")
        namespace = parse_tree(tree)
    except (ArgumentError, ValueError) as error:
        raise UserError(f"{source} was saved with settings that this version does not know: {error}") from error
    return RunConfig(**{field.name: namespace[field.name] for field in dataclasses.fields(RunConfig)})


def decoding_part(tree: dict[str, Any]) -> dict[str, Any]:
    """The parts of a recorded configuration that decoding reads, with a placeholder method.

    The settings of denoising are kept in the record and not checked, since this version may not know them.
    """
    return {part: tree[part] for part in _PARTS if part in tree} | {"method": {"name": "direct", "window_frames": 1}}


def decoded_by(config: RunConfig) -> dict[str, Any]:
    """The parts of a configuration that decoding reads, as plain values."""
    return {part: dataclasses.asdict(getattr(config, part)) for part in _PARTS}
