"""Ranks of replicas on a Ray cluster, whose orders and events go through a bridge process. Imports nothing slow."""

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.files.processes import is_running
from launch.process.environment import STRATEGIES, PlacementStrategy
from launch.ranks.host import ORPHAN_SECONDS, Event, RankHost, end_ranks

BRIDGE = ("-m", "launch.ranks.ray_bridge")
# Time for a lost cluster to answer again, and for the first answer.
PATIENCE_SECONDS = 120.0
OPEN_SECONDS = 180.0
# For a bridge to end a local Ray. It takes five seconds: signals are blocked in Ray's processes, which Ray kills after that time.
# Some of a Ray whose bridge is killed stay for a minute and a half.
CLOSE_SECONDS = 15.0
# A lost rank has ended by then: its actor kills it ORPHAN_SECONDS after the last poll, which takes some seconds itself.
LOST_SECONDS = ORPHAN_SECONDS + 10.0


PLACEMENT_HELP = (
    "how Ray spreads the ranks of a video over nodes: PACK (few nodes), STRICT_PACK (one node, waiting for it), SPREAD or "
    "STRICT_SPREAD (a node for each)"
)


class NoRayError(ValueError):
    """Ray is not installed, lacks the resources, or no cluster answers."""


def check_ray(address: str) -> None:
    """Raise NoRayError if Ray is not installed, or for the address of a Ray client."""
    if importlib.util.find_spec("ray") is None:
        raise NoRayError("--ray needs Ray, which is not installed; install it with: pip install '.[ray]'")
    if address.startswith("ray://"):
        raise NoRayError(
            f"--ray {address} is a Ray client's address; run this on a machine of the cluster with --ray auto, or hand it in "
            "with: ray job submit"
        )


def check_placement(strategy: str, *, address: str | None, num_ranks: int) -> None:
    """Raise NoRayError for a placement strategy that is unknown, needs --ray, or needs more than one node."""
    if strategy not in STRATEGIES:
        raise NoRayError(f"--placement_strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if address is None and strategy != "PACK":
        raise NoRayError(
            f"--placement_strategy {strategy} is for ranks that --ray starts; give both on the command line"
        )
    if address == "local" and strategy == "STRICT_SPREAD" and num_ranks > 1:
        raise NoRayError(
            f"--placement_strategy STRICT_SPREAD wants {num_ranks} nodes for {num_ranks} ranks, and --ray local has one; "
            "leave it out"
        )


class RayPool:
    """The connection to a cluster through a bridge process, which is restarted if it dies. A context manager."""

    def __init__(self, address: str, *, cpus: int, log: Path | None, wake: Callable[[], None] | None = None) -> None:
        """`address` is auto, HOST:PORT, or local for a new Ray with `cpus` slots; `log` receives Ray's output.

        Once open, `gpus` is the number of GPUs of the cluster, and `most_gpus` the most that its autoscaler may add up to.
        """
        self.gpus = self.most_gpus = 0.0
        self.is_open = False  # until then the bridge takes no orders
        self.address = address
        self._cpus = cpus
        self._log = log
        self._wake = wake
        self._bridge: RankHost | None = None
        self._ranks: dict[str, RayRanks] = {}
        self._said: list[str] = []
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "RayPool":
        """Connect; NoRayError if that fails."""
        check_ray(self.address)
        self._temporary = tempfile.TemporaryDirectory(prefix="freespec-ray-")
        try:
            self._log = self._log or Path(self._temporary.name) / "ray.log"
            self._open(patience=0.0)
            self._wait_until_open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        """End all ranks, and disconnect."""
        try:
            end_ranks([*self._ranks.values()])
        finally:
            self._close()

    def refuse_never(self, gpus: int) -> None:
        """Raise NoRayError if a local Ray, which no machine joins later, has too few GPUs."""
        if self.address == "local" and gpus > self.gpus:
            raise NoRayError(
                f"{gpus} ranks need {gpus} GPUs, and --ray local is a Ray of this machine alone, which has {self.gpus:g}; ask for "
                "fewer, give --model.device cpu, or the address of a cluster as --ray"
            )

    def ranks(self, name: str, count: int, start: "Start") -> "RayRanks":
        """Register the ranks of a replica."""
        self._ranks[name] = RayRanks(self, name, count, start)
        return self._ranks[name]

    def order(self, do: str, **fields: Any) -> None:
        """Send the bridge an order; start another bridge if it has died."""
        if self._bridge is None:
            self._open(patience=PATIENCE_SECONDS)
        assert self._bridge is not None
        self._bridge.send(json.dumps({"do": do, **fields}))

    def pump(self) -> None:
        """Forward pending events; if the bridge has died, its ranks have ended."""
        if self._bridge is None:
            return
        for event in self._bridge.drain():
            if event["event"] == "rank":
                self._ranks[event["replica"]].receive(event)
            elif event["event"] == "open":
                self.is_open = True
            elif event["event"] == "refused":
                self._said.append(event["message"])
            elif event["event"] == "exit":
                why = (
                    self._said[-1]
                    if self._said
                    else "the Ray node process of this machine, or the connection, has ended"
                )
                if self.address != "local":
                    why += f"; its ranks on other machines end within {ORPHAN_SECONDS:.0f} s"
                self._bridge, self._said = None, []
                for ranks in self._ranks.values():
                    ranks.lose(f"lost Ray: {why}")

    def _wait_until_open(self) -> None:
        until = time.monotonic() + OPEN_SECONDS
        while self._bridge is not None and time.monotonic() < until:
            for event in self._bridge.poll(0.5):
                if event["event"] == "open":
                    self.gpus, self.most_gpus, self.is_open = event["gpus"], event["most_gpus"], True
                    return
                if event["event"] == "refused":
                    self._said.append(event["message"])
                if event["event"] == "exit":
                    raise NoRayError(self._refusal(event))
        if self.address == "local":
            raise NoRayError(f"the local Ray did not start within {OPEN_SECONDS:.0f} s")
        raise NoRayError(self._no_cluster_answers(f"no answer for {OPEN_SECONDS:.0f} s"))

    def _open(self, *, patience: float) -> None:
        self._bridge, self.is_open = RankHost(self._wake), False
        words = [*BRIDGE, self.address, str(self._cpus), str(patience)]
        self._bridge.start(words, {}, log=str(self._log))

    def _close(self) -> None:
        if self._bridge is not None:
            self._bridge.finish(CLOSE_SECONDS if self.is_open else 0.0)
            self._bridge = None
        if self._temporary is not None:
            self._temporary.cleanup()

    def _refusal(self, event: Event) -> str:
        # Ray only says that it cannot connect; its log has the reason.
        if any("Unauthenticated" in line for line in event["tail"]):
            return (
                f"the Ray cluster at {self.address} requires its token, which Ray does not send to an explicit address by itself; set "
                "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH unless the token lies in ~/.ray/auth_token"
            )
        if self._said:
            return self._no_cluster_answers(self._said[-1])
        last = next((line.strip() for line in reversed(event["tail"]) if line.strip()), f"exit code {event['code']}")
        return f"cannot use Ray: {last}"

    def _no_cluster_answers(self, why: str) -> str:
        hint = "start one with: ray start --head, or use --ray local to start one for this run"
        return f"no Ray cluster answers at {self.address} ({why}); {hint}"


@dataclass(frozen=True, kw_only=True)
class Start:
    """How every rank of a replica is started.

    Attributes:
        gpus: whether each rank gets a GPU.
        strategy: how Ray spreads them over nodes.
        command: arguments of Python.
        environment: variables added to those of the node.
        logs: a log file for each rank; None makes its output events.
        cwd: working directory.
    """

    gpus: bool
    strategy: PlacementStrategy
    command: Sequence[str]
    environment: Mapping[str, str]
    logs: Sequence[str] | None
    cwd: str


class RayRanks:
    """The ranks of one replica; see `launch.ranks.host.RankProcesses`."""

    def __init__(self, pool: RayPool, name: str, count: int, start: Start) -> None:
        self.count = count
        self._pool = pool
        self._name = name
        self._start = start
        self._generation = 0
        self._events: list[tuple[int, Event]] = []
        self._open: set[int] = set()
        self._processes: dict[int, Sequence[int]] = {}
        # By generation and rank: when they were lost, and their processes where this machine has them.
        self._lost: dict[tuple[int, int], tuple[float, Sequence[int] | None]] = {}
        self._placed = self._killed = False

    @property
    def num_running(self) -> int:
        """See `RankProcesses`; a rank whose actor or bridge is lost counts until its end is seen, or LOST_SECONDS have passed."""
        for key, (since, process) in [*self._lost.items()]:
            if time.monotonic() - since > LOST_SECONDS or (process is not None and not is_running(*process)):
                del self._lost[key]
        return (len(self._open) if self._pool.is_open else 0) + len(self._lost)

    def start(self, setup: Mapping[str, Any] | None) -> None:
        """See `RankProcesses`; without a setup the ranks get no line."""
        self._generation += 1
        self._events, self._open, self._processes = [(0, {"event": "placing"})], set(range(self.count)), {}
        self._placed = self._killed = False
        lines = [] if setup is None else [json.dumps(setup)]
        fields = {"replica": self._name, "generation": self._generation, "count": self.count, "lines": lines}
        self._pool.order("start", **fields, **asdict(self._start))

    def send(self, line: str) -> None:
        """See `RankProcesses`."""
        if self._open:
            self._pool.order("send", replica=self._name, line=line)

    def drain(self) -> list[tuple[int, Event]]:
        """See `RankProcesses`."""
        self._pool.pump()
        found, self._events = self._events, []
        return found

    def interrupt(self) -> None:
        """See `RankProcesses`."""
        if self._open:
            self._pool.order("interrupt", replica=self._name)

    def kill(self) -> None:
        """See `RankProcesses`."""
        if self._open and not self._killed:
            self._killed = True
            self._pool.order("kill", replica=self._name)

    def receive(self, event: Mapping[str, Any]) -> None:
        """Queue an event of a rank; events from an earlier start are dropped."""
        start, rank, of = event["generation"], event["rank"], event["of"]
        if of["event"] == "ended":
            self._lost.pop((start, rank), None)
        if start != self._generation or rank not in self._open:
            return
        self._events.append((rank, of))
        if of["event"] == "placed":
            self._placed = True
        elif of["event"] == "started" and of["process"] is not None:
            self._processes[rank] = of["process"]
        elif of["event"] == "exit":
            self._open.discard(rank)
            if of.get("lost"):
                self._note_lost(rank)

    def lose(self, why: str) -> None:
        """End all ranks with the bridge; `why` becomes their last line."""
        for rank in sorted(self._open):
            self._events.append((rank, {"event": "exit", "code": None, "pid": 0, "said": why, "tail": []}))
            if self._placed:
                self._note_lost(rank)
        self._open = set()

    def _note_lost(self, rank: int) -> None:
        here = self._processes.get(rank) if self._pool.address == "local" else None
        self._lost[self._generation, rank] = time.monotonic(), here
