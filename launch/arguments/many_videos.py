"""Checks of commands that make many videos: settings of one video's files are refused, and seeds are in range."""

from collections.abc import Sequence

from jsonargparse import Namespace

from engine.batch.suite import check_once
from engine.config import OutputConfig
from engine.errors import UserError
from launch.arguments.options import seeds_from
from launch.process.argv import option_value

_NUM_SEEDS = 2**63  # what a seed must be less than (SamplerConfig)
# Settings of one video's files, which these commands name themselves; existing videos are not made again.
OF_ONE_VIDEO = ("output.path", "output.overwrite", "output.save_latents", "output.trace")


def check_output(output: OutputConfig, name: str, *, unread: Sequence[str] = OF_ONE_VIDEO) -> None:
    """Raise UserError for settings of `output` that the command does not use."""
    default, keys = OutputConfig(), [name.partition(".")[2] for name in unread]
    given = [f"output.{key}" for key in keys if getattr(output, key) != getattr(default, key)]
    if given:
        verb = "is" if len(given) == 1 else "are"
        raise UserError(f"{', '.join(given)} {verb} not used by {name}, which names its files itself; leave them out")


def refuse_empty(given: Namespace, *names: str) -> None:
    """Raise UserError for an empty option of these names, as from an unset shell variable."""
    for name in names:
        if given[name] is not None and not given[name].strip():
            raise UserError(f"--{name} is empty; give a value, or leave it out")


def read_seeds(text: str | None, first: int, flag: str = "--seeds", *, default: int = 1) -> tuple[int, ...]:
    """Parse a comma-separated list of seeds; without one, return `default` seeds, starting at `first` (sampler.seed)."""
    if text is None:
        text = seeds_from(first, default)
    try:
        seeds = [int(word) for word in text.split(",") if word.strip()]
    except ValueError as error:
        raise UserError(f"{flag} must be whole numbers with commas between them, got {text!r}") from error
    check_once(flag, seeds)
    if (wrong := next((seed for seed in seeds if not 0 <= seed < _NUM_SEEDS), None)) is not None:
        raise UserError(f"{flag}: a seed must lie in [0, 2**63), got {wrong}")
    return tuple(seeds)


def refuse_method_name(argv: Sequence[str]) -> None:
    """Raise UserError for a `--method.name` beside `--methods`."""
    if option_value(argv, "--method.name") is not None or option_value(argv, "--method") is not None:
        raise UserError("--methods names the methods; leave --method.name out")
