"""The search space of FreeSpec's settings, and seeded draws from it."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from engine.errors import UserError

SPACE: dict[str, tuple[Any, ...]] = {
    "domain": ("timestep", "step"),
    "fused_share": (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9),
    "alpha": (0.0, 1.0, 2.0, 3.0, 5.0, 8.0),
    "beta": (0.0, 1.0, 3.0, 5.0, 8.0),
    "residual_form": ("lerp", "add"),
    "lam_start": (0.0, 0.05, 0.1, 0.2, 0.3, 0.5),
}
"""Settings that the paper leaves open (docs/method.md), each drawn independently and uniformly."""

END_SHARES = (0.0, 0.25, 0.5, 1.0)
"""`lam_end` is one of these shares of `lam_start`: the residual falls with time or stays constant."""

SETTINGS = (*SPACE, "lam_end")
START = "start"
"""Label of the initial settings, which stay in the search to the end."""


def draw_trials(count: int, seed: int, start: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`count` different settings by label, the first being `start`; the same seed draws the same ones.

    A larger `count` continues the sequence of a smaller one. UserError if there are fewer different settings.
    """
    rng = np.random.default_rng(seed)
    trials = {START: {name: start[name] for name in SETTINGS}}
    seen = {tuple(trials[START].values())}
    most = len(seen | set(_all_settings()))
    if count > most:
        raise UserError(f"--num_trials {count} exceeds the {most} different settings of the search space")
    while len(trials) < count:
        drawn = {name: values[int(rng.integers(len(values)))] for name, values in SPACE.items()}
        if drawn["domain"] == "timestep":  # mirrored, so that trials equal those of the kept measures
            drawn["fused_share"] = round(1.0 - drawn["fused_share"], 9)
        drawn["lam_end"] = _lam_end(drawn["lam_start"], END_SHARES[int(rng.integers(len(END_SHARES)))])
        if tuple(drawn.values()) not in seen:
            seen.add(tuple(drawn.values()))
            trials[f"trial-{len(trials):02d}"] = drawn
    return trials


def _all_settings() -> Iterator[tuple[Any, ...]]:
    """Every possible draw in the order of SETTINGS, with duplicates where lam_start is 0."""
    place = SETTINGS.index("lam_start")
    for values in itertools.product(*SPACE.values()):
        for share in END_SHARES:
            yield (*values, _lam_end(values[place], share))


def _lam_end(lam_start: float, share: float) -> float:
    return round(lam_start * share, 6)
