"""Command line of plan.py."""

from dataclasses import dataclass, fields

from jsonargparse import ArgumentParser

from engine.config import OutputConfig, RunConfig
from engine.errors import UserError
from engine.given.frames import GivenFrames
from engine.planner.gpu import GpuSpec, check_count, read_gpu
from launch.arguments.given import add_given, read_given
from launch.arguments.ranks import check_model
from launch.cli.parser import parse_run

DESCRIPTION = "List every layout of a video over GPUs, with memory and predicted time, before any weight is loaded."

UNREAD = tuple(f"output.{each.name}" for each in fields(OutputConfig))  # it makes no video


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The checked command line of plan.py."""

    config: RunConfig
    gpu: GpuSpec
    gpus: int
    json: bool
    given: GivenFrames | None = None


def read(argv: list[str]) -> Arguments:
    """Parse and check; UserError for a mistake."""
    given, config = parse_run(argv, name="plan.py", description=DESCRIPTION, add_arguments=add_arguments, unread=UNREAD)
    gpu = read_gpu(given.gpu)
    check_count(given.gpus)
    if given.gpus == 1 and config.parallel.provider != "torch":
        raise UserError(
            f"parallel.provider {config.parallel.provider} is for several ranks; give --gpus, or leave it out"
        )
    check_model(config)
    frames = read_given(given)
    return Arguments(config=config, gpu=gpu, gpus=given.gpus, json=given.json, given=frames)


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command beside the settings of a run."""
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs")
    parser.add_argument("--gpu", type=str, default="h200", help="one of configs/gpus, or a JSON file of your own")
    add_given(parser)
    parser.add_argument("--json", type=bool, default=False, help="print everything as JSON")
