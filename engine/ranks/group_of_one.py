"""The process group of a process that is alone: the same code path as many ranks, made on first use, removed after the last."""

from datetime import timedelta

import torch
import torch.distributed as dist

from engine.errors import UserError
from parallel.mesh import SeqMesh, build_mesh

TIMEOUT = timedelta(minutes=1)


class GroupOfOne:
    """Counts who uses the default process group that this object made; torch has one such group per process."""

    def __init__(self) -> None:
        self._users = 0
        self._made: dist.ProcessGroup | None = None

    def acquire(self) -> SeqMesh:
        """A mesh of one rank. UserError if the process already belongs to a group of several, which needs its own mesh."""
        if not self._is_current():
            self._users = 0
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
            self._users, self._made = 1, dist.group.WORLD
        elif self._users:
            self._users += 1
        elif (world := dist.get_world_size(dist.group.WORLD)) > 1:
            raise UserError(f"this process is one of {world} ranks; pass ranks=engine.Ranks(mesh=build_mesh(...))")
        # A group of one that the process had already may be NCCL's, which takes tensors of a GPU only.
        device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        return build_mesh(cfg=1, ring=1, ulysses=1, device=device, timeout=TIMEOUT)

    def release(self) -> None:
        """The counterpart of `acquire`: the last user removes the group, unless somebody else had made it, or destroyed it."""
        if not self._is_current():
            self._users = 0
        if self._users:
            self._users -= 1
            if self._users == 0:
                self._made = None
                dist.destroy_process_group()

    def _is_current(self) -> bool:
        """Whether the process's default group is the one that was made here; it may have been destroyed, and another made."""
        return self._made is not None and dist.is_initialized() and dist.group.WORLD is self._made


GROUP_OF_ONE = GroupOfOne()
