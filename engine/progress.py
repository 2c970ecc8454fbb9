"""Progress bars of a run's stages, and notes, on stderr."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import diffusers.utils.logging
import transformers.utils.logging
from tqdm import tqdm

from engine.shown import printable


def enabled(setting: str) -> bool:
    """Whether `output.progress` shows bars: `auto` shows them on a terminal only."""
    return setting == "on" or (setting == "auto" and sys.stderr.isatty())


def progress_bar(*, total: int, desc: str, enabled: bool, initial: int = 0) -> tqdm:
    """A context manager with a bar of the stage's name, share, rate and remaining time."""
    return tqdm(
        total=total,
        initial=initial,
        desc=f"{desc:<7}",
        disable=not enabled,
        file=sys.stderr,
        dynamic_ncols=True,
        smoothing=0.1,  # local steps are much faster than dual ones, so the estimate follows quickly
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]",
    )


def note(line: str) -> None:
    """Write a line to stderr, above a progress bar if there is one."""
    tqdm.write(printable(line), file=sys.stderr)


@contextmanager
def no_library_bars() -> Iterator[None]:
    """Silence the loading bars of diffusers and transformers in the block, since they ignore `output.progress`."""
    libraries = [
        library
        for library in (diffusers.utils.logging, transformers.utils.logging)
        if library.is_progress_bar_enabled()
    ]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()
