"""Ranks on this machine. Standard library only."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.process.environment import rank_environment
from launch.ranks.host import RankEvent, RankHost

WORKER = ("-m", "launch.batching")


class LocalRanks:
    """`count` processes that meet on the loopback device; see `launch.ranks.host.RankProcesses`."""

    def __init__(
        self,
        count: int,
        *,
        environment: Mapping[str, str],
        log: Callable[[int], Path] | None = None,
        inherited: Callable[[int], Sequence[str]] = lambda rank: (),
        wake: Callable[[], None] | None = None,
        command: Sequence[str] = WORKER,
    ) -> None:
        """`environment` has extra variables for all ranks; `log(rank)` is the file of a rank's output.

        Without files, output becomes events, but for the streams `inherited(rank)`; see `RankHost.start`.
        """
        self.count = count
        self._log = log
        self._inherited = inherited
        self._environment = dict(environment)
        self._wake = wake
        self._command = command
        self._hosts: list[RankHost] = []

    @property
    def num_running(self) -> int:
        """See `RankProcesses`."""
        return sum(host.is_running for host in self._hosts)

    def start(self, setup: Mapping[str, Any] | None) -> None:
        """See `RankProcesses`."""
        self._hosts = [RankHost(self._wake) for _ in range(self.count)]
        port = self._hosts[0].listen("127.0.0.1") if self.count > 1 else 0
        for rank, host in enumerate(self._hosts):
            place = rank_environment(
                rank, self.count, local_rank=rank, local_size=self.count, address="127.0.0.1", port=port
            )
            host.start(
                self._command,
                self._environment | (place if self.count > 1 else {}),
                log=None if self._log is None else str(self._log(rank)),
                inherited=self._inherited(rank),
            )
        if setup is not None:
            self.send(json.dumps(setup))

    def send(self, line: str) -> None:
        """See `RankProcesses`."""
        for host in self._hosts:
            host.send(line)

    def drain(self) -> list[RankEvent]:
        """See `RankProcesses`."""
        return [(rank, event) for rank, host in enumerate(self._hosts) for event in host.drain()]

    def interrupt(self) -> None:
        """See `RankProcesses`."""
        self._hosts[0].interrupt()

    def kill(self) -> None:
        """See `RankProcesses`."""
        for host in self._hosts:
            host.kill()
