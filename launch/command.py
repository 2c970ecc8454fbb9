"""What all commands share: how they stop. One line for a mistake, one for an interruption, and the exit code."""

import signal
import sys
from collections.abc import Callable
from types import FrameType

from engine.errors import UserError
from launch.ranks import speaks
from parallel.collectives import CollectiveError


class Stopped(KeyboardInterrupt):
    """An interruption, with what was kept and how to go on."""


def run_command(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run `main(argv)` (of the process by default) and return the exit code, which is what `main` returned if it did.

    0: done. 1: a rank was lost, as one line on stderr. 2: something that the user can mend, likewise. 130: Ctrl-C, 143: SIGTERM, each with one line that
    says what was kept. Any other exception is a fault of the program and passes with its traceback.
    """
    received = [signal.SIGINT]

    def stop(number: int, _frame: FrameType | None) -> None:
        if _is_stopping():
            return
        received[0] = signal.Signals(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        _say(f"error: {error}")
        return 2
    except CollectiveError as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt as error:
        _say(f"stopped: {error}" if isinstance(error, Stopped) else "stopped")
        return 128 + received[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_stopping() -> bool:
    """Whether an interruption is being handled: its latents are on their way to the disk, and a second Ctrl-C must wait."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _say(message: str) -> None:
    if not speaks():
        return
    # A progress bar may have left the cursor in the middle of a line.
    lead = "\n" if sys.stderr.isatty() else ""
    print(lead + " ".join(message.split()), file=sys.stderr)
