"""The beginning and end of every script. It imports nothing slow, so that a Ctrl-C is one quiet line from the start."""

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.launcher import asked_ranks, start_ranks
from launch.stopping import Place, StopSignals, die_with_parent, say


def run_script(name: str) -> int:
    """Run `main` of launch/commands/<name>.py, on as many ranks as `--nproc` asks for; returns the exit code.

    A rank that fails ends at once: to take its process group down it would have to wait for the others.
    """
    die_with_parent()
    # Of torch's own log, which would come before our one line, only errors.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    signals = StopSignals()
    signals.install()
    code = _run(name, sys.argv[1:], signals)
    if code and Place.of_environment() is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(name: str, argv: Sequence[str], signals: StopSignals) -> int:
    try:
        num_ranks = asked_ranks(argv)
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
