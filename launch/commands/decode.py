"""decode.py: saved latents to a video."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import Tensor

from engine.checkpoint import load_latents
from engine.config import DecodeConfig, ModelConfig, OutputConfig, RunConfig
from engine.decoder import open_decoder
from engine.denoise import check_finite
from engine.errors import UserError
from engine.paths import expand
from launch.cli import Keys, arrange, make_parser, parse
from launch.outputs import OutputFiles, check_outputs
from launch.render import render

USAGE = "decode.py LATENTS --output PATH [--overwrite] [--model.path PATH] [--SETTING VALUE ...]"
# Of a run's configuration, what decoding reads.
PARTS = ("model", "video", "decode", "output")
_MODEL_KEYS = ("path", "revision", "device")
DESCRIPTION = "Make the video of latents that launch/generate.py saved. The model and the rate are those of the run."


def main(argv: list[str]) -> None:
    """Read the latents and the record in them, check the outputs, load the VAE and decode."""
    parser = make_parser("decode.py", USAGE, DESCRIPTION)
    _add_arguments(parser)
    words = arrange(argv, Keys.of(parser), num_positionals=1)
    if "-h" not in words and "--help" not in words and (not words or words[-1].startswith("--")):
        raise UserError("give the file of the latents: decode.py LATENTS --output PATH")
    # The file says what its settings are, and the file is one of the arguments: so they are read twice.
    parser.set_defaults({"model.path": ""})
    source = expand(parse(parser, words).latents)
    latents, metadata = load_latents(source)
    check_finite(latents, where=f"in {source}", remedy="make them again with launch/generate.py")
    record = read_record(metadata, source)
    config = restore_config(decoding_part(record["config"]), source)
    parser.set_defaults({f"model.{key}": getattr(config.model, key) for key in _MODEL_KEYS})
    parser.set_defaults({f"decode.{key}": value for key, value in dataclasses.asdict(config.decode).items()})
    config = override(config, parse(parser, words))

    files = OutputFiles(video=expand(config.output.path), latents=source, keep_latents=True)
    check_outputs(
        [files.video, files.record, files.sheet], overwrite=config.output.overwrite, overwrite_flag="--overwrite"
    )
    record = record | {"config": record["config"] | decoded_by(config), "decoded_from": source.name}
    with open_decoder(config) as decoder:
        check_shape(latents, decoder.spec.channels, source)
        record = render(decoder, latents, record, files, output=config.output, fps=config.video.fps)
    print(f"{files.video}: {record['video']['num_frames']} frames; decoded in {record['seconds']['decode']:.1f} s")


def read_record(metadata: dict[str, str], source: Path) -> dict[str, Any]:
    """The record that generate.py put into its latents; UserError for latents of another origin."""
    advice = "give latents that launch/generate.py saved"
    try:
        record = json.loads(metadata["record"])
    except (KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{source} does not say how it was made; {advice}") from error
    if not isinstance(record, dict):
        raise UserError(f"the record in {source} is {record!r:.40} and no map; {advice}")
    for name, kind in (("config", dict), ("seed", int), ("seconds", dict)):
        if not isinstance(record.get(name), kind) or isinstance(record[name], bool):
            raise UserError(f"the record in {source} has {record.get(name)!r} for its {name}; {advice}")
    return record


def check_shape(latents: Tensor, channels: int, source: Path) -> None:
    """Raise UserError unless these are latents of one video, as a model with so many latent channels makes them."""
    if latents.dim() != 5 or latents.shape[:2] != (1, channels) or latents.numel() == 0:
        raise UserError(
            f"{source} holds latents of the shape {list(latents.shape)}, and this model's are [1, {channels}, frames, rows, "
            "columns]; give --model.path of the model that made them"
        )


def restore_config(tree: dict[str, Any], source: Path) -> RunConfig:
    """The RunConfig that a record was saved with; UserError if this version does not know one of its settings."""
    parser = make_parser("decode.py", USAGE, DESCRIPTION)
    parser.add_class_arguments(RunConfig, nested_key=None)
    try:
        namespace = parser.instantiate(parser.parse_object(tree))
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


def override(config: RunConfig, namespace: Namespace) -> RunConfig:
    """The configuration with what was given to decode.py; what was not given stays as the run had it."""
    if namespace.output is None:
        raise UserError("give the file of the video: --output PATH")
    given = {key: namespace[key] for key in ("sheet_frames", "crf", "progress") if namespace[key] is not None}
    output = dataclasses.asdict(config.output) | given | {"path": namespace.output, "overwrite": namespace.overwrite}
    fps = config.video.fps if namespace.fps is None else namespace.fps
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **{key: getattr(namespace.model, key) for key in _MODEL_KEYS}),
        decode=namespace.decode,
        output=OutputConfig(**output),
        video=dataclasses.replace(config.video, fps=fps),
    )


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("latents", type=str, help="safetensors file that launch/generate.py saved")
    parser.add_argument("--output", type=str, help="the mp4; its record and contact sheet get the same stem")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace existing files")
    for name, kind, text in (
        ("fps", int, "frames per second of the file"),
        ("crf", int, "H.264 quality, 0 (lossless) to 51"),
        ("sheet_frames", int, "evenly spaced frames on the contact sheet"),
        ("progress", Literal["auto", "on", "off"], "bars on stderr: auto, on or off"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=f"{text}; by default as in the run")
    # The VAE is always in float32 and on its device, so there is no dtype and no offload to choose.
    left_out = {field.name for field in dataclasses.fields(ModelConfig)} - {*_MODEL_KEYS}
    parser.add_class_arguments(ModelConfig, nested_key="model", skip=left_out)
    parser.add_class_arguments(DecodeConfig, nested_key="decode")
