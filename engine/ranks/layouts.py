"""How ranks share a video: the ranks, and the layouts that a method supports."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from engine.errors import UserError
from freespec.methods import Method
from parallel.attention import TORCH_EXCHANGE, HeadExchange, HybridAttention
from parallel.mesh import SeqMesh

Degrees = tuple[int, int, int]  # cfg, ring, ulysses


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """How a process shares one video with others.

    Attributes:
        mesh: cfg x ring x ulysses, from `parallel.mesh.build_mesh`. A pipeline's own loop runs both passes of guidance in
            every rank, so cfg must be 1 there; `LongVideoEngine` uses the axis.
        local_route: how local steps cross the ulysses axis: `halo`, `all_to_all`, or `auto` for fewer bytes.
        exchange: exchanges heads for tokens.
        hybrid: computes all of `direct` over the ranks instead, including the exchange, if not None.
        why: the reason for these degrees, for the record.
        nodes: name of the node of each rank, for the record.
        store: where they wait for a rank that loads for longer than a collective waits, on backends that end a rank then without
            noticing sooner that another one is lost; None: they wait in a collective.
    """

    mesh: SeqMesh
    local_route: str = "auto"
    exchange: HeadExchange = TORCH_EXCHANGE
    hybrid: HybridAttention | None = None
    why: str = "given"
    nodes: tuple[str, ...] = ()
    store: dist.Store | None = None

    @property
    def degrees(self) -> Degrees:
        """cfg, ring, ulysses."""
        return self.mesh.cfg.size, self.mesh.ring.size, self.mesh.ulysses.size

    def described(self, *, local_route: str, provider: str) -> dict[str, Any]:
        """The entry of the record about the ranks."""
        cfg, ring, ulysses = self.degrees
        nodes: dict[str, list[int]] = {}
        for rank, node in enumerate(self.nodes):
            nodes.setdefault(node, []).append(rank)
        return {
            "ranks": self.mesh.world.size,
            "cfg": cfg,
            "ring": ring,
            "ulysses": ulysses,
            "local_route": local_route,
            "provider": provider,
            "why": self.why,
            "nodes": [{"node": node, "ranks": ranks} for node, ranks in nodes.items()],
        }


def refused_axes(refused: Collection[str], degrees: Degrees) -> list[str]:
    """The axes among `refused` along which these degrees have more than one rank."""
    _, ring, ulysses = degrees
    return [axis for axis, degree in (("ring", ring), ("ulysses", ulysses)) if degree > 1 and axis in refused]


def check_layout(name: str, method: Method, degrees: Degrees, possible: Collection[Degrees] | None = None) -> None:
    """Raise UserError for degrees that the method does not support, with the reason and the nearest layout that works.

    `possible`, if given, restricts that layout to those that the provider supports too.
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
    raise UserError(f"{name} cannot run as {describe(degrees)}: {why}; {advice}")


def nearest_layout(refused: Collection[str], degrees: Degrees) -> Degrees | None:
    """The same number of ranks moved to the axis that the method supports; None if it supports neither."""
    cfg, ring, ulysses = degrees
    if "ring" in refused and "ulysses" in refused:
        return None
    return (cfg, 1, ring * ulysses) if "ring" in refused else (cfg, ring * ulysses, 1)


def describe(degrees: Degrees) -> str:
    """Degrees in words."""
    return "cfg {} x ring {} x ulysses {}".format(*degrees)
