"""Shards of an output folder, each held by one driver."""

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError
from engine.files.locks import HeldError, hold, holder_of, locked
from engine.files.trees import Shape, read_tree
from engine.shown import Say, say_on_stderr


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part `index` (from 1) of `count`."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Parse `2/4`, the second of four."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--shard must be i/n with 1 <= i <= n, such as 1/4 to 4/4, got {text!r}")
        return cls(index=int(found[1]), count=int(found[2]))

    @property
    def name(self) -> str:
        """Stem of its files."""
        return f"shard-{self.index}-of-{self.count}"

    def owns(self, item_id: str) -> bool:
        """Whether an item is in this shard; only its id decides, so that drivers need not have equal lists."""
        return int(item_id, 16) % self.count == self.index - 1


@contextlib.contextmanager
def own_shard(root: Path, shard: Shard, *, say: Say = say_on_stderr) -> Iterator[None]:
    """Hold one shard of an output folder for the block, see `engine.files.locks.hold`.

    Raises:
        UserError: another driver holds it, or works on the folder with another number of shards.
    """
    folder = root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    path = lock_file(root, shard.name)
    with contextlib.ExitStack() as stack:
        with locked(folder / "all.lock"):  # drivers that start together check each other's locks in turn
            for other in sorted(folder.glob("shard-*.lock")):
                if not other.stem.endswith(f"-of-{shard.count}") and (holder := holder_of(other, say=say)):
                    raise UserError(
                        f"{root} is being worked on as {other.stem} by {holder}; all drivers of a folder need the same n "
                        f"in --shard i/n, and this one has {shard.count}"
                    )
            if not path.exists():
                _say_who_left(root, shard, say)
            try:
                stack.enter_context(hold(path, say=say))
            except HeldError as error:
                raise UserError(
                    f"another driver works on {shard.name} of {root}: {error.who}; wait for it, or give this one another "
                    "--shard or folder"
                ) from error
        yield


def lock_file(root: Path, name: str) -> Path:
    """The lock file of the shard of this name."""
    return root / "locks" / f"{name}.lock"


def _say_who_left(root: Path, shard: Shard, say: Say) -> None:
    """Report a killed driver on another machine, which left a status but no lock."""
    try:
        shape: Shape = {"host": str, "pid": int, "state": str, "time": int | float}
        status = read_tree(root / "status" / f"{shard.name}.json", shape, what="the status of a batch")
    except UserError:  # damaged; it is rewritten each second
        return
    if status is None or status["state"] != "running" or status["host"] == socket.gethostname():
        return
    ahead = status["time"] - time.time()
    clock = f", with a clock {ahead:.0f} s ahead of this one" if ahead > 1 else ""
    say(
        f"taking over {shard.name} from process {status['pid']} on {status['host']}, which ended without cleaning up{clock}"
    )
