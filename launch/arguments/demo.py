"""Command line of demo.py."""

from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser

from engine.config import RunConfig
from engine.errors import UserError
from engine.paths import expand
from launch.arguments.many_videos import OF_ONE_VIDEO, check_output, refuse_empty
from launch.arguments.options import add_out
from launch.arguments.prompts import EXAMPLE
from launch.arguments.ranks import check_model
from launch.cli.parser import add_former_name, parse_run
from launch.process.argv import option_value
from launch.process.attention_backend import check_environment

DESCRIPTION = "Make one video with three methods, a picture that compares them, and a video of a timeline."
_NAMED_HERE = tuple(key for key in OF_ONE_VIDEO if key != "output.overwrite")
UNREAD = (*_NAMED_HERE, "method.name")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The checked command line of demo.py."""

    config: RunConfig
    prompt: str
    folder: Path


def read(argv: list[str]) -> Arguments:
    """Parse and check; UserError for a mistake."""
    namespace, config = parse_run(
        argv, name="demo.py", description=DESCRIPTION, add_arguments=add_arguments, unread=UNREAD
    )
    check_output(config.output, "demo.py", unread=_NAMED_HERE)
    if option_value(argv, "--method.name") or option_value(argv, "--method"):
        raise UserError("demo.py sets the method of each video; leave --method.name out")
    refuse_empty(namespace, "prompt", "out")
    check_environment()
    check_model(config)
    return Arguments(config=config, prompt=namespace.prompt, folder=expand(namespace.out))


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command beside the settings of a run."""
    parser.add_argument("--prompt", type=str, default=EXAMPLE, help="prompt of the three videos")
    add_out(parser, "the videos and pictures", default="runs/demo")
    add_former_name(parser, "folder", "out")
