"""The `freespec` command: `freespec generate`, `freespec plan` and so on, from any folder."""

import contextlib
import difflib
import sys

from engine import __version__
from engine.shown import PrintableStream
from launch.cli.start import COMMANDS, is_installed, run_script
from launch.process.stopping import show


def main() -> None:
    """Run the command named first; without one, list them."""
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        sys.exit(run_script(sys.argv[1], sys.argv[2:]))
    with contextlib.redirect_stdout(PrintableStream(sys.stdout)):
        code = run(sys.argv[1:])
        sys.stdout.flush()
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run a command and return its exit code."""
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in COMMANDS:
        return run_script(name, rest)
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    advice = f"did you mean freespec {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
    show(f"error: freespec has no command {name!r}; {advice}")
    return 2


def usage() -> str:
    """List the commands, a line each."""
    lines = ["usage: freespec COMMAND [--config PRESET ...] [--SETTING VALUE ...]", "", "commands:"]
    lines += [
        f"  {name:<10} {kind.what}{'' if is_installed(name) else ' (in a checkout)'}" for name, kind in COMMANDS.items()
    ]
    return "\n".join([*lines, "", "freespec COMMAND --help shows the settings of a command."])
