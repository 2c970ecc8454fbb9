"""Progress bars on stderr for the stages of a run."""

import sys

from tqdm import tqdm


def enabled(setting: str) -> bool:
    """Whether `output.progress` shows bars here: `on` and `off` say so, `auto` shows them on a terminal only."""
    return setting == "on" or (setting == "auto" and sys.stderr.isatty())


def progress_bar(*, total: int, desc: str, enabled: bool, initial: int = 0) -> tqdm:
    """A bar with the stage's name, its share, its rate and the time that is left; a context manager."""
    return tqdm(
        total=total,
        initial=initial,
        desc=f"{desc:<7}",
        disable=not enabled,
        file=sys.stderr,
        dynamic_ncols=True,
        smoothing=0.1,  # local steps are much faster than dual ones; the estimate should follow soon
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]",
    )
