"""What in the environment would change a video without anyone having asked for it there."""

import os

from engine.errors import UserError
from launch.ranks.environment import RankEnv

BACKEND = "DIFFUSERS_ATTN_BACKEND"


def check_environment() -> None:
    """Check the attention backend of a process that is no rank; those of a run have theirs checked together, in `open_ranks`."""
    if RankEnv.of_environment() is None:
        check_backend()


def check_backend() -> None:
    """Raise UserError if diffusers is told to compute attention by another backend than torch's own.

    Methods choose their kernel themselves, and ids and records name that one. Here, before anything is loaded.
    """
    backend = os.environ.get(BACKEND, "native")
    if backend != "native":
        raise UserError(
            f"{BACKEND} is {backend!r} in the environment, and a method chooses its own kernel; unset it, and give "
            "--attention.kernel"
        )
