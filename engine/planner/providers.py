"""Which layouts `parallel.provider` supports, from their integers alone; packages and devices are checked later."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.errors import UserError
from engine.ranks.layouts import Degrees
from parallel.deepspeed import refuse_deepspeed_plan
from parallel.shards import SequencePlan
from parallel.xfuser import refuse_xfuser_plan

FixedDegrees = tuple[int | None, int | None, int | None]


@dataclass(frozen=True, kw_only=True)
class Provider:
    """A provider and the kernel that it is to use.

    Attributes:
        name: parallel.provider.
        kernel: attention.kernel.
    """

    name: str
    kernel: str

    def reason(self, plan: SequencePlan) -> str | None:
        """Why it does not support these shares; None if it does."""
        try:
            if self.name == "xfuser":
                refuse_xfuser_plan(plan, kernel=self.kernel)
            elif self.name == "deepspeed":
                refuse_deepspeed_plan(plan)
        except ValueError as error:
            return str(error)
        return None

    def check(
        self,
        world: int,
        fixed: FixedDegrees,
        *,
        degrees_of: Callable[[int], list[Degrees]],
        plan_of: Callable[[Degrees], SequencePlan],
    ) -> None:
        """Raise UserError if it supports none of the degrees that keep the `fixed` ones, with those it supports.

        `degrees_of` lists the method's degrees for a number of ranks, `plan_of` gives the shares of one of them.
        """
        every = degrees_of(world)
        wanted = [degrees for degrees in every if keeps(degrees, fixed)]
        served = [degrees for degrees in every if self.reason(plan_of(degrees)) is None]
        if not wanted or any(degrees in served for degrees in wanted):
            return
        reason = f"parallel.provider {self.name}: {self.reason(plan_of(wanted[0]))}"
        if served:
            names = ", ".join(" x ".join(map(str, degrees)) for degrees in served)
            raise UserError(f"{reason}; it can have {names} (cfg x ring x ulysses), and parallel.provider torch any")

        def serves(number: int) -> bool:
            return any(self.reason(plan_of(degrees)) is None for degrees in degrees_of(number))

        near = (range(world - 1, 0, -1), range(world + 1, 2 * world + 1))
        numbers = [str(found) for side in near if (found := next(filter(serves, side), None)) is not None]
        others = f", or {' or '.join(numbers)} ranks" if numbers else ""
        raise UserError(f"{reason}; it can have no arrangement of {world} ranks: use parallel.provider torch{others}")


def keeps(degrees: Sequence[int], fixed: Sequence[int | None]) -> bool:
    """Whether these degrees equal the fixed ones that are not None."""
    return all(want in (None, have) for want, have in zip(fixed, degrees, strict=True))
