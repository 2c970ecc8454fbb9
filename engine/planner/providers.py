"""Which degrees a method and `parallel.provider` support for a video, from integers alone; packages and devices are checked later."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.config import MethodConfig, SamplerConfig, VideoConfig
from engine.errors import UserError
from engine.planner.layout import feasible_degrees, num_passes, plan_sequence
from engine.planner.model import ModelSpec
from engine.ranks.layouts import Degrees, check_layout
from parallel.deepspeed import refuse_deepspeed_plan
from parallel.shards import SequencePlan
from parallel.xfuser import refuse_xfuser_plan

FixedDegrees = tuple[int | None, int | None, int | None]
AXES = ("cfg", "ring", "ulysses")


@dataclass(frozen=True, kw_only=True)
class Support:
    """What decides the possible degrees of a video.

    Attributes:
        tokens: S.
        heads: N.
        passes: forwards of one step.
        method: the method and its settings.
        provider: parallel.provider.
        kernel: attention.kernel.
        beside: pictures whose tokens are among them.
    """

    tokens: int
    heads: int
    passes: int
    method: MethodConfig
    provider: str
    kernel: str
    beside: int = 0

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        video: VideoConfig,
        sampler: SamplerConfig,
        method: MethodConfig,
        *,
        provider: str,
        kernel: str,
        beside: int = 0,
    ) -> "Support":
        """For a video of a checkpoint, and so many pictures whose tokens stand beside it."""
        frames, frame_tokens = spec.grid(video.num_frames, video.height, video.width)
        return cls(
            tokens=(frames + beside) * frame_tokens,
            beside=beside,
            heads=spec.heads,
            passes=num_passes(sampler),
            method=method,
            provider=provider,
            kernel=kernel,
        )

    def sequence(self, degrees: Degrees) -> SequencePlan:
        """Tokens and heads over ranks of these degrees."""
        return plan_sequence(self.tokens, self.heads, degrees, even=self.provider != "torch")

    def possible(self, world: int, fixed: FixedDegrees = (None, None, None)) -> list[Degrees]:
        """Every (cfg, ring, ulysses) that method and provider support and that keeps the fixed ones; UserError, with what is possible, if none."""
        wanted = [degrees for degrees in self.served(world) if keeps(degrees, fixed)]
        if not wanted:
            self._refuse(world, fixed)
        return wanted

    def served(self, world: int) -> list[Degrees]:
        """Every (cfg, ring, ulysses) that method and provider support."""
        return [degrees for degrees in self._of_method(world) if self._reason(degrees) is None]

    def _of_method(self, world: int) -> list[Degrees]:
        return self._feasible(world, self.method.method.refused_axes)

    def _feasible(self, world: int, refused: Collection[str] = ()) -> list[Degrees]:
        return feasible_degrees(world, heads=self.heads, passes=self.passes, tokens=self.tokens, refused=refused)

    def _reason(self, degrees: Degrees) -> str | None:
        """Why the provider does not support these degrees; None if it does."""
        try:
            if self.provider == "xfuser":
                refuse_xfuser_plan(self.sequence(degrees), kernel=self.kernel)
            elif self.provider == "deepspeed":
                refuse_deepspeed_plan(self.sequence(degrees))
        except ValueError as error:
            return str(error)
        return None

    def _refuse(self, world: int, fixed: FixedDegrees) -> None:
        """Raise UserError for degrees of which none is possible: too few tokens, the method, the provider, or the fixed ones."""
        every, of_method, served = self._feasible(world), self._of_method(world), self.served(world)
        if not every:
            raise UserError(f"{self.tokens} tokens cannot be split over {world} ranks; start fewer ranks")
        for degrees in every:
            if keeps(degrees, fixed):
                check_layout(self.method.name, self.method.method, degrees, served)
        wanted = [degrees for degrees in of_method if keeps(degrees, fixed)]
        if wanted:
            self._refuse_provider(world, wanted[0], served)
        asked = ", ".join(f"{axis} {degree}" for axis, degree in zip(AXES, fixed, strict=True) if degree)
        ranks = "1 rank" if world == 1 else f"{world} ranks"
        raise UserError(f"{ranks} cannot be arranged with {asked}; possible are {_listed(of_method)}")

    def _refuse_provider(self, world: int, wanted: Degrees, served: Sequence[Degrees]) -> None:
        """Raise UserError for degrees that the provider does not support, with those it does, or the nearest numbers of ranks."""
        reason = f"parallel.provider {self.provider}: {self._reason(wanted)}{_describe_beside(self.beside)}"
        if served:
            raise UserError(f"{reason}; it can have {_listed(served)}, and parallel.provider torch any")
        near = (range(world - 1, 0, -1), range(world + 1, 2 * world + 1))
        numbers = [str(found) for side in near if (found := next(filter(self.served, side), None)) is not None]
        others = f", or {' or '.join(numbers)} ranks" if numbers else ""
        raise UserError(f"{reason}; it can have no arrangement of {world} ranks: use parallel.provider torch{others}")


def _describe_beside(beside: int) -> str:
    """The end of a line about uneven shares that says of pictures that their tokens are among them."""
    return f"; the tokens of pictures at later frames than the first ({beside}) count too" if beside else ""


def keeps(degrees: Sequence[int], fixed: Sequence[int | None]) -> bool:
    """Whether these degrees equal the fixed ones that are not None."""
    return all(want in (None, have) for want, have in zip(fixed, degrees, strict=True))


def _listed(degrees: Sequence[Degrees]) -> str:
    return ", ".join(" x ".join(map(str, each)) for each in degrees) + " (cfg x ring x ulysses)"
