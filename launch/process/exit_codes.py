"""Exit codes of commands, and the one line for a mistake or an interruption."""

import signal
import sys
from collections.abc import Callable

from engine.errors import UserError, describe_out_of_memory, is_out_of_memory
from launch.process.stopping import Stopped, StopSignals, say


class LostRankError(RuntimeError):
    """Another rank died, hangs or left; the message says how that was noticed and what was kept."""


class GivenUpError(RuntimeError):
    """Replicas have given up items of a batch; the message says which."""


def run_command(
    main: Callable[[list[str]], int | None], argv: list[str] | None = None, *, signals: StopSignals | None = None
) -> int:
    """Run `main(argv)` (of the process by default) and return the exit code: that of `main`, if it returned one.

    0: done. 1: another rank was lost or items were given up, reported in one line on stderr. 2: a user's mistake, likewise. 130: Ctrl-C,
    143: SIGTERM, 129: SIGHUP, each with one line that says what was kept. Any other exception is a bug and passes with its
    traceback. `signals` are already installed; without them this function installs its own.
    """
    stop_signals = signals or StopSignals()
    before = stop_signals.install() if signals is None else {}
    try:
        stop_signals.release()
        return main(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        stop_signals.leave()
        say(f"error: {error}")
        return 2
    except (LostRankError, GivenUpError) as error:
        stop_signals.leave()
        say(f"error: {error}")
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        stop_signals.leave()
        say(f"error: {describe_out_of_memory(error, when='loading or working')}")
        return 2
    except KeyboardInterrupt as error:
        stop_signals.leave()
        say(f"stopped: {error}" if isinstance(error, Stopped) else "stopped")
        return stop_signals.code
    finally:
        stop_signals.leave()
        for number, handler in before.items():
            signal.signal(number, handler)
