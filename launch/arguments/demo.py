"""Command line of demo.py."""

from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser

from engine.config import RunConfig
from engine.paths import expand, find_checkpoint
from launch.arguments.environment import check_environment
from launch.cli import parse_run

DESCRIPTION = "Make the same video with every method, and one picture that shows them one above the other."
PROMPT = "a red circle bounces over a blue background"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What demo.py was asked for."""

    config: RunConfig
    prompt: str
    folder: Path


def read(argv: list[str]) -> Arguments:
    """Parse and check; UserError for a mistake."""
    namespace, config = parse_run(argv, name="demo.py", description=DESCRIPTION, add_arguments=add_arguments)
    check_environment()
    find_checkpoint(config.model.path)
    return Arguments(config=config, prompt=namespace.prompt, folder=expand(namespace.folder))


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command beside the settings of a run."""
    parser.add_argument("--prompt", type=str, default=PROMPT, help="what the videos show")
    parser.add_argument("--folder", type=str, default="runs/demo", help="folder of the videos and the picture")
