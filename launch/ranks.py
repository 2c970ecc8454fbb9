"""Ranks of a run: started here (`--nproc N`) or by torchrun, watched until all have ended, and joined to one mesh."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import IO

import torch
import torch.distributed as dist

from engine.apply import Ranks
from engine.config import RunConfig
from engine.errors import UserError
from engine.load import pick_device
from engine.parallelism import join_ranks

# How long ranks get to end by themselves after one has failed: enough to notice a lost connection and say so.
GRACE_SECONDS = 2.0
# How long an interrupted rank 0 gets to write what was computed.
STOP_SECONDS = 120.0
POLL_SECONDS = 0.1
KEPT_LINES = 30

_PARENT = "FREESPEC_LAUNCHER"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which rank this process is, from the environment that torchrun and `start_ranks` set."""

    rank: int
    world: int
    local_rank: int

    @classmethod
    def of_environment(cls) -> "Place | None":
        """None for a process that nobody started as a rank."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return None
        return cls(
            rank=int(os.environ["RANK"]),
            world=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        )


def speaks() -> bool:
    """Whether this process may write to the terminal: rank 0, a process alone, or one whose launcher listens to it."""
    place = Place.of_environment()
    return place is None or place.rank == 0 or _PARENT in os.environ


def must_start(num_ranks: int | None) -> bool:
    """Whether this process has to start the ranks that `--nproc` asks for, instead of being one of them."""
    place = Place.of_environment()
    if num_ranks is None or _PARENT in os.environ:
        return False
    if num_ranks < 1:
        raise UserError(f"--nproc must be 1 or more, got {num_ranks}")
    if place is not None and place.world > 1:
        raise UserError(
            f"torchrun has started {place.world} ranks, and --nproc asks for {num_ranks} more of each; give one"
        )
    return True


@dataclass
class _Child:
    """One rank that was started: its process and the last lines of its stderr (rank 0 writes to the terminal itself)."""

    rank: int
    process: subprocess.Popen
    lines: deque = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    reader: threading.Thread | None = None

    def listen(self, stream: IO[str], verbose: bool) -> None:
        for line in stream:
            self.lines.append(line.rstrip("\n"))
            if verbose:
                print(f"[rank {self.rank}] {line}", end="", file=sys.stderr, flush=True)


def start_ranks(num_ranks: int, argv: Sequence[str], *, verbose: bool) -> int:
    """Start `num_ranks` processes of this command on this machine, wait for them, and return the exit code.

    If one fails, the others are ended within seconds and the first failure is named. An interruption reaches every
    rank, and rank 0 has time to keep what was computed. No rank outlives this process.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What torchrun set for this process is not for the ranks, or they would join its rendezvous.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_"))}
    kept |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), _PARENT: str(os.getpid())}
    kept |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    # As torchrun does: ranks that each take all cores slow each other down by an order of magnitude.
    kept.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_ranks)))
    children = [_start_rank(rank, argv, kept, verbose) for rank in range(num_ranks)]
    stopping = _forward_signals(children)
    try:
        return _watch(children, stopping)
    finally:
        for child in children:
            if child.process.poll() is None:
                child.process.kill()
        for child in children:
            child.process.wait()


def _start_rank(rank: int, argv: Sequence[str], environment: dict[str, str], verbose: bool) -> _Child:
    process = subprocess.Popen(
        [sys.executable, *argv],
        env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        stderr=None if rank == 0 else subprocess.PIPE,
        text=True,
    )
    child = _Child(rank, process)
    if rank > 0:
        child.reader = threading.Thread(target=child.listen, args=(process.stderr, verbose), daemon=True)
        child.reader.start()
    return child


def _forward_signals(children: Sequence[_Child]) -> threading.Event:
    """Hand SIGINT and SIGTERM on to the ranks. A terminal's Ctrl-C reaches them anyway, and they count one only once."""
    stopping = threading.Event()

    def forward(number: int, _frame: object) -> None:
        if not stopping.is_set():
            stopping.set()
            for child in children:
                if child.process.poll() is None:
                    child.process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    return stopping


def _watch(children: Sequence[_Child], stopping: threading.Event) -> int:
    """Wait until all ranks have ended; name the first failure if rank 0 has not said it itself."""
    deadline = None
    while any(child.process.poll() is None for child in children):
        failed = [child for child in children if child.process.poll() not in (None, 0)]
        if failed or stopping.is_set():
            deadline = deadline or time.monotonic() + (STOP_SECONDS if stopping.is_set() else GRACE_SECONDS)
            if time.monotonic() > deadline:
                break
        time.sleep(POLL_SECONDS)
    codes = {child.rank: child.process.poll() for child in children}
    if stopping.is_set():
        return codes[0] if codes[0] not in (None, 0) else 128 + signal.SIGINT
    bad = {rank: code for rank, code in codes.items() if code not in (None, 0)}
    if not bad:
        return 0
    # A rank that a signal ended is the cause; the others notice it and fail after.
    killed = [rank for rank, code in bad.items() if code < 0]
    if not killed and codes[0] == 2:
        return 2  # a user's mistake, which rank 0 has said in its one line
    first = children[killed[0] if killed else min(bad)]
    _report(first, bad[first.rank], len(children))
    return 1


def _report(child: _Child, code: int, num_ranks: int) -> None:
    if child.reader is not None:
        child.reader.join(timeout=1)
    end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    said = next((line for line in reversed(child.lines) if line.strip()), "")
    print(
        f"error: rank {child.rank} of {num_ranks} (process {child.process.pid}) {end}; the other ranks were stopped"
        + (f"; it said: {said.strip()}" if said else ""),
        file=sys.stderr,
    )


def die_with_launcher() -> None:
    """Ask the kernel to end this rank if its launcher dies without a word, so that no orphan keeps a GPU."""
    launcher = os.environ.get(_PARENT)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def open_ranks(config: RunConfig) -> Iterator[Ranks | None]:
    """Join this process to the others of its run: the mesh that `config.parallel` and the planner ask for.

    Yields None in a process alone, which needs no mesh. Raises UserError, on every rank, if the degrees do not fit the
    number of ranks, and if a rank does not come within `parallel.timeout`.
    """
    place = Place.of_environment()
    degrees = config.parallel
    if place is None:
        product = (degrees.cfg or 1) * (degrees.ring or 1) * (degrees.ulysses or 1)
        if product > 1:
            raise UserError(f"parallel asks for {product} ranks, but this is one process; add --nproc {product}")
        yield None
        return
    die_with_launcher()
    device = pick_device(config.model.device)
    if device.type == "cuda":
        if place.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {place.rank} needs GPU {place.local_rank} of its machine, which has {torch.cuda.device_count()}; "
                "start fewer ranks"
            )
        torch.cuda.set_device(place.local_rank)
    timeout = timedelta(seconds=config.parallel.timeout)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise UserError(
            f"rank {place.rank} waited {timeout.seconds} s, but not all of {place.world} ranks came "
            f"({str(error).splitlines()[0]})"
        ) from error
    try:
        yield join_ranks(config, place.world, device)
    finally:
        dist.destroy_process_group()
