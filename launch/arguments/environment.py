"""What in the environment would change a video without anyone having asked for it there."""

import os

from engine.errors import UserError

BACKEND = "DIFFUSERS_ATTN_BACKEND"


def check_environment() -> None:
    """Raise UserError if diffusers is told to compute attention by another backend than torch's own.

    Methods choose their kernel themselves, and ids and records name that one. Here, before anything is loaded.
    """
    backend = os.environ.get(BACKEND, "native")
    if backend != "native":
        raise UserError(
            f"{BACKEND} is {backend!r} in the environment, and a method chooses its own kernel; unset it, and give "
            "--attention.kernel"
        )
