"""The error of a user's mistake, which commands print as one line and nothing else, and what is said when memory is short."""

import sys


class UserError(ValueError):
    """What is wrong, with the numbers, and what to do; never a fault of the program itself."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU; torch raises a plain RuntimeError for a CPU's."""
    torch = sys.modules.get("torch")  # not imported here: until something is computed, errors need no torch
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def describe_out_of_memory(error: BaseException, *, when: str) -> str:
    """One line: what was asked for `when` memory was short, and what would need less of it."""
    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return (
        f"out of memory while {when} ({first}); more ranks, --model.weights cpu_offload (on several ranks zero3), "
        "--decode.mode tiled, or a shorter or smaller video would fit"
    )
