"""What the commands that make many videos refuse: settings of one video's files, and seeds beyond the last."""

from engine.config import OutputConfig
from engine.errors import UserError

_NUM_SEEDS = 2**63  # what a seed must be less than (SamplerConfig)
# Settings of one video's files; here every video has a name of its own, and one that is there is not made again.
_OF_ONE_VIDEO = ("path", "overwrite", "save_latents", "trace")


def check_output(output: OutputConfig, name: str) -> None:
    """Raise UserError for settings of `output` that the command would not read."""
    default = OutputConfig()
    given = [f"output.{key}" for key in _OF_ONE_VIDEO if getattr(output, key) != getattr(default, key)]
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
