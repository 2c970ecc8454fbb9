"""Command line of previews.py."""

from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser

from engine.config import RunConfig
from engine.errors import UserError
from engine.paths import expand
from launch.arguments.many_videos import OF_ONE_VIDEO, check_output, refuse_empty
from launch.arguments.options import add_prompts_file
from launch.arguments.prompts import read_prompts
from launch.arguments.ranks import check_model
from launch.cli.parser import parse_run
from launch.process.attention_backend import check_environment

NAME = "previews.py"
DESCRIPTION = (
    "Fit the colours of serve.py's previews to a VAE: least squares from latents to decoded pixels, over a few videos."
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The checked command line of previews.py.

    Attributes:
        config: the run that makes each video.
        prompts: of the videos.
        out: the file of the factors.
    """

    config: RunConfig
    prompts: list[str]
    out: Path


def read(argv: list[str]) -> Arguments:
    """Parse and check; UserError for a mistake."""
    given, config = parse_run(
        argv, name=NAME, description=DESCRIPTION, add_arguments=add_arguments, unread=OF_ONE_VIDEO
    )
    check_environment()
    check_output(config.output, NAME)
    refuse_empty(given, "prompts", "out")
    if given.out is None or not given.out.endswith(".safetensors"):
        raise UserError(f"--out must name the file of the factors, such as previews.safetensors, got {given.out!r}")
    prompts = read_prompts(None, given.prompts).texts
    if not 1 <= given.num_prompts <= len(prompts):
        raise UserError(
            f"--num_prompts must lie in [1, {len(prompts)}], the number of prompts, got {given.num_prompts}"
        )
    check_model(config)
    return Arguments(config=config, prompts=prompts[: given.num_prompts], out=expand(given.out))


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command, beside the settings of a run."""
    prompts = "configs/prompts/world-heldout-40.txt"
    add_prompts_file(parser, default=prompts)
    parser.add_argument("--num_prompts", type=int, default=8, help="use only the first N prompts")
    parser.add_argument("--out", type=str, help="safetensors file of the factors, for serve.py --preview_factors")
