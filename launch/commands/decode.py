"""decode.py: saved latents to a video."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from torch import Tensor

from engine.checkpoint import load_latents
from engine.config import RunConfig
from engine.decode.decoder import open_decoder
from engine.denoise import check_finite
from engine.errors import UserError
from engine.files.checks import check_space, least_video_bytes
from engine.files.trees import parse_json
from engine.load.pipeline import fetch, find_checkpoint, read_spec
from engine.media.read_video import measure
from engine.paths import expand
from engine.presets import refuse_null
from launch.arguments.decode import Arguments, read
from launch.cli import make_parser
from launch.outputs import OutputFiles, claim_outputs, frame_folders, refuse_existing
from launch.render import render, video_size
from launch.stages import check_decoded, describe_finished
from launch.stages import read_record as read_finished
from launch.stopping import all_is_made

# Of a run's configuration, what decoding reads.
PARTS = ("model", "video", "decode", "output")
ADVICE = "give latents that launch/generate.py saved"


def main(argv: list[str]) -> None:
    """Read the command line and decode."""
    run(read(argv))


def run(given: Arguments) -> None:
    """Read the latents and the record in them, check the outputs, load the VAE and decode."""
    source = given.latents
    latents, metadata = load_latents(source)
    check_finite(latents, where=f"in {source}", remedy="make them again with launch/generate.py")
    record = read_record(metadata, source)
    config = given.over(restore_config(decoding_part(record["config"]), source))

    files = OutputFiles(video=expand(config.output.path), latents=source, keep_latents=True)
    with contextlib.ExitStack() as last, claim_outputs(files.decoded, flag="--output", folders=frame_folders([files])):
        model = config.model
        spec = read_spec(fetch(find_checkpoint(model.path), model.revision, parts=(), offline=model.offline))
        check_shape(latents, spec.channels, source)
        size = video_size(latents, spec, record)
        if size[0] < 1:
            begun, frames = record["given"]["extend"]["stop"], spec.num_frames(latents.shape[2])
            raise UserError(f"{source} says that it goes on from {begun} frames, and has {frames}; {ADVICE}")
        if not config.output.overwrite and (finished := describe_decoded(files, record, config, size)) is not None:
            print(finished)
            return
        check_space({files.video: least_video_bytes(*size, kind=files.kind)}, what="the video")
        record = record | {"config": record["config"] | decoded_by(config), "decoded_from": source.name}
        with open_decoder(config) as decoder:
            fps, replace = config.video.fps, config.output.overwrite
            record = render(decoder, latents, record, files, output=config.output, fps=fps, replace=replace)
            last.enter_context(all_is_made())
    print(f"{files.video}: {record['video']['num_frames']} frames; decoded in {record['seconds']['decode']:.1f} s")


def describe_decoded(
    files: OutputFiles, record: dict[str, Any], config: RunConfig, size: tuple[int, int, int]
) -> str | None:
    """A line for a video that is decoded already; None if there is none yet, UserError if other files are there.

    A video of these frames, rows and columns without a record is what an interrupted run may have left: it is decoded again,
    and stays if it is another one.
    """
    flag = "--overwrite"
    before = read_finished(files.record)
    settings = _settings_of(record)
    if before is None or settings is None:
        is_left = not os.path.lexists(files.record) and measure(files.video) == size
        refuse_existing([] if is_left else files.decoded, flag)
        return None
    check_decoded(files, before, config, settings, flag)
    return describe_finished(files, before, flag)


def _settings_of(record: dict[str, Any]) -> dict[str, Any] | None:
    """What decided the latents of a record; None if it does not say."""
    identity = record.get("identity")
    settings = identity.get("settings") if isinstance(identity, dict) else None
    return settings if isinstance(settings, dict) else None


def read_record(metadata: dict[str, str], source: Path) -> dict[str, Any]:
    """The record that generate.py put into its latents; UserError for latents of another origin."""
    if "record" not in metadata:
        raise UserError(f"{source} does not say how it was made; {ADVICE}")
    record = parse_json(metadata["record"], f"the record in {source}", remedy=ADVICE)
    try:
        json.dumps(record, allow_nan=False)
    except ValueError as error:
        raise UserError(f"the record in {source} holds NaN or infinity; {ADVICE}") from error
    if not isinstance(record, dict):
        raise UserError(f"the record in {source} is {record!r:.40} and no map; {ADVICE}")
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
    """Whether a value is what a record says of given frames, see `engine.given.GivenFrames.record`."""
    if not isinstance(value, dict) or value.get("shows") not in ("whole", "new"):
        return False
    extend = value.get("extend")
    return (extend is None and value["shows"] == "whole") or (
        isinstance(extend, dict) and type(extend.get("stop")) is int and extend["stop"] > 0
    )


def check_shape(latents: Tensor, channels: int, source: Path) -> None:
    """Raise UserError unless these are latents of one video, as a model with so many latent channels makes them."""
    if latents.dim() != 5 or latents.shape[:2] != (1, channels) or latents.numel() == 0:
        raise UserError(
            f"{source} holds latents of the shape {list(latents.shape)}, and this model's are [1, {channels}, frames, rows, "
            "columns]; give --model.path of the model that made them"
        )


def restore_config(tree: dict[str, Any], source: Path) -> RunConfig:
    """The RunConfig that a record was saved with; UserError if this version does not know one of its settings."""
    parser = make_parser("decode.py", "", "")
    parser.add_class_arguments(RunConfig, nested_key=None)
    try:
        for part, settings in tree.items():
            if not isinstance(settings, dict):
                raise UserError(f"{part} is {settings!r:.40}")
        namespace = parser.parse_object(tree)
        refuse_null(namespace)
        namespace = parser.instantiate(namespace)
    except (ArgumentError, ValueError) as error:
        raise UserError(f"{source} was saved with settings that this version does not know: {error}") from error
    return RunConfig(**{field.name: namespace[field.name] for field in dataclasses.fields(RunConfig)})


def decoding_part(tree: dict[str, Any]) -> dict[str, Any]:
    """Of a recorded configuration what decoding reads, with a method that is not read.

    What made the latents stays in the record as it is, and is not checked: this version may refuse it, or not know it.
    """
    return {part: tree[part] for part in PARTS if part in tree} | {"method": {"name": "direct", "window_frames": 1}}


def decoded_by(config: RunConfig) -> dict[str, Any]:
    """The parts of a configuration that decoding reads, as plain values."""
    return {part: dataclasses.asdict(getattr(config, part)) for part in PARTS}
