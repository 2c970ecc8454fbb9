"""The process group of a single process, so that one rank takes the code path of many: created on first use, destroyed after the last."""

from datetime import timedelta

import torch
import torch.distributed as dist

from engine.errors import UserError
from parallel.mesh import SeqMesh, build_mesh

TIMEOUT = timedelta(minutes=1)


class GroupOfOne:
    """Counts the users of the default process group that this object created; torch has one per process."""

    def __init__(self) -> None:
        self._users = 0
        self._made: dist.ProcessGroup | None = None

    def acquire(self) -> SeqMesh:
        """Return a mesh of one rank; UserError if the process already belongs to a group of several ranks."""
        if not self._is_current():
            self._users = 0
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
            self._users, self._made = 1, dist.group.WORLD
        elif self._users:
            self._users += 1
        elif (world := dist.get_world_size(dist.group.WORLD)) > 1:
            raise UserError(f"this process is one of {world} ranks; pass ranks=engine.Ranks(mesh=build_mesh(...))")
        # An existing group of one may use NCCL, which takes tensors of a GPU only.
        device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        return build_mesh(cfg=1, ring=1, ulysses=1, device=device, timeout=TIMEOUT)

    def release(self) -> None:
        """Undo `acquire`: the last user destroys the group, unless other code created or destroyed it."""
        if not self._is_current():
            self._users = 0
        if self._users:
            self._users -= 1
            if self._users == 0:
                self._made = None
                dist.destroy_process_group()

    def _is_current(self) -> bool:
        """Whether the process's default group is still the one that was created here."""
        return self._made is not None and dist.is_initialized() and dist.group.WORLD is self._made


GROUP_OF_ONE = GroupOfOne()
