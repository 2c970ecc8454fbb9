"""Start the ranks of one command, as local processes or Ray actors: same output, same errors. Imports nothing slow."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.process.argv import option_value, without
from launch.process.environment import carried, share_cores
from launch.process.stopping import StopSignals, show
from launch.ranks.host import Event, RankProcesses, end_ranks
from launch.ranks.local import LocalRanks
from launch.ranks.ray_pool import NoRayError, RayPool, Start, check_placement
from launch.ranks.watch import Rank, judge, watch_ranks


def start_ranks(num_ranks: int, command: Sequence[str], *, signals: StopSignals) -> int:
    """Start `num_ranks` processes of a Python command on this machine, wait for them, and return the exit code.

    If one fails, the others end within seconds, and one line names the first failure. An interruption goes to rank 0
    alone, which keeps what was computed; the others follow it. No rank outlives this process.
    """
    signals.leave()
    verbose = is_verbose(command)
    ranks = LocalRanks(
        num_ranks,
        environment=share_cores(num_ranks),
        # Rank 0 writes to the terminal itself, for its progress bars, unless every line gets a prefix.
        inherited=lambda rank: ("stdout",) if rank > 0 or verbose else ("stdout", "stderr"),
        command=command,
    )
    try:
        ranks.start(None)
        return follow(ranks, signals, verbose=verbose)
    finally:
        end_ranks([ranks])


def start_on_ray(address: str, command: Sequence[str], *, num_ranks: int, device: str, signals: StopSignals) -> int:
    """`start_ranks` on a cluster; also shows rank 0's output.

    `device` is model.device: with `auto` ranks get GPUs if the cluster or its autoscaler has any.
    """
    signals.leave()
    strategy = option_value(command, "--placement_strategy") or "PACK"
    words = without(without(command, "--ray"), "--placement_strategy")
    if sys.stderr.isatty() and option_value(command, "--output.progress") is None:
        words.append("--output.progress=on")  # an actor has no terminal, and this one is
    try:
        check_placement(strategy, address=address, num_ranks=num_ranks)
        with RayPool(address, cpus=num_ranks, log=None) as pool:
            if device == "cuda":
                pool.refuse_never(num_ranks)
            if (refused := too_few_gpus(pool.most_gpus, num_ranks, on_cpu=device == "cpu")) is not None:
                show(f"error: {refused}")
                return 2
            start = Start(
                gpus=device == "cuda" or (device == "auto" and pool.most_gpus > 0),
                strategy=strategy,
                command=words,
                environment=carried(os.environ),
                logs=None,
                cwd=str(Path.cwd()),
            )
            ranks = pool.ranks("ranks", num_ranks, start)
            ranks.start(None)
            return follow(ranks, signals, verbose=is_verbose(command))
    except NoRayError as error:
        show(f"error: {error}")
        return 2


def is_verbose(command: Sequence[str]) -> bool:
    """Whether a command asks for the output of every rank."""
    return option_value(command, "--verbose") not in (None, "false")


def follow(ranks: RankProcesses, signals: StopSignals, *, verbose: bool) -> int:
    """Show the output of started ranks until they have ended or their time is up; return the exit code."""
    children = [_Child(rank=rank) for rank in range(ranks.count)]

    def receive() -> None:
        for rank, event in ranks.drain():
            children[rank].receive(event, of=ranks.count, verbose=verbose)

    watch_ranks(children, signals, receive=receive, interrupt=ranks.interrupt)
    return judge(children, signals, verbose=verbose)


def too_few_gpus(gpus: float, num_ranks: int, *, on_cpu: bool) -> str | None:
    """Explain that the cluster has fewer GPUs than ranks; None if it has enough, has none, or none are needed."""
    if on_cpu or not 0 < gpus < num_ranks:
        return None
    return (
        f"{num_ranks} ranks need {num_ranks} GPUs, and the cluster has {gpus:g}; give --nproc {max(int(gpus), 1)}, or "
        "--model.device cpu to run on CPUs"
    )


@dataclass(kw_only=True)
class _Child(Rank):
    """A rank, updated by its events."""

    _rest: str = ""

    def receive(self, event: Event, *, of: int, verbose: bool) -> None:
        """Show rank 0's output, keep the last lines of the others, and note the exit."""
        match event["event"]:
            case "stdout" if self.rank == 0:
                print(event["text"], end="", flush=True)
            case "stderr" if self.rank == 0 and not verbose:
                print(event["text"], end="", file=sys.stderr, flush=True)
            case "stderr":
                *whole, self._rest = (self._rest + event["text"]).split("\n")
                self.lines.extend(whole)
                for line in whole if verbose else ():
                    print(f"[rank {self.rank}] {line}", file=sys.stderr, flush=True)
            case "note":
                show(event["text"])
            case "exit":
                self.ended, self.said = time.monotonic(), event["said"]
                self.pid = event["pid"]
                self.code = event["code"]
                if "refused" in event:
                    self.code, self.said = 2, self._describe_limit(event["refused"], of)
                if self.code is None:  # its actor is gone, and the host with it
                    said = event["said"]
                    self.code, self.said = 1, said if said.startswith("stopped") else f"error: {said}"

    def _describe_limit(self, why: str, of: int) -> str:
        return (
            f"error: rank {self.rank} of {of} cannot be started on this machine ({why}); give a smaller --nproc, or "
            "raise the limits of processes and open files (ulimit -u, ulimit -n)"
        )
