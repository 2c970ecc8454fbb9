"""The error for a user's mistake, which commands print as one line, and messages for exhausted memory and for latents with NaN."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class UserError(ValueError):
    """A mistake of the user: what is wrong, with the numbers, and what to do. Never a fault of the program."""


class NotFiniteError(UserError):
    """Latents contain NaN or infinity."""


@contextmanager
def as_user_error() -> Iterator[None]:
    """Raise a ValueError of the block, such as those of freespec's checks, as a UserError of the same text."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def check_finite(latents: "Tensor", *, where: str, remedy: str) -> None:
    """Raise NotFiniteError unless all latents are finite; all ranks hold the same latents, and so raise together."""
    finite = latents.isfinite()
    if not finite.all():
        bad = finite.numel() - int(finite.sum())
        raise NotFiniteError(f"{bad} of {finite.numel()} numbers of the latents are not finite {where}; {remedy}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU; torch raises a plain RuntimeError for a CPU's."""
    torch = sys.modules.get("torch")  # not imported here: errors are raised before torch is needed
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def describe_out_of_memory(error: BaseException, *, when: str, of_folder: bool = False) -> str:
    """One line for an allocation that failed `when` something ran, with settings that need less memory.

    `of_folder`: whether the video is one of a folder's, which takes no other settings of decoding or of the video.
    """
    fits, also = (
        "--model.weights cpu_offload (on several ranks zero3)",
        "--decode.mode tiled, or a shorter or smaller video",
    )
    advice = (
        f"more ranks or {fits} would fit; in another folder also {also}"
        if of_folder
        else f"more ranks, {fits}, {also} would fit"
    )
    return f"out of memory while {when} ({first_line(error)}); {advice}"
