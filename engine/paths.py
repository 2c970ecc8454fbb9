"""Paths as users write them."""

from pathlib import Path

from engine.errors import UserError


def expand(path: str) -> Path:
    """A path of the user's, with ~ resolved; UserError for the ~ of a user that does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"cannot resolve {path!r}: {error}") from error
