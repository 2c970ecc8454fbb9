"""Who may work in an output folder: one driver per shard, and one writer of the manifest."""

import contextlib
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from engine.errors import UserError
from engine.files.trees import read_tree

# A driver on another machine whose status is younger than this is alive, even where the file system's locks do not reach.
ALIVE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part `index` (from 1) of `count`."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`2/4` is the second of four."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--shard must be i/n with 1 <= i <= n, such as 1/4 to 4/4, got {text!r}")
        return cls(index=int(found[1]), count=int(found[2]))

    @property
    def name(self) -> str:
        """For file names."""
        return f"shard-{self.index}-of-{self.count}"

    def holds(self, position: int) -> bool:
        """Whether what stands at this place (from 0) of a list that all shards have alike is this shard's."""
        return position % self.count == self.index - 1

    def owns(self, item_id: str) -> bool:
        """Whether an item of a batch is this shard's: its id alone says so, so that drivers need not have equal lists."""
        return self.holds(int(item_id, 16))


@contextlib.contextmanager
def own_shard(root: Path, shard: Shard) -> Iterator[None]:
    """Hold one shard of an output folder for the block; UserError if a driver has it, or splits the folder otherwise.

    The kernel's lock ends with the process that holds it, however it ends.
    """
    folder = root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with locked(folder / "all.lock"):  # drivers that start together look at each other's locks one by one
            for path in sorted(folder.glob("shard-*.lock")):
                if not path.stem.endswith(f"-of-{shard.count}") and (holder := _holder(path)):
                    raise UserError(
                        f"{root} is being worked on as {path.stem} by {holder}; all drivers of a folder need the same n "
                        f"in --shard i/n, and this one has {shard.count}"
                    )
            path = folder / f"{shard.name}.lock"
            file = stack.enter_context(path.open("a+", encoding="utf-8"))
            if not _try_lock(file) or _alive_elsewhere(root, shard):
                raise UserError(
                    f"another driver works on {shard.name} of {root}: {_who(path)}; wait for it, or give this one another "
                    "--shard or --out"
                )
            file.truncate(0)
            file.write(json.dumps(_me()))
            file.flush()
        yield


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file for the block, waiting for it as long as it takes."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: Path) -> str | None:
    """Who holds a lock file, in words; None if nobody does."""
    if not path.is_file():
        return None
    with path.open("a") as file:
        return None if _try_lock(file) else _who(path)


def _who(path: Path) -> str:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return f"process {tree['pid']} on {tree['host']}"
    except (ValueError, KeyError, TypeError):  # it is just writing it
        return "another process"


def _alive_elsewhere(root: Path, shard: Shard) -> bool:
    """Whether a driver of another machine wrote its status a moment ago, on a file system whose locks end at the machine."""
    shape = {"host": str, "state": str, "time": int | float}
    status = read_tree(root / "status" / f"{shard.name}.json", shape, what="the status of a batch")
    if status is None or status["host"] == socket.gethostname() or status["state"] != "running":
        return False
    return time.time() - status["time"] < ALIVE_SECONDS


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
