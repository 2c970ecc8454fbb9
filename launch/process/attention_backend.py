"""Refuse an attention backend from the environment, which would silently change a video."""

import os

from engine.errors import UserError
from launch.process.environment import RankEnv

BACKEND = "DIFFUSERS_ATTN_BACKEND"


def check_environment() -> None:
    """Check the attention backend unless this process is a rank; `open_ranks` checks those of ranks together."""
    if RankEnv.of_environment() is None:
        check_backend()


def check_backend() -> None:
    """Raise UserError if DIFFUSERS_ATTN_BACKEND selects a backend other than torch's.

    A method chooses its own kernel, which ids and records name.
    """
    backend = os.environ.get(BACKEND, "native")
    if backend != "native":
        raise UserError(
            f"{BACKEND} is {backend!r} in the environment, but a method chooses its own kernel; unset it, and give "
            "--attention.kernel"
        )
