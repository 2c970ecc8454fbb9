"""Command line of generate.py."""

from dataclasses import dataclass

from jsonargparse import ArgumentParser

from engine.config import OutputConfig, RunConfig
from engine.errors import UserError
from engine.files.checks import check_places
from engine.given.frames import GivenFrames
from launch.arguments.given import add_given, read_given
from launch.arguments.prompts import EXAMPLE, Prompts, add_prompts, read_prompts
from launch.arguments.ranks import add_ranks, check_model, check_started
from launch.cli.parser import parse_run
from launch.process.argv import option_value
from launch.process.attention_backend import check_environment
from launch.process.environment import PlacementStrategy, RankEnv
from launch.ranks.ray_pool import PLACEMENT_HELP, NoRayError, check_placement
from launch.video.outputs import OutputFiles, frame_folders, plan_outputs
from launch.video.stages import look

DESCRIPTION = "Make a long video from a prompt, or one from each line of a file."


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The checked command line of generate.py: configuration, given frames, and the prompt and files of each video.

    `is_example`: no prompt, preset or model was given, so the embedded model makes its example.
    """

    config: RunConfig
    prompts: Prompts
    given: GivenFrames | None
    outputs: list[OutputFiles]
    verbose: bool
    is_example: bool


def read(argv: list[str]) -> Arguments:
    """Parse and check; UserError for a mistake."""
    namespace, config = parse_run(argv, name="generate.py", description=DESCRIPTION, add_arguments=add_arguments)
    check_environment()
    check_started(namespace.nproc, argv)
    asked = (namespace.prompt, namespace.timeline, namespace.prompts)
    is_example = asked == (None, None, None) and not _names_model(argv)
    prompts = read_prompts(EXAMPLE if is_example else namespace.prompt, namespace.prompts, timeline=namespace.timeline)
    config = prompts.directed(config, argv)
    rank_env = RankEnv.of_environment()
    if namespace.ray is not None and rank_env is not None:
        raise UserError("--ray starts ranks itself, from the command line; leave it out, or torchrun")
    try:
        check_placement(namespace.placement_strategy, address=namespace.ray, num_ranks=namespace.nproc or 1)
    except NoRayError as error:
        raise UserError(str(error)) from error
    outputs = plan_outputs(config.output, len(prompts.texts))
    given = read_given(namespace)
    if namespace.ray is None and rank_env is None:  # otherwise rank 0, maybe on another machine, checks the files
        check_free(outputs, config.output)
        check_model(config)
        if given is not None:
            given.check_files()
    return Arguments(
        config=config, prompts=prompts, given=given, outputs=outputs, verbose=namespace.verbose, is_example=is_example
    )


def _names_model(argv: list[str]) -> bool:
    """Whether the command line chooses a preset or a model instead of the embedded one."""
    return any(option_value(argv, name) is not None for name in ("--config", "--model", "--model.path"))


def check_free(outputs: list[OutputFiles], output: OutputConfig) -> None:
    """Raise UserError if an output cannot be written, or would replace a file of another origin."""
    check_places([path for files in outputs for path in files.all], folders=frame_folders(outputs))
    for files in outputs:
        look(files, overwrite=output.overwrite)


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command beside the settings of a run."""
    add_prompts(parser)
    add_given(parser)
    add_ranks(parser)
    parser.add_argument(
        "--ray", type=str, help="start the ranks as actors of a Ray cluster instead: auto, HOST:PORT, or local"
    )
    parser.add_argument("--placement_strategy", type=PlacementStrategy, default="PACK", help=PLACEMENT_HELP)
