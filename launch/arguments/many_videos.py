"""What the commands that make many videos refuse: settings of one video's files, and seeds beyond the last."""

from collections.abc import Sequence

from engine.config import OutputConfig
from engine.errors import UserError
from launch.cli.argv import asked_value

_NUM_SEEDS = 2**63  # what a seed must be less than (SamplerConfig)
# Settings of one video's files; here every video has a name of its own, and one that is there is not made again.
OF_ONE_VIDEO = ("output.path", "output.overwrite", "output.save_latents", "output.trace")


def check_output(output: OutputConfig, name: str, *, unread: Sequence[str] = OF_ONE_VIDEO) -> None:
    """Raise UserError for settings of `output` that the command would not read."""
    default, keys = OutputConfig(), [name.partition(".")[2] for name in unread]
    given = [f"output.{key}" for key in keys if getattr(output, key) != getattr(default, key)]
    if given:
        verb = "is" if len(given) == 1 else "are"
        raise UserError(f"{', '.join(given)} {verb} not read by {name}, which names its files itself; leave them out")


def check_seeds(first: int, count: int, flag: str) -> None:
    """Raise UserError if the last of `count` seeds from `first` on is one that there is not."""
    if first + count > _NUM_SEEDS:
        raise UserError(
            f"{flag} {count} from sampler.seed {first} on ends at {first + count - 1}, and seeds are less than 2**63; "
            f"begin at {_NUM_SEEDS - count} or less"
        )


def refuse_method_name(argv: Sequence[str]) -> None:
    """Raise UserError for a `--method.name` beside `--methods`."""
    if asked_value(argv, "--method.name") is not None or asked_value(argv, "--method") is not None:
        raise UserError("--methods names the methods; leave --method.name out")
