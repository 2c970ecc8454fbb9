"""One rank as a Ray actor, which hosts the rank's process on its node. Imports nothing slow."""

import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from engine.files.processes import is_running
from launch.ranks.host import ORPHAN_SECONDS, Event, RankHost


class RankActor:
    """Expose the methods of `RankHost` to a remote driver; several may run concurrently."""

    def __init__(self) -> None:
        """No rank yet."""
        self._host = RankHost()

    def describe(self) -> dict[str, Any]:
        """Return the node, its address, and the GPUs that Ray has reserved for this rank.

        A node is named by its host and the first digits of Ray's id: several Ray nodes may have one host.
        """
        node_id = ray.get_runtime_context().get_node_id()
        node = f"{socket.gethostname()}/{node_id[:8]}"
        gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
        return {"node": node, "node_id": node_id, "address": ray.util.get_node_ip_address(), "gpus": gpus}

    def listen(self, address: str) -> int:
        """See `RankHost.listen`."""
        return self._host.listen(address)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], log: str | None, cwd: str, lines: Sequence[str]
    ) -> tuple[int, int] | None:
        """See `RankHost.start`; `lines` are sent to the rank first. Returns what `wait_until_ended` takes."""
        self._host.start(command, environment, log=log, cwd=cwd)
        self._host.die_unless_polled(ORPHAN_SECONDS)
        for line in lines:
            self._host.send(line)
        return self._host.process

    def send(self, line: str) -> None:
        """See `RankHost.send`."""
        self._host.send(line)

    def poll(self, seconds: float) -> list[Event]:
        """See `RankHost.poll`."""
        return self._host.poll(seconds)

    def interrupt(self) -> None:
        """See `RankHost.interrupt`."""
        self._host.interrupt()

    def end(self) -> None:
        """See `RankHost.end`."""
        self._host.end()


def wait_until_ended(pid: int, started: int) -> None:
    """Return once this process of the node, with this start time, has ended; TimeoutError after `ORPHAN_SECONDS`."""
    last = time.monotonic() + ORPHAN_SECONDS
    while is_running(pid, started):
        if time.monotonic() > last:
            raise TimeoutError(f"process {pid} still runs after {ORPHAN_SECONDS:.0f} s")
        time.sleep(0.05)
