"""One number for a video of the embedded world: the mean of four shares, two of consistency and two of dynamics."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

SPEED_RANGE = 2.0
"""Speed error in pixels per frame that scores 0; the world's speeds are 1.5 and 2.5."""

PARTS = {
    "kept": "mean of `shape_kept` and `colour_kept`",
    "captioned": "mean of `shape_as_captioned`, `colour_as_captioned` and `background_as_captioned`",
    "motion": "`motion_as_captioned`",
    "speed": f"1 - `speed_error` / {SPEED_RANGE:g} px/frame, at least 0",
}
"""The averaged parts: two of consistency (object, caption) and two of dynamics (motion, speed)."""


def parts_of(values: Mapping[str, float]) -> dict[str, float]:
    """The four parts, 0..1, of one video's measures; 0 if not measurable, so that losing the object gains nothing."""
    return {
        "kept": _mean(values["shape_kept"], values["colour_kept"]),
        "captioned": _mean(
            values["shape_as_captioned"], values["colour_as_captioned"], values["background_as_captioned"]
        ),
        "motion": _mean(values["motion_as_captioned"]),
        "speed": _mean(max(0.0, 1.0 - values["speed_error"] / SPEED_RANGE))
        if math.isfinite(values["speed_error"])
        else 0.0,
    }


def score_of(values: Mapping[str, float]) -> float:
    """The mean of the four parts."""
    return float(np.mean(list(parts_of(values).values())))


def _mean(*values: Any) -> float:
    return float(np.mean([value if math.isfinite(value) else 0.0 for value in values]))
