"""Which settings of FreeSpec are searched, and the seeded draws from them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

SPACE: dict[str, tuple[Any, ...]] = {
    "domain": ("timestep", "step"),
    "split": (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9),
    "alpha": (0.0, 1.0, 2.0, 3.0, 5.0, 8.0),
    "beta": (0.0, 1.0, 3.0, 5.0, 8.0),
    "residual_form": ("lerp", "add"),
    "lam_start": (0.0, 0.05, 0.1, 0.2, 0.3, 0.5),
}
"""What the paper leaves open (docs/method.md): each setting is drawn on its own, every value as likely as the others."""

END_SHARES = (0.0, 0.25, 0.5, 1.0)
"""`lam_end` is one of these shares of `lam_start`, since the residual is to fall with time or to stay."""

SETTINGS = (*SPACE, "lam_end")
START = "start"
"""Label of the settings that the search begins with, which stay in it to the end."""


def draw_trials(count: int, seed: int, start: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`count` different settings by label, the first being `start`; the same seed draws the same ones.

    More trials go on where fewer stopped, so that a search may be widened later.
    """
    rng = np.random.default_rng(seed)
    trials = {START: {name: start[name] for name in SETTINGS}}
    while len(trials) < count:
        drawn = {name: values[int(rng.integers(len(values)))] for name, values in SPACE.items()}
        drawn["lam_end"] = round(drawn["lam_start"] * END_SHARES[int(rng.integers(len(END_SHARES)))], 6)
        if drawn not in trials.values():
            trials[f"trial-{len(trials):02d}"] = drawn
    return trials
