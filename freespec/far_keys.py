"""Far keys: which keys outside a query's window the global branch attends to, as integers (docs/far-keys.md).

Each frame keeps m tokens, spread over rows and columns, different ones in each frame, layer and step: a video of m tokens a
frame, in which each kept token stands for frame tokens / m. No random numbers are used, so that all ranks agree.
"""

import functools
import re
from fractions import Fraction

from freespec.methods import Method

#: A share of each frame's tokens, or a number of keys in all outside the windows; None: all.
FarKeys = Fraction | int | None
# Steps of a sequence of low discrepancy over frames, layers and steps, in 2**32nds: powers of the real root of x^4 = x + 1.
STEPS = tuple(round(2**32 / 1.2207440846057596**power) for power in (1, 2, 3))


def parse_far(far: int | str) -> FarKeys:
    """The setting `attention.far`: `all`, a share such as `1/8`, or a number of keys; ValueError for anything else."""
    text = str(far)
    if text == "all":
        return None
    share = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if share and 0 < int(share[1]) < int(share[2]):
        return Fraction(int(share[1]), int(share[2]))
    if re.fullmatch(r"[0-9]{1,12}", text) and int(text) > 0:
        return int(text)
    raise ValueError(
        f"attention.far must be all, a share of each frame between 0 and 1 such as 1/8, or a number of keys in all such as 4096, got {far!r}"
    )


def check_far(far: int | str, method: Method, name: str) -> None:
    """Raise ValueError for an invalid setting, or one that the method would not use."""
    if parse_far(far) is None:
        return
    modes = {step.mode for step in method.plan([1000.0, 1.0])}
    if not modes <= {"dual", "local"} or "dual" not in modes:
        instead = "; direct_far is direct with fewer far keys" if name == "direct" else ""
        raise ValueError(
            f"attention.far {far} thins the keys of dual steps, and method {name} has steps of other kinds "
            f"({', '.join(sorted(modes))}); set attention.far all, or use a method that fuses both branches, such as freespec{instead}"
        )


def far_tokens(far: int | str, *, num_frames: int, frame_tokens: int, window_frames: int) -> int | None:
    """m, the tokens kept of each frame by the setting; None if that is all of them. ValueError for less than one key per frame."""
    outside, asked = num_frames - window_frames, parse_far(far)
    if asked is None or outside <= 0:
        return None
    share = isinstance(asked, Fraction)
    kept = -(-frame_tokens * asked.numerator // asked.denominator) if share else int(asked) // outside
    if kept < 1:
        raise ValueError(
            f"attention.far {far} is less than one key for each of the {outside} frames outside the window of {window_frames}; "
            f"use {outside} or more"
        )
    return kept if kept < frame_tokens else None


@functools.cache
def z_order(rows: int, columns: int) -> tuple[int, ...]:
    """The tokens of a frame along a Z-curve: neighbours in this order are neighbours in the frame."""
    bits = range(max(rows, columns).bit_length())

    def place(token: int) -> int:
        row, column = divmod(token, columns)
        return sum((row >> bit & 1) << 2 * bit + 1 | (column >> bit & 1) << 2 * bit for bit in bits)

    return tuple(sorted(range(rows * columns), key=place))
