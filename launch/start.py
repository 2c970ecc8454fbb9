"""The beginning and end of every script. It imports nothing slow, so that a Ctrl-C is one quiet line from the start."""

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.launcher import asked_ranks, start_ranks
from launch.replicas.ray_generate import asked_ray, start_on_ray
from launch.stopping import Place, StopSignals, die_with_parent, say


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
    code = _run(name, sys.argv[1:], signals, ranks_by_script=ranks_by_script, on_ray=on_ray)
    if code and Place.of_environment() is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


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
