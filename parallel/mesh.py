"""The ranks of a run as a mesh cfg x ring x ulysses, and the process groups of its axes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.collectives import CollectiveTrace, barrier, ignore_bytes, ignore_call
from parallel.monitor import Monitor, start_cuda_monitor

AXES = ("cfg", "ring", "ulysses")


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """This rank's line of ranks along one axis: their group, their world ranks, and this rank's place among them.

    `monitor` follows the collectives where the backend does not report which one a rank waits in; None elsewhere.
    """

    name: str
    group: dist.ProcessGroup
    ranks: tuple[int, ...]
    rank: int
    monitor: Monitor | None = None

    @property
    def size(self) -> int:
        """Number of ranks on the line."""
        return len(self.ranks)

    def trace(self, label: object, on_bytes: Callable[[str, int], None] = ignore_bytes) -> CollectiveTrace:
        """A trace for collectives of these ranks, which the monitor follows, if there is one."""
        following = ignore_call if self.monitor is None else self.monitor.following
        return CollectiveTrace(label=label, on_bytes=on_bytes, on_call=following)


@dataclass(frozen=True, kw_only=True, slots=True)
class SeqMesh:
    """All axes of this rank. `sequence` is ring x ulysses, ring-major: all ranks that share one video's tokens.

    `alone` is this rank by itself: the ulysses axis of a layout that splits no heads. `world` is all ranks, cfg-major.
    """

    device_mesh: DeviceMesh
    cfg: Axis
    ring: Axis
    ulysses: Axis
    sequence: Axis
    alone: Axis
    world: Axis

    def on_shards(self) -> "SeqMesh":
        """The same ranks with every rank of the sequence on the ring and no heads split."""
        return replace(self, ring=self.sequence, ulysses=self.alone)

    @property
    def is_alive(self) -> bool:
        """Whether the process groups of this mesh still exist."""
        if not dist.is_initialized():
            return False
        try:
            dist.get_group_rank(self.world.group, self.world.ranks[0])
        except ValueError:  # the default group was destroyed
            return False
        return True

    def trace(self, label: object, on_bytes: Callable[[str, int], None]) -> CollectiveTrace:
        """A trace for collectives of any of these axes."""
        return self.world.trace(label, on_bytes)


def build_mesh(*, cfg: int, ring: int, ulysses: int, device: torch.device, timeout: timedelta) -> SeqMesh:
    """Arrange the world as cfg x ring x ulysses, ulysses innermost; every rank calls this with the same arguments.

    The groups are made here and handed to DeviceMesh, as DeviceMesh itself would give them its backend's default
    timeout of 10 or 30 minutes. Each group runs one barrier: a missing peer is found now, and NCCL allows point-to-point
    between some members of a group only after all of them have communicated.
    """
    world = dist.get_world_size(dist.group.WORLD)
    if min(cfg, ring, ulysses) < 1 or cfg * ring * ulysses != world:
        raise ValueError(
            f"cannot arrange {world} ranks as cfg {cfg} x ring {ring} x ulysses {ulysses} = {cfg * ring * ulysses} ranks"
        )
    ranks = torch.arange(world, device="cpu").view(cfg, ring, ulysses)
    make_axis = _axis_maker(timeout)
    axes = {
        "cfg": make_axis("cfg", ranks.flatten(1).T),
        "ring": make_axis("ring", ranks.transpose(1, 2).flatten(0, 1)),
        "ulysses": make_axis("ulysses", ranks.flatten(0, 1)),
        "sequence": make_axis("sequence", ranks.flatten(1)),
        "alone": make_axis("alone", ranks.view(world, 1)),
        "world": make_axis("world", ranks.view(1, world)),
    }
    if world > 1 and dist.get_backend(dist.group.WORLD) == "nccl":
        monitor = start_cuda_monitor(rank=dist.get_rank(dist.group.WORLD), timeout=timeout)
        axes = {name: replace(axis, monitor=monitor) for name, axis in axes.items()}
    for axis in axes.values():
        barrier(group=axis.group, device=device, trace=axis.trace(f"start, {axis.name} axis"))
    groups = [axes[name].group for name in AXES]
    device_mesh = DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=AXES)
    return SeqMesh(device_mesh=device_mesh, **axes)


def _axis_maker(timeout: timedelta) -> Callable[[str, Tensor], Axis]:
    """Make axes whose groups are shared where their ranks are the same, such as ring and sequence without ulysses.

    A process group exists only if all ranks of the world make all groups in one order, so every rank makes every line. The group of
    a rank by itself concerns no other: each rank makes its own, which never communicates.
    """
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    world_rank = dist.get_rank(dist.group.WORLD)

    def make_axis(name: str, lines: Tensor) -> Axis:
        mine = next(line for line in map(tuple, lines.tolist()) if world_rank in line)
        for line in map(tuple, lines.tolist()):
            if line not in groups and (len(line) > 1 or line == mine):
                groups[line] = dist.new_group(list(line), timeout=timeout, use_local_synchronization=len(line) == 1)
        return Axis(name=name, group=groups[mine], ranks=mine, rank=mine.index(world_rank))

    return make_axis
