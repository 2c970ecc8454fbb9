"""Which layouts a method can have, and what to say of one that it cannot."""

from collections.abc import Collection

from engine.errors import UserError
from freespec.methods import Method

Degrees = tuple[int, int, int]  # cfg, ring, ulysses


def refused_axes(refused: Collection[str], degrees: Degrees) -> list[str]:
    """The axes among `refused` along which these degrees have more than one rank."""
    _, ring, ulysses = degrees
    return [axis for axis, degree in (("ring", ring), ("ulysses", ulysses)) if degree > 1 and axis in refused]


def check_layout(name: str, method: Method, degrees: Degrees, possible: Collection[Degrees] | None = None) -> None:
    """Raise UserError for degrees that the method cannot have: the reason, and the nearest layout that works.

    Of `possible` alone, if given: what the provider can have too.
    """
    reasons = method.refused_axes
    axes = refused_axes(reasons, degrees)
    if not axes:
        return
    why = " and ".join(f"{axis} must be 1, as {reasons[axis]}" for axis in axes)
    nearest = nearest_layout(reasons, degrees)
    if possible is not None and nearest not in possible:
        cfg = degrees[0]
        nearest = min(possible, key=lambda each: (abs(each[0] - cfg), each), default=None)
    advice = (
        "use cfg alone, or one rank" if nearest is None else f"the nearest layout that works is {describe(nearest)}"
    )
    raise UserError(f"{name} cannot be shared out as {describe(degrees)}: {why}; {advice}")


def nearest_layout(refused: Collection[str], degrees: Degrees) -> Degrees | None:
    """The same ranks with what the method refuses on the other axis, which any number of ranks can be; None if it has none."""
    cfg, ring, ulysses = degrees
    if "ring" in refused and "ulysses" in refused:
        return None
    return (cfg, 1, ring * ulysses) if "ring" in refused else (cfg, ring * ulysses, 1)


def describe(degrees: Degrees) -> str:
    """Degrees in words."""
    return "cfg {} x ring {} x ulysses {}".format(*degrees)
