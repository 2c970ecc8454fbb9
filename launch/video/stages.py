"""Find the remaining stages of a video from the files of an earlier run of the same command."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.config import RunConfig
from engine.errors import UserError
from engine.files.tensors import read_metadata
from engine.files.trees import DamagedError, Shape, parse_json, read_tree
from engine.files.whole import content_sha256
from engine.identity import check_run, describe_differences, settings_id
from launch.video.outputs import OutputFiles, describe_existing, refuse_existing

Stage = Literal["finished", "decode", "trace", "denoise"]
"""`trace`: the latents exist, but the trace of their steps is in the snapshot only."""

Settings = dict[str, Any]

_RECORD: Shape = {
    "identity.id": str,
    "identity.settings": dict,
    "config.decode": dict,
    "config.output": dict,
    "config.video": dict,
    "video.sha256": str,
    "video.num_frames": int,
}
_FLAG = "--output.overwrite"


@dataclass(frozen=True, kw_only=True)
class Found:
    """The metadata of the existing files of a video.

    Attributes:
        record: record of a finished video, or None.
        latents: settings of the existing latents; None if there are none.
        snapshot: metadata of the snapshot of an unfinished run, or None.
    """

    record: dict[str, Any] | None
    latents: Settings | None
    snapshot: dict[str, str] | None


def look(files: OutputFiles, *, overwrite: bool) -> Found:
    """Read the metadata of the existing files of a video.

    Raises:
        UserError: a file of another origin exists and may not be replaced; a snapshot never may.
    """
    record = read_record(files.record)
    if record is None and not overwrite:
        refuse_existing([files.record], _FLAG)
    latents = _latents_settings(files.latents, overwrite=overwrite)
    if record is None and latents is None and not overwrite:
        refuse_existing([*files.decoded, *files.traces], _FLAG)
    return Found(record=record, latents=latents, snapshot=read_metadata(files.snapshot))


def find_stage(files: OutputFiles, config: RunConfig, settings: Callable[[], Settings]) -> Stage:
    """Find the remaining stages of a video, without computing or changing anything.

    Args:
        files: where its files lie; they are claimed.
        config: the run.
        settings: returns the settings of its latents, see `engine.identity`; called only if a file has some to compare.

    Raises:
        UserError: as `look`, and for a file of a run with other settings, listing the differences.
    """
    overwrite = config.output.overwrite
    found = look(files, overwrite=overwrite)
    if found.record is not None and not overwrite:
        check_decoded(files, found.record, config, settings(), _FLAG)
        return "finished"
    if found.snapshot is not None:
        check_run(found.snapshot, settings(), path=files.snapshot)
    if found.latents is None:
        return "denoise"
    differences = describe_differences(found.latents, settings())
    if differences is not None and not overwrite:
        raise UserError(describe_existing(files.latents, _FLAG, differences))
    # With `overwrite`, the latents of a finished run are made again too.
    if differences is not None or found.record is not None:
        return "denoise"
    has_trace = all(path.exists() for path in files.traces)
    return "decode" if has_trace or found.snapshot is None else "trace"


def read_record(path: Path) -> dict[str, Any] | None:
    """Read the record of a finished video; None if it is missing, another kind of file, or of an older version."""
    try:
        return read_tree(path, _RECORD, what="the record of a video")
    except DamagedError:
        return None


def check_decoded(
    files: OutputFiles, record: Mapping[str, Any], config: RunConfig, settings: Settings, flag: str
) -> None:
    """Raise UserError unless a record belongs to this video, and the video is complete; `flag` names the option to overwrite."""
    before = record["identity"]["settings"] | _decoding(record["config"])
    differences = describe_differences(before, settings | _decoding(dataclasses.asdict(config)))
    if differences is not None:
        raise UserError(describe_existing(files.video, flag, differences))
    made = str(record["video"].get("file", files.video.name))
    if made != files.video.name:
        raise UserError(
            f"{files.record} is the record of {made}; choose another name, whose stem is not that of another video"
        )
    if not files.video.exists() or content_sha256(files.video) != record["video"]["sha256"]:
        raise UserError(
            f"{files.record} exists already, and its {files.video.name} is "
            f"{'another file by now' if files.video.exists() else 'gone'}; delete both, choose another name or add {flag}"
        )


def describe_finished(files: OutputFiles, record: Mapping[str, Any], flag: str = _FLAG) -> str:
    """Describe a finished video, and which files only another run would make."""
    lacks = []
    if files.keep_latents and not files.latents.exists():
        lacks.append("its latents were not kept")
    if not all(path.exists() for path in files.traces):
        lacks.append("it was made without a trace")
    if not files.sheet.exists():
        lacks.append("its contact sheet is gone")
    return f"{files.video}: finished already, {record['video']['num_frames']} frames{''.join(f'; {x}' for x in lacks)}; {flag} makes it again"


def remove_leftovers(files: OutputFiles, record: Mapping[str, Any]) -> None:
    """Delete temporary latents and the snapshot of a run that was killed at its end."""
    identity = record["identity"]["id"]
    was_kept = record["config"]["output"].get("save_latents") is not None or "decoded_from" in record
    if not was_kept and not files.keep_latents:
        found = _latents_settings(files.latents, overwrite=True)
        if found is not None and settings_id(found) == identity:
            files.latents.unlink(missing_ok=True)
    if _run_id(files.snapshot) == identity:
        files.snapshot.unlink(missing_ok=True)


def _decoding(config: Mapping[str, Any]) -> Settings:
    """The settings of a configuration that determine the files made from latents."""
    output = config["output"]
    return {
        "video": {"fps": config["video"].get("fps")},
        "decode": config["decode"],
        # Videos of versions that wrote no metadata have none.
        "output": {"metadata": False}
        | {key: output[key] for key in ("crf", "metadata", "sheet_frames") if key in output},
    }


def _latents_settings(path: Path, *, overwrite: bool) -> Settings | None:
    """The settings of the latents in a file; None if it is missing or, with `overwrite`, has none."""
    try:
        metadata = read_metadata(path)
        if metadata is None:
            return None
        return dict(parse_json(metadata["record"], str(path))["identity"]["settings"])
    except (UserError, KeyError, TypeError, ValueError):
        if not overwrite:
            refuse_existing([path], _FLAG)
        return None


def _run_id(path: Path) -> str | None:
    try:
        return (read_metadata(path) or {}).get("run_id")
    except UserError:
        return None
