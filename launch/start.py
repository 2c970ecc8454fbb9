"""The beginning and end of every script. It imports nothing slow, so that a Ctrl-C is one quiet line from the start."""

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from launch.launcher import asked_ranks, asked_value, start_ranks
from launch.replicas.ray_generate import asked_ray, start_on_ray
from launch.stopping import LAUNCHER, Place, PlaceError, StopSignals, die_with_parent, say, show


def run_script(name: str, *, ranks_by_script: bool = True, on_ray: bool = False) -> int:
    """Run `main` of launch/commands/<name>.py, on as many ranks as `--nproc` asks for; returns the exit code.

    Without `ranks_by_script` the command starts its ranks itself, and `--nproc` is its own; with `on_ray` the ranks are
    actors of the cluster that `--ray` names, if it does.
    A rank that fails ends at once: to take its process group down it would have to wait for the others.
    """
    die_with_parent()
    # Of torch's own log, which would come before our one line, only errors.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    signals = StopSignals()
    signals.install()
    try:
        place = Place.of_environment()
    except PlaceError as error:
        show(f"error: {error}")
        return 2
    with prefixed_stderr(sys.argv[1:], place):
        code = _run(name, sys.argv[1:], signals, ranks_by_script=ranks_by_script, on_ray=on_ray)
    if code and place is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


class RankLines:
    """A stream whose lines begin with a rank; what else is asked of it, the stream itself answers."""

    def __init__(self, stream: TextIO, rank: int) -> None:
        self._stream, self._prefix, self._at_start = stream, f"[rank {rank}] ", True

    def write(self, text: str) -> int:
        """Write through, with the prefix before each line; a progress bar's carriage returns begin none."""
        for line in text.split("\n")[:-1]:
            self._write_part(f"{line}\n")
        self._write_part(text.rpartition("\n")[2])
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write_part(self, part: str) -> None:
        if part:
            self._stream.write(self._prefix + part if self._at_start else part)
            self._at_start = part.endswith("\n")


def prefixed_stderr(argv: Sequence[str], place: Place | None) -> contextlib.AbstractContextManager[object]:
    """With `--verbose`, a rank's number before each of its lines; our launcher does that itself for its ranks."""
    verbose = asked_value(argv, "--verbose") not in (None, "false")
    if not verbose or place is None or place.world == 1 or LAUNCHER in os.environ:
        return contextlib.nullcontext()
    return contextlib.redirect_stderr(RankLines(sys.stderr, place.rank))


def _run(name: str, argv: Sequence[str], signals: StopSignals, *, ranks_by_script: bool, on_ray: bool) -> int:
    try:
        num_ranks = asked_ranks(argv) if ranks_by_script else None
        cluster = asked_ray(argv) if on_ray else None
        if cluster is not None:
            return start_on_ray(cluster, [sys.argv[0], *argv], num_ranks=num_ranks or 1, signals=signals)
        if num_ranks is not None:
            return start_ranks(num_ranks, [sys.argv[0], *argv], signals=signals)
        module = importlib.import_module(f"launch.commands.{name}")
        run_command = importlib.import_module("launch.command").run_command
        place = Place.of_environment()
        with contextlib.ExitStack() as stack:
            if place is not None and place.rank > 0:  # rank 0 alone prints
                nowhere = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            return run_command(module.main, list(argv), signals=signals)
    except KeyboardInterrupt:
        signals.leave()
        say("stopped")
        return signals.code
    finally:
        signals.leave()
