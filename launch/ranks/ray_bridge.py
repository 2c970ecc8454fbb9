"""A process that holds the connection to Ray for a driver: orders on stdin and events on a pipe, as JSON lines.

Ray prints on its driver's terminal and may end the process when a part of it dies. In a separate process this is harmless:
the driver notices, requeues the items in flight, and starts another bridge. It leaves blocked the signals that the driver
blocks when it starts a process, and a local Ray inherits this: when all processes of a job get SIGTERM (scancel, systemd),
ranks save their steps, and the actors that they would die with are still there.

Orders: `start` (replica, generation, count, strategy, gpus, command, environment, logs, cwd, lines), `send` (replica, line),
`interrupt` and `kill` (replica). Events: `open` (address, GPUs of the cluster, and the most that its autoscaler may
add up to), `refused` (message), and `rank` (replica, generation, rank, of: the event).
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import first_line
from launch.process.environment import EVENTS, NODE, number_ranks, rank_environment
from launch.process.stopping import die_with_parent

# Must be set before Ray is imported. A local Ray listens on loopback only, which this variable selects (it is the default on
# Windows and macOS), and sends no usage statistics.
ADDRESS = sys.argv[1]
if ADDRESS == "local":
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.pop("RAY_ADDRESS", None)

import ray  # noqa: E402
from ray.exceptions import GetTimeoutError, RayError  # noqa: E402
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group  # noqa: E402
from ray.util.scheduling_strategies import (  # noqa: E402
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from launch.ranks.actor import RankActor, wait_until_ended  # noqa: E402
from launch.ranks.host import END_SECONDS, ORPHAN_SECONDS  # noqa: E402

POLL_SECONDS = 5.0
NOTE_SECONDS = 5.0
# Ray's object store is not used.
STORE_BYTES = 100 * 2**20
# Calls that run while a poll waits.
CONCURRENCY = 4
# To connect to a cluster's port, before Ray is asked.
REACHED_S = 10.0
# For actors to answer that their ranks were killed, before they are killed too.
ANSWER_SECONDS = 60.0
STOPPED = "stopped while waiting for its place on the cluster"

Emit = Callable[..., None]


def main() -> None:
    """Connect, then follow orders until stdin ends or Ray does."""
    _, address, cpus, patience = sys.argv
    lock = threading.Lock()
    pipe = os.fdopen(int(os.environ[EVENTS]), "w", buffering=1, encoding="utf-8")

    def emit(event: str, **fields: Any) -> None:
        with lock:
            pipe.write(json.dumps({"event": event, **fields}) + "\n")

    try:
        info = connect(address, int(cpus), float(patience))
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        emit("refused", message=first_line(error))
        return
    gpus = ray.cluster_resources().get("GPU", 0)
    emit("open", address=info["gcs_address"], gpus=gpus, most_gpus=max(gpus, gpus_to_come()))
    closing = threading.Event()
    threading.Thread(target=watch_node, args=(info["raylet_socket_name"], closing), daemon=True).start()
    replicas: dict[str, RayReplica] = {}
    for line in sys.stdin:
        order = json.loads(line)
        name = order["replica"]
        if order["do"] == "start":
            replicas[name] = RayReplica(order=order, emit=emit)
            threading.Thread(target=replicas[name].run, daemon=True).start()
        elif order["do"] == "send":
            replicas[name].send(order["line"])
        elif order["do"] == "interrupt":
            replicas[name].interrupt()
        else:
            replicas[name].kill()
    for replica in replicas.values():
        replica.kill()
    closing.set()
    ray.shutdown()


def connect(address: str, cpus: int, patience: float) -> Mapping[str, Any]:
    """Connect to a cluster within `patience` seconds, or start a local Ray with `cpus` slots."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        return ray.init(
            "local", num_cpus=cpus, include_dashboard=False, object_store_memory=STORE_BYTES, **quiet
        ).address_info
    until = time.monotonic() + patience
    while True:
        try:
            refuse_silent(address)
            return ray.init(address, **quiet).address_info
        except ConnectionError:
            if time.monotonic() > until:
                raise
            time.sleep(2.0)


def refuse_silent(address: str) -> None:
    """Raise ConnectionError at once if nothing listens at HOST:PORT; Ray itself takes three minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHED_S).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(str(error)) from error


def watch_node(path: str, closing: threading.Event) -> None:
    """End this process when this machine's Ray node process has ended, unless this process itself ends it: it is `closing`."""
    while not closing.wait(0.5):
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except OSError:
                os._exit(3)


@dataclass
class RayReplica:
    """One start of a replica: a placement group, an actor per rank, and a thread that forwards their events."""

    order: Mapping[str, Any]
    emit: Emit
    _actors: list[Any] = field(default_factory=list)
    _nodes: list[str] = field(default_factory=list)
    _processes: list[tuple[int, int | None] | None] = field(default_factory=list)
    _starting: threading.Event = field(default_factory=threading.Event)
    _started: threading.Event = field(default_factory=threading.Event)
    _killed: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Place, start, and forward events until every rank has ended; an error becomes the `exit` of all ranks."""
        group, open_ranks, lost = None, set(range(self.order["count"])), set()
        try:
            group = self._place()
            if group is not None and self._start(group):
                self._poll(open_ranks)
            why = STOPPED
        except RayError as error:  # also raised when an actor is killed while it starts
            early = self._killed.is_set() and not self._starting.is_set()
            why = STOPPED if early else f"Ray: {first_line(error)}"
            lost = self._end_started()
        for rank in sorted(open_ranks):
            self._emit_rank(rank, _gone(why, lost=rank in lost))
        with contextlib.suppress(RayError):
            self._release(group)

    def send(self, line: str) -> None:
        """Send every rank a line."""
        for actor in self._actors:
            actor.send.remote(line)

    def interrupt(self) -> None:
        """Ask rank 0 to save its state; kill all ranks if none has started yet."""
        if not self._started.is_set():
            self.kill()
        for actor in self._actors[:1]:
            actor.interrupt.remote()

    def kill(self) -> None:
        """Kill all ranks, through their actors: Ray reports an actor dead before its process has ended."""
        self._killed.set()
        if self._started.is_set():
            self._end_ranks()
        elif not self._starting.is_set():
            self._kill_actors()
        late = threading.Timer(ANSWER_SECONDS, self._kill_actors)
        late.daemon = True
        late.start()

    def _place(self) -> PlacementGroup | None:
        """Wait for a bundle per rank; None if the replica was killed meanwhile."""
        bundle = {"CPU": 1, "GPU": 1} if self.order["gpus"] else {"CPU": 1}
        strategy = self.order["strategy"]
        group = placement_group([bundle] * self.order["count"], strategy=strategy)
        started, noted = time.monotonic(), False
        while not group.wait(1):
            if self._killed.is_set():
                remove_placement_group(group)
                return None
            if not noted and time.monotonic() - started > NOTE_SECONDS:
                noted = True
                text = f"waits for {self.order['count']} x {bundle} ({strategy}); {describe_cluster(bundle)}"
                self._emit_rank(0, {"event": "note", "text": text})
        return group

    def _start(self, group: PlacementGroup) -> bool:
        """Start an actor and a rank per bundle; False if the replica was killed before any rank was started."""
        order = self.order
        gpus = 1 if order["gpus"] else 0
        kind = ray.remote(num_cpus=1, num_gpus=gpus, max_concurrency=CONCURRENCY, max_restarts=0)(RankActor)
        self._actors = [
            kind.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, index)).remote()
            for index in range(order["count"])
        ]
        if self._killed.is_set():
            return False
        found = ray.get([actor.describe.remote() for actor in self._actors])
        self._emit_rank(
            0, {"event": "placed"}
        )  # not before every actor runs: a node may go, and its bundles wait again
        slots = number_ranks([place["node"] for place in found])
        self._actors = [self._actors[slot.bundle] for slot in slots]
        places = [found[slot.bundle] for slot in slots]
        self._nodes = [place["node_id"] for place in places]
        address = "127.0.0.1" if slots[0].local_size == order["count"] else places[0]["address"]
        port = ray.get(self._actors[0].listen.remote(address)) if order["count"] > 1 else 0
        self._starting.set()
        if self._killed.is_set():
            return False
        starts = []
        for rank, (actor, slot) in enumerate(zip(self._actors, slots, strict=True)):
            environment = {NODE: slot.node}
            if order["count"] > 1:
                numbers = {"local_rank": slot.local_rank, "local_size": slot.local_size}
                environment |= rank_environment(rank, order["count"], **numbers, address=address, port=port)
            # Ranks of a node see all GPUs of the replica there, for peer access, in rank order, so that LOCAL_RANK is the
            # index of a rank's own GPU.
            visible = [gpu for other in places if other["node"] == slot.node for gpu in other["gpus"]]
            if visible:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
            log = order["logs"][rank] if order["logs"] else None
            environment = {**order["environment"], **environment}
            starts.append(actor.start.remote(order["command"], environment, log, order["cwd"], order["lines"]))
        # The others too if one fails: only a rank that was started can be killed.
        ray.wait(starts, num_returns=len(starts))
        self._started.set()
        if self._killed.is_set():
            self._end_ranks()
        self._processes = ray.get(starts)
        for rank, process in enumerate(self._processes):
            self._emit_rank(rank, {"event": "started", "process": process})
        return True

    def _poll(self, open_ranks: set[int]) -> None:
        polls = {actor.poll.remote(POLL_SECONDS): rank for rank, actor in enumerate(self._actors)}
        while polls:
            ready, _ = ray.wait(list(polls), num_returns=1, timeout=1.0)
            for ref in ready:
                rank = polls.pop(ref)
                try:
                    events = ray.get(ref, timeout=0)
                except RayError as error:
                    # A timeout of what was ready: its node has just died.
                    why = " is lost" if isinstance(error, GetTimeoutError) else f": {first_line(error)}"
                    events = [_gone(f"the Ray actor of rank {rank} of {self.order['count']}{why}", lost=True)]
                    threading.Thread(target=self._confirm_end, args=(rank,), daemon=True).start()
                for event in events:
                    self._emit_rank(rank, event)
                if any(event["event"] == "exit" for event in events):
                    open_ranks.discard(rank)
                else:
                    polls[self._actors[rank].poll.remote(POLL_SECONDS)] = rank

    def _end_ranks(self) -> list[Any]:
        return [actor.end.remote() for actor in self._actors]

    def _end_started(self) -> set[int]:
        """Kill the ranks that were started, and wait for their ends; returns those whose end was not seen."""
        if not self._started.is_set():
            return set()
        left = set(range(len(self._actors)))
        with contextlib.suppress(RayError):
            ends = self._end_ranks()
            ray.wait(ends, num_returns=len(ends), timeout=END_SECONDS)
            for rank, end in enumerate(ends):
                with contextlib.suppress(RayError):
                    ray.get(end, timeout=0)
                    left.discard(rank)
        return left

    def _confirm_end(self, rank: int) -> None:
        """Kill a rank whose actor is lost, if the actor still hears it, and report the end that a task on its node sees."""
        process = self._processes[rank]
        there = NodeAffinitySchedulingStrategy(self._nodes[rank], soft=False)
        with contextlib.suppress(RayError):  # the node is lost too
            self._actors[rank].end.remote()
            if process is not None:
                look = ray.remote(num_cpus=0)(wait_until_ended).options(scheduling_strategy=there)
                ray.get(look.remote(*process), timeout=ORPHAN_SECONDS)
            self._emit_rank(rank, {"event": "ended"})

    def _kill_actors(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(RayError):
                ray.kill(actor)

    def _release(self, group: PlacementGroup | None) -> None:
        self._kill_actors()
        if group is not None:
            remove_placement_group(group)

    def _emit_rank(self, rank: int, event: Mapping[str, Any]) -> None:
        fields = {"replica": self.order["replica"], "generation": self.order["generation"]}
        self.emit("rank", rank=rank, of=event, **fields)


def gpus_to_come() -> float:
    """Return the most GPUs that the cluster's autoscaler may add up to; 0 without one."""
    # Ray has no public name for it; its own libraries (Train, Data) ask the same way.
    config = ray._private.state.state.get_max_resources_from_cluster_config()
    return (config or {}).get("GPU", 0)


def describe_cluster(bundle: Mapping[str, int]) -> str:
    """Describe the cluster's resources of a bundle's kinds, in all and at most on one node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    have = {name: ray.cluster_resources().get(name, 0) for name in bundle}
    most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in bundle}
    return f"the cluster has {have} in all and at most {most} on a node"


def _gone(why: str, *, lost: bool = False) -> dict[str, Any]:
    """The `exit` event of a rank whose host is gone; `lost`: its process may still run, until `ended` follows."""
    return {"event": "exit", "code": None, "pid": 0, "said": why, "tail": [], "lost": lost}


if __name__ == "__main__":
    die_with_parent()
    main()
