"""Ranks of a script that start in a tenth of a second: forked from a process that has imported everything.

They meet as ranks do that a cluster's scheduler starts, by RANK, WORLD_SIZE and MASTER_ADDR; `tests.ranks` has the process.
"""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.cli.start import run_script
from tests.ranks import PRELOAD

# For machines that are busy; on a quiet one every rank ends within seconds.
PATIENCE_SECONDS = 200.0

Fault = Callable[[int], None]


@dataclass(frozen=True)
class Ended:
    """How a rank ended; `code` is negative if a signal ended it, and None if it had to be killed by the test."""

    code: int | None
    out: str
    err: str


def run_forked(
    commands: Sequence[Sequence[object]],
    tmp_path: Path,
    *,
    fault: Fault | None = None,
    world: int | None = None,
    ranks: Sequence[int] | None = None,
    kill_when_first_ended: bool = False,
    script: str = "generate",
) -> list[Ended]:
    """Run one command line of a script per rank and wait for all; `fault(rank)` is called in each before it starts.

    Some `ranks` of a larger `world` may stay away. A rank that hangs on purpose is killed once the first has ended.
    """
    ranks = range(len(commands)) if ranks is None else ranks
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for rank, command in zip(ranks, commands, strict=True):
        place = {"RANK": rank, "WORLD_SIZE": world or len(commands), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(start_forked([script, *command], tmp_path, place=place, rank=rank, fault=fault))
    until = time.monotonic() + PATIENCE_SECONDS
    waited = processes[:1] if kill_when_first_ended else processes
    while any(process.is_alive() for process in waited) and time.monotonic() < until:
        time.sleep(0.02)
    killed = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return [
        Ended(None if late else process.exitcode, *((tmp_path / f"rank{rank}.{kind}").read_text() for kind in _KINDS))
        for rank, process, late in zip(ranks, processes, killed, strict=True)
    ]


def start_forked(
    command: Sequence[object],
    folder: Path,
    *,
    place: dict[str, object],
    rank: int = 0,
    fault: Fault | None = None,
) -> multiprocessing.Process:
    """Start a script with its words, and with the variables of `place`; what it prints is in `rank0.out` and `rank0.err` of the folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    arguments = (rank, [str(word) for word in command], place, folder, fault)
    process = context.Process(target=_rank_main, args=arguments, daemon=True)
    process.start()
    return process


_KINDS = ("out", "err")


def _rank_main(rank: int, argv: list[str], place: dict[str, object], folder: Path, fault: Fault | None) -> None:
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    for descriptor, kind in zip((1, 2), _KINDS, strict=True):
        with (folder / f"rank{rank}.{kind}").open("w") as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv = [f"{argv[0]}.py", *argv[1:]]
    # multiprocessing has put others into their place; these write to the files.
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    if fault is not None:
        fault(rank)
    code = run_script(argv[0])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
