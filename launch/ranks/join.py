"""Join this process to the other ranks of a run: rendezvous, agreement on the settings, one mesh."""

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from engine.config import RunConfig
from engine.devices import pick_device
from engine.errors import UserError, first_line
from engine.given.frames import GivenFrames
from engine.planner.arrange import Arrangement, arrange_ranks, describe_place, join_ranks
from engine.ranks.agreement import (
    FOR_EVER,
    broadcast_bytes,
    choose_failure,
    digest,
    raise_together,
    refuse_different,
    setting_prints,
)
from engine.ranks.layouts import Ranks
from launch.process.attention_backend import check_backend
from launch.process.environment import LAUNCHER, NODE, STORE, RankEnv
from launch.process.exit_codes import LostRankError
from launch.process.stopping import ignore_signals, say_for_first
from parallel.collectives import CollectiveError

_ROLL_CALL_SECONDS = 0.05

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class DistContext:
    """The processes that make one video together; `ranks` and `store` are None for a process alone."""

    ranks: Ranks | None = None
    store: dist.Store | None = None

    def check_on_first(self, check: Callable[[], None]) -> None:
        """Run a check on rank 0; its UserError ends every rank."""
        if self.ranks is None:
            check()
        else:
            is_first = self.ranks.mesh.world.rank == 0
            raise_together(self.ranks.mesh, check if is_first else lambda: None)

    def compute_on_first(self, compute: Callable[[], Answer]) -> Answer:
        """Broadcast what `compute` returns on rank 0, in JSON's types; a UserError ends every rank."""
        if self.ranks is None:
            return compute()
        mesh = self.ranks.mesh
        found = raise_together(mesh, compute if mesh.world.rank == 0 else lambda: None)
        return json.loads(broadcast_bytes(mesh, json.dumps(found).encode(), "what rank 0 finds"))

    def wait_for_first(self, what: str) -> None:
        """Make the other ranks wait, without a timeout, until rank 0 has finished `what`."""
        if self.ranks is None:
            return
        rank = self.ranks.mesh.world.rank
        if rank == 0:
            self.store.set(what, "done")
            return
        try:
            self.store.wait([what], FOR_EVER)
        except RuntimeError as error:
            raise LostRankError(f"rank {rank} lost rank 0 while it finished {what} ({first_line(error)})") from error


@contextlib.contextmanager
def open_ranks(
    config: RunConfig, *, prompts: Sequence[str], verbose: bool, given: GivenFrames | None = None
) -> Iterator[DistContext]:
    """Join this process to the others of its run: the mesh chosen by `config.parallel` and the planner, for a video with `given` frames.

    Raises UserError, on every rank, if a rank does not come within `parallel.timeout`, if one has other settings, and if
    the degrees do not fit the number of ranks; LostRankError if one is lost later, in here or in the block.

    Once joined, only rank 0 handles signals: it saves what was computed, and the others end with it. If they ended first, rank
    0 would wait for them within a step, on a GPU forever.
    """
    rank_env = RankEnv.of_environment()
    if rank_env is None:
        _check_alone(config)
        device = pick_device(config.model.device)
        if device.type == "cuda":  # checks that the video fits the GPU; a CPU's memory is not checked
            arrange_ranks(config, 1, device, given=given)
        yield DistContext()
        return
    store = _meet(rank_env, config.parallel.timeout)
    try:
        nodes = _name_nodes(store, rank_env)
        if _share_loopback(store, rank_env):
            listen_on_loopback()
        device, arrangement = _agree(store, rank_env, config, prompts, nodes=nodes, given=given)
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=config.parallel.timeout)
        if rank_env.rank > 0:
            ignore_signals()
        dist.init_process_group(backend, store=store, rank=rank_env.rank, world_size=rank_env.world, timeout=timeout)
        ranks = dataclasses.replace(join_ranks(config, arrangement, device), nodes=nodes)
        if backend == "nccl":  # gloo notices a rank that dies at once, in its collectives alone
            ranks = dataclasses.replace(ranks, store=store)
        if verbose:
            print(describe_place(ranks, arrangement.plan, device), file=sys.stderr, flush=True)
        yield DistContext(ranks=ranks, store=store)
        if ranks.mesh.world.monitor is not None:
            ranks.mesh.world.monitor.close()
    except (CollectiveError, dist.DistError) as error:
        raise LostRankError(str(error) if isinstance(error, CollectiveError) else _lost(rank_env, error)) from error
    # Not after an error: it would wait for the other ranks, and the process is about to end.
    dist.destroy_process_group()


def _check_alone(config: RunConfig) -> None:
    check_backend()
    degrees = config.parallel
    product = (degrees.cfg or 1) * (degrees.ring or 1) * (degrees.ulysses or 1)
    if product > 1:
        raise UserError(f"parallel asks for {product} ranks, but this is one process; add --nproc {product}")
    if degrees.provider != "torch":
        raise UserError(
            f"parallel.provider {degrees.provider} is for ranks that exchange heads, but this is one process; "
            "add --nproc, or leave the provider out"
        )


def _meet(rank_env: RankEnv, timeout: float) -> dist.Store:
    """Connect to the store of rank 0 or torchrun, and wait for every rank."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        raise UserError(
            "RANK and WORLD_SIZE are set, but not MASTER_ADDR and MASTER_PORT; unset them or start with torchrun"
        )
    if not (port.isascii() and port.isdecimal() and len(port) < 6 and 0 < int(port) < 1 << 16):
        raise UserError(f"MASTER_PORT must be the number of a port, 1 to 65535, got {port!r}")
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = rank_env.rank == 0 and not of_torchrun
    listening = os.environ.get(STORE)
    if (
        rank_env.rank > 0 or of_torchrun
    ) and LAUNCHER not in os.environ:  # our launcher listens before it starts a rank
        _wait_for_listener(host, int(port), rank_env, timeout)
    try:
        store: dist.Store = dist.TCPStore(
            host,
            int(port),
            is_master=is_master,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            master_listen_fd=int(listening) if listening is not None else _listen(host, int(port), is_master=is_master),
        )
        store = gather_ranks(store, rank_env, timeout)
    except dist.DistError as error:
        raise UserError(_unreachable(rank_env, f"{host}:{port}", timeout, error)) from error
    return store


def _listen(host: str, port: int, *, is_master: bool) -> int | None:
    """Open a loopback socket for a store of this machine alone; None if the store listens on every interface itself."""
    if not is_master or host not in ("127.0.0.1", "localhost"):
        return None
    try:
        return socket.create_server(("127.0.0.1", port), backlog=socket.SOMAXCONN).detach()
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port}, MASTER_ADDR and MASTER_PORT: {error.strerror}") from error


def _wait_for_listener(host: str, port: int, rank_env: RankEnv, timeout: float) -> None:
    """Wait until HOST:PORT accepts connections; torch's store logs a page for each failed attempt.

    On a timeout this rank prints the error itself, since rank 0 may not exist.
    """
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=max(until - time.monotonic(), _ROLL_CALL_SECONDS)).close()
        except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
            if time.monotonic() + _ROLL_CALL_SECONDS > until:
                message = _unreachable(rank_env, f"{host}:{port}", timeout, error)
                say_for_first(f"error: {message}")
                raise UserError(message) from error
            time.sleep(_ROLL_CALL_SECONDS)
        else:
            return


def _unreachable(rank_env: RankEnv, address: str, timeout: float, error: Exception) -> str:
    return (
        f"rank {rank_env.rank} of {rank_env.world} cannot reach rank 0 at {address} within {timeout:g} s ({first_line(error)}); "
        "start all ranks, with one MASTER_ADDR and MASTER_PORT"
    )


def gather_ranks(store: dist.Store, rank_env: RankEnv, timeout: float) -> dist.Store:
    """Wait until all ranks have joined the store; return a prefix store that belongs to this start alone.

    torchrun's store outlives its ranks, and its agents may disagree on the restart count: a replacement begins at 0. So
    every rank writes a new random name, rank 0 publishes the list of names, and the list is valid once every rank has found
    its own name in it, which ended ranks cannot.

    Raises UserError if they do not come within `timeout` seconds.
    """
    name = secrets.token_hex(8)
    keys = [f"name/{rank}" for rank in range(rank_env.world)]
    store.set(keys[rank_env.rank], name)
    until = time.monotonic() + timeout
    while True:
        if rank_env.rank == 0 and store.check(keys):
            store.set("names", json.dumps([store.get(key).decode() for key in keys]))
        names = json.loads(store.get("names")) if store.check(["names"]) else []
        came = sum(store.check([key]) for key in keys)
        if len(names) == rank_env.world and names[rank_env.rank] == name:
            start = f"start/{digest(json.dumps(names)).hex()}"
            store.set(f"{start}/{rank_env.rank}", "here")
            came = sum(store.check([f"{start}/{rank}"]) for rank in range(rank_env.world))
            if came == rank_env.world:
                return dist.PrefixStore(start, store)
        if time.monotonic() > until:
            raise UserError(
                f"only {came} of {rank_env.world} ranks came within {timeout:g} s; rank {rank_env.rank} waited"
            )
        time.sleep(_ROLL_CALL_SECONDS)


def _name_nodes(store: dist.Store, rank_env: RankEnv) -> tuple[str, ...]:
    """Exchange the node of each rank: the name from Ray if it placed the rank, else the host name."""
    store.set(f"node/{rank_env.rank}", os.environ.get(NODE, socket.gethostname()))
    return tuple(store.get(f"node/{rank}").decode() for rank in range(rank_env.world))


def _share_loopback(store: dist.Store, rank_env: RankEnv) -> bool:
    """Whether all ranks run on one machine and in one network namespace."""
    store.set(f"network/{rank_env.rank}", describe_network())
    found = {store.get(f"network/{rank}") for rank in range(rank_env.world)}
    return len(found) == 1 and found != {b""}


def describe_network() -> str:
    """Identify the boot of the machine and the network namespace of this process; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/net').readlink()}"
    except OSError:
        return ""


def listen_on_loopback() -> None:
    """Make backends listen on loopback only, unless an interface is set."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")


def _agree(
    store: dist.Store,
    rank_env: RankEnv,
    config: RunConfig,
    prompts: Sequence[str],
    *,
    nodes: Sequence[str],
    given: GivenFrames | None,
) -> tuple[torch.device, Arrangement]:
    """Return this rank's device and the arrangement once all ranks agree; UserError if one failed or has other settings.

    Uses the store: process groups of ranks that want different arrangements would wait for each other.
    """
    message, prints, result = None, {}, None
    try:
        check_backend()  # a node may have another than the process that started the ranks
        device = _claim_device(rank_env, config)
        arrangement = arrange_ranks(config, rank_env.world, device, nodes=nodes, given=given)
        prints = setting_prints(config) | {
            "prompt": digest(json.dumps(list(prompts))),
            "checkpoint or GPU": digest(f"{arrangement.degrees} {arrangement.plan}"),
        }
        result = device, arrangement
    except UserError as error:
        message = str(error)
    mine = {"message": message, "prints": {name: value.hex() for name, value in prints.items()}}
    store.set(f"wants/{rank_env.rank}", json.dumps(mine))
    wants = [json.loads(store.get(f"wants/{rank}")) for rank in range(rank_env.world)]
    _let_read(store, rank_env, config.parallel.timeout)
    failure = choose_failure([want["message"] for want in wants])
    if failure is not None:
        raise UserError(failure)
    refuse_different([{name: bytes.fromhex(value) for name, value in want["prints"].items()} for want in wants])
    return result


def _let_read(store: dist.Store, rank_env: RankEnv, timeout: float) -> None:
    """Make rank 0 wait until the others have read everything, since the store ends with it."""
    store.add("read", 1)
    until = time.monotonic() + timeout
    while rank_env.rank == 0 and store.add("read", 0) < rank_env.world and time.monotonic() < until:
        time.sleep(_ROLL_CALL_SECONDS)


def _claim_device(rank_env: RankEnv, config: RunConfig) -> torch.device:
    device = pick_device(config.model.device)
    if device.type == "cuda":
        if rank_env.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank_env.rank} needs GPU {rank_env.local_rank} of its machine, which has {torch.cuda.device_count()}; "
                "start fewer ranks"
            )
        torch.cuda.set_device(rank_env.local_rank)
    return device


def _lost(rank_env: RankEnv, error: Exception) -> str:
    return f"rank {rank_env.rank} of {rank_env.world} lost the others ({first_line(error)})"
