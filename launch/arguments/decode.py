"""Command line of decode.py. Options default to the run's settings, which the latents file holds."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from engine.config import DecodeConfig, ModelConfig, OutputConfig, RunConfig
from engine.errors import UserError
from engine.paths import expand, failing_as
from launch.cli.parser import Keys, arrange, make_parser, parse, wants_help

USAGE = "LATENTS --output PATH [--overwrite] [--model.path PATH] [--SETTING VALUE ...]"
DESCRIPTION = "Make the video of latents that launch/generate.py saved. The model and the rate are those of the run."
_MODEL_KEYS = ("path", "revision", "device")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of decode.py: the latents file, and options that override the run's settings."""

    latents: Path
    parser: ArgumentParser
    words: list[str]

    def over(self, config: RunConfig) -> RunConfig:
        """Return the run's configuration with the given options applied."""
        self.parser.set_defaults({f"model.{key}": getattr(config.model, key) for key in _MODEL_KEYS})
        self.parser.set_defaults({f"decode.{key}": value for key, value in dataclasses.asdict(config.decode).items()})
        return override(config, parse(self.parser, self.words))


def read(argv: list[str]) -> Arguments:
    """Parse, and check all options that do not need the latents file; UserError for a mistake."""
    parser = make_parser("decode.py", USAGE, DESCRIPTION)
    add_arguments(parser)
    words = arrange(argv, Keys.of(parser), num_positionals=1)
    if not wants_help(words) and (not words or words[-1].startswith("--")):
        raise UserError("give the file of the latents: decode.py LATENTS --output PATH")
    parser.set_defaults({"model.path": ""})
    given = parse(parser, words)
    if given.output is None:
        raise UserError("give the file of the video: --output PATH")
    OutputConfig(path=given.output)
    latents = expand(given.latents)
    with failing_as(f"cannot look for {given.latents}"):
        is_here = latents.exists()
    if not is_here:
        raise UserError(f"{latents} does not exist")
    return Arguments(latents=latents, parser=parser, words=words)


def override(config: RunConfig, namespace: Namespace) -> RunConfig:
    """Override the run's configuration with the options given to decode.py."""
    given = {
        key: namespace[key] for key in ("sheet_frames", "crf", "metadata", "progress") if namespace[key] is not None
    }
    output = dataclasses.asdict(config.output) | given | {"path": namespace.output, "overwrite": namespace.overwrite}
    fps = config.video.fps if namespace.fps is None else namespace.fps
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **{key: getattr(namespace.model, key) for key in _MODEL_KEYS}),
        decode=namespace.decode,
        output=OutputConfig(**output),
        video=dataclasses.replace(config.video, fps=fps),
    )


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("latents", type=str, help="safetensors file that launch/generate.py saved")
    parser.add_argument(
        "--output",
        type=str,
        help="the .mp4, .gif or .webp, or NAME/ for PNG frames; record and contact sheet get the same stem",
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="replace existing files")
    for name, kind, text in (
        ("fps", int, "frames per second of the file"),
        ("crf", int, "quality of mp4 and WebP, 0 (lossless) to 51"),
        ("metadata", bool, "whether the video carries its prompt, seed, method, settings and version"),
        ("sheet_frames", int, "evenly spaced frames on the contact sheet"),
        ("progress", Literal["auto", "on", "off"], "bars on stderr: auto, on or off"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=f"{text}; by default as in the run")
    # The VAE is always in float32 and on its device, so there is no dtype and no offload to choose.
    left_out = {field.name for field in dataclasses.fields(ModelConfig)} - {*_MODEL_KEYS}
    parser.add_class_arguments(ModelConfig, nested_key="model", skip=left_out)
    parser.add_class_arguments(DecodeConfig, nested_key="decode")
