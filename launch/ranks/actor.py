"""One rank as a Ray actor, which hosts the rank's process on its node. Imports nothing slow."""

import socket
from collections.abc import Mapping, Sequence
from typing import Any

import ray

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
        node = f"{socket.gethostname()}/{ray.get_runtime_context().get_node_id()[:8]}"
        gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
        return {"node": node, "address": ray.util.get_node_ip_address(), "gpus": gpus}

    def listen(self, address: str) -> int:
        """See `RankHost.listen`."""
        return self._host.listen(address)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], log: str | None, cwd: str, lines: Sequence[str]
    ) -> None:
        """See `RankHost.start`; `lines` are sent to the rank first."""
        self._host.start(command, environment, log=log, cwd=cwd)
        self._host.die_unless_polled(ORPHAN_SECONDS)
        for line in lines:
            self._host.send(line)

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
