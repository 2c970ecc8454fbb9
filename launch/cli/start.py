"""Start and end every command. Imports nothing slow, so that Ctrl-C prints one line at any time."""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.paths import REPOSITORY
from engine.shown import PrintableStream
from launch.process.argv import requested_ranks, requested_ray
from launch.process.environment import LAUNCHER, RankEnv, RankEnvError, without_place
from launch.process.exit_codes import run_command
from launch.process.imports import uncollected
from launch.process.stopping import StopSignals, die_with_parent, show
from launch.process.streams import RankLines, unfailing_streams
from launch.ranks.launcher import is_verbose, start_on_ray, start_ranks


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Properties of a command.

    Attributes:
        what: summary for the list of commands.
        starts_ranks: whether `--nproc` starts the command itself on several ranks.
        on_ray: whether `--ray` starts those ranks on a cluster.
        only_prints: whether stdout is its only output.
    """

    what: str
    starts_ranks: bool = False
    on_ray: bool = False
    only_prints: bool = False


COMMANDS = {
    "generate": Kind(
        what="make a video from a prompt, or one from each line of a file", starts_ranks=True, on_ray=True
    ),
    "plan": Kind(what="predict memory and time of every layout before a weight is loaded", only_prints=True),
    "batch": Kind(what="make prompts x seeds x methods, on fault-tolerant replicas"),
    "serve": Kind(what="keep a model loaded behind OpenAI's video API, with a page"),
    "decode": Kind(what="make the video of saved latents"),
    "previews": Kind(what="fit the colours of serve's previews to a VAE"),
    "compare": Kind(what="compare methods on the same prompts and seeds, on a page of videos", starts_ranks=True),
    "analyze": Kind(what="measure singular spectra of attention, and low-rank videos", starts_ranks=True),
    "evaluate": Kind(what="score a batch with VBench-Long or weight-free measures"),
    "calibrate": Kind(what="search FreeSpec's settings, and judge them on other prompts", starts_ranks=True),
    "findings": Kind(what="write docs/findings.md from the reports of `make findings`"),
    "demo": Kind(what="make one prompt with three methods, a picture of the three, and a timeline"),
}


def run_script(name: str, argv: Sequence[str] | None = None) -> int:
    """Run a command with `argv`, by default that of the process, on as many ranks as it asks for; return the exit code.

    A mistake in `argv` is reported before a rank is started or torch imported. A failed rank, and every rank but the first, exits
    at once: destroying its process group would wait for the others.
    """
    die_with_parent()
    if not COMMANDS[name].starts_ranks:
        ignore_rank_env(name)
    # Show only errors of torch's log, which would come before our one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        rank_env = RankEnv.of_environment()
    except RankEnvError as error:
        show(f"error: {error}")
        return 2
    signals = StopSignals()
    signals.install()
    words = sys.argv[1:] if argv is None else list(argv)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(unfailing_streams())
        stack.enter_context(prefixed_stderr(words, rank_env))
        if rank_env is not None and rank_env.rank > 0:  # rank 0 alone prints
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stdout(PrintableStream(sys.stdout)))
        stack.callback(sys.stdout.flush)
        code = run_command(lambda given: _run(name, given, signals), words, signals=signals)
        out.flush()
        code = code or report_lost_output(name, out.error)
    if rank_env is not None and (code or rank_env.rank > 0):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def ignore_rank_env(name: str) -> None:
    """Ignore RANK and WORLD_SIZE of another launcher, with a note: the command starts its own ranks, or runs on one.

    Otherwise a rank above 0 would print nothing, not even errors.
    """
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    kept = without_place(os.environ)
    for variable in os.environ.keys() - kept.keys():
        del os.environ[variable]
    if rank is not None and world not in (None, "1"):
        own = "starts its own ranks (--nproc, --replicas)" if name in ("batch", "serve") else "is one process"
        show(f"RANK {rank} and WORLD_SIZE {world} of the environment are ignored: {name} {own}")


def report_lost_output(name: str, error: OSError | None) -> int:
    """Report that stdout could not be written, unless its reader has closed the pipe; return the exit code.

    It is an error only for a command that makes no files.
    """
    if error is None or isinstance(error, BrokenPipeError):
        return 0
    fails = COMMANDS[name].only_prints
    show(f"{'error' if fails else 'warning'}: cannot write to stdout: {error.strerror}")
    return 2 if fails else 0


def prefixed_stderr(argv: Sequence[str], rank_env: RankEnv | None) -> contextlib.AbstractContextManager[object]:
    """With `--verbose`, prefix each line with the rank; our launcher does that itself for its ranks."""
    if not is_verbose(argv) or rank_env is None or rank_env.world == 1 or LAUNCHER in os.environ:
        return contextlib.nullcontext()
    return contextlib.redirect_stderr(RankLines(sys.stderr, rank_env.rank))


def _run(name: str, argv: list[str], signals: StopSignals) -> int | None:
    given = _read(name, argv)
    kind = COMMANDS[name]
    command = [*sys.argv[: len(sys.argv) - len(argv)], *argv]
    on_replicas = getattr(given, "replicas", None) is not None
    num_ranks = requested_ranks(argv) if kind.starts_ranks and not on_replicas else None
    cluster = requested_ray(argv) if kind.on_ray else None
    if cluster is not None:
        device = given.config.model.device
        return start_on_ray(cluster, command, num_ranks=num_ranks or 1, device=device, signals=signals)
    if num_ranks is not None:
        return start_ranks(num_ranks, command, signals=signals)
    return _call(name, given)


def run_here(name: str, argv: Sequence[str]) -> int | None:
    """Run a command with `argv` in this process, which starts no ranks for it; return the exit code, None for 0."""
    return _call(name, _read(name, argv))


def _read(name: str, argv: Sequence[str]) -> Any:
    if not is_installed(name):
        raise UserError(_describe_checkout(name, "a checkout"))
    with _naming_missing_packages(name):
        return importlib.import_module(f"launch.arguments.{name}").read(argv)


def _call(name: str, given: Any) -> int | None:
    with _naming_missing_packages(name), uncollected():
        command = importlib.import_module(f"launch.commands.{getattr(given, 'command', name)}")
    return command.run(given)


def is_installed(name: str) -> bool:
    """Whether this command is here; the installed library lacks those that need a checkout (setup.py)."""
    return importlib.util.find_spec(f"launch.commands.{name}") is not None


def _describe_checkout(name: str, needed: str) -> str:
    advice = f"clone the repository, run `make setup` in it, and use .venv/bin/python launch/{name}.py"
    return f"freespec {name} needs {needed}; {advice}"


# Folders of a checkout that the installed library lacks.
_CHECKOUT = ("evaluation", "metrics", "tiny")


@contextlib.contextmanager
def _naming_missing_packages(name: str) -> Iterator[None]:
    """Raise UserError if this Python lacks a package that a command or one of its options needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in _CHECKOUT:
            raise UserError(_describe_checkout(name, f"{missing}/, which only a checkout has")) from error
        raise UserError(f"{sys.executable} has no package {missing!r}; {right_python(Path(sys.argv[0]))}") from error


def right_python(script: Path) -> str:
    """Describe how to get the packages: install them, or use the Python of the checkout's environment."""
    checkout = REPOSITORY
    if not (checkout / "Makefile").exists():
        return "install it with: pip install freespec-engine"
    python = checkout / ".venv" / "bin" / "python"
    shown = os.path.relpath(python) if Path.cwd().is_relative_to(checkout) else str(python)
    setup = "" if python.exists() else f"run `make setup` in {checkout}, then "
    return f"{setup}use {shown} {script} ..., or activate {checkout / '.venv'}"
