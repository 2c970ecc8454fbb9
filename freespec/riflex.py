"""RIFLEx (arXiv 2502.15894): lower one temporal frequency of the rotary table, so that its period covers a longer video."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Share of a period that the video fills afterwards: less than one, so that its end does not look like its beginning.
FILL = 0.9


@dataclass(frozen=True, kw_only=True)
class Riflex:
    """Settings of RIFLEx, usable with any method; both branches see the changed table.

    Attributes:
        enabled: whether the table is changed where the video is longer than the native length and the frequency's period.
        index: which temporal frequency, 1 is the fastest; None takes the one whose period is nearest to `repetition`; not both.
        repetition: latent frames after which long videos of the model were seen to repeat; None takes the shortest period
            that covers the native length.
    """

    enabled: bool = False
    index: int | None = None
    repetition: float | None = None

    def __post_init__(self) -> None:
        """Reject invalid numbers, and settings that would have no effect."""
        for name in ("index", "repetition"):
            if getattr(self, name) is not None and not self.enabled:
                raise ValueError(
                    f"riflex: {name} {getattr(self, name)} has no effect while enabled is false; set enabled true, or {name} null"
                )
        if self.index is not None and self.repetition is not None:
            raise ValueError(
                f"riflex: index {self.index} and repetition {self.repetition} both name the frequency; leave one of them null"
            )
        if self.index is not None and self.index < 1:
            raise ValueError(f"riflex: index must be 1 or more, got {self.index}")
        if self.repetition is not None and not 0.0 < self.repetition < math.inf:
            raise ValueError(
                f"riflex: repetition must be a finite number of frames, more than 0, got {self.repetition}"
            )


def lowered_frequency(
    riflex: Riflex, frequencies: Sequence[float], *, num_frames: int, window_frames: int
) -> tuple[int, float] | None:
    """(pair, radians per frame): the pair counted from 0 that changes, and its frequency 0.9 · 2 pi / F; None if none does.

    `frequencies` are radians per latent frame, first pair first. A video of native length keeps the table, and so does one no
    longer than the period N = 2 pi / frequency of the chosen pair. ValueError if the model has no such pair.
    """
    periods = [2.0 * math.pi / frequency for frequency in frequencies]
    pair = _choose_pair(riflex, periods, window_frames)
    if not riflex.enabled or num_frames <= max(window_frames, periods[pair]):
        return None
    return pair, FILL * 2.0 * math.pi / num_frames


def _choose_pair(riflex: Riflex, periods: Sequence[float], window_frames: int) -> int:
    if riflex.index is not None:
        if riflex.index > len(periods):
            raise ValueError(f"riflex: index {riflex.index} of the model's {len(periods)} temporal frequencies")
        return riflex.index - 1
    if riflex.repetition is not None:
        near = riflex.repetition
        return min(range(len(periods)), key=lambda pair: abs(periods[pair] - near))
    # A period shorter than the native length repeated within the training videos.
    holding = [pair for pair in range(len(periods)) if periods[pair] >= window_frames]
    if not holding:
        raise ValueError(
            f"riflex: the longest of the model's periods is {max(periods):.1f} frames, less than the native {window_frames}; "
            "give index or repetition"
        )
    return min(holding, key=lambda pair: periods[pair])
