"""The ranks of one command as Ray actors instead of local processes: same options, same output, same errors. Imports nothing slow."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.cli.argv import asked_value, without
from launch.process.stopping import StopSignals, show
from launch.ranks.environment import carried
from launch.ranks.host import Event
from launch.ranks.ray_pool import NoRayError, RayPool, Start, check_placement
from launch.ranks.watch import Rank, judge, watch_ranks


def start_on_ray(address: str, command: Sequence[str], *, num_ranks: int, device: str, signals: StopSignals) -> int:
    """Run `python COMMAND` as `num_ranks` ranks on a cluster, show rank 0's output, and return the exit code.

    `device` is model.device: with `auto` ranks get GPUs if the cluster or its autoscaler has any.

    As with local ranks: if one fails, the others end within seconds and one line names the first failure; an interruption
    goes to rank 0 alone, which keeps what was computed.
    """
    signals.leave()
    verbose = asked_value(command, "--verbose") not in (None, "false")
    strategy = asked_value(command, "--placement_strategy") or "PACK"
    words = without(without(command, "--ray"), "--placement_strategy")
    if sys.stderr.isatty() and asked_value(command, "--output.progress") is None:
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
            children = [_Child(rank=rank) for rank in range(num_ranks)]
            ranks.start(None)

            def hear() -> None:
                for rank, event in ranks.drain():
                    children[rank].hear(event, verbose=verbose)

            watch_ranks(children, signals, hear=hear, interrupt=ranks.interrupt)
    except NoRayError as error:
        show(f"error: {error}")
        return 2
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
    """A rank as a Ray actor, updated by its events."""

    _rest: str = ""

    def hear(self, event: Event, *, verbose: bool) -> None:
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
                if self.code is None:  # its actor is gone, and the host with it
                    said = event["said"]
                    self.code, self.said = 1, said if said.startswith("stopped") else f"error: {said}"
