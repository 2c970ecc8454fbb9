"""How commands stop: exit codes, one line, handlers put back, and a second Ctrl-C that waits for the first."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import UserError
from launch.process.stopping import Stopped, ignoring_signals
from tests.launch.conftest import Run


def test_a_command_that_ends_well_is_silent(run: Callable[..., Run]) -> None:
    seen = []
    assert run(seen.append, "--a", "b") == Run(0, "", "")
    assert seen == [["--a", "b"]]


def test_a_mistake_is_one_line_even_if_its_message_has_several(run: Callable[..., Run]) -> None:
    def main(argv: list[str]) -> None:
        raise UserError("the first\n  and the second line")

    assert run(main).error == "the first and the second line"


def test_our_own_faults_keep_their_traceback(run: Callable[..., Run]) -> None:
    def main(argv: list[str]) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run(main)


@pytest.mark.usefixtures("hangup")
def test_a_process_that_was_started_to_ignore_sighup_does(run: Callable[..., Run]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def main(argv: list[str]) -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    assert run(main) == Run(0, "", "")
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_once_all_is_made_no_signal_makes_it_a_failure(run: Callable[..., Run]) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def main(argv: list[str]) -> None:
        with ignoring_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    assert run(main) == Run(0, "", "")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_in_one_line_and_its_code(run: Callable[..., Run], number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)

    def main(argv: list[str]) -> None:
        try:
            os.kill(os.getpid(), number)
            pytest.fail("the signal did not arrive")
        except KeyboardInterrupt as error:
            raise Stopped("halfway; kept") from error

    assert run(main) == Run(code, "", "stopped: halfway; kept\n")
    assert signal.getsignal(number) is before


def test_a_second_signal_waits_until_the_first_has_been_handled(run: Callable[..., Run]) -> None:
    saved = []

    def main(argv: list[str]) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            try:
                raise OSError("some other error on the way")
            except OSError:
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            saved.append("latents")
            raise

    assert run(main) == Run(130, "", "stopped\n")
    assert saved == ["latents"]


@pytest.mark.parametrize("script", ["decode", "plan"])
def test_a_script_without_arguments_says_what_it_needs(script: str) -> None:
    """plan.py alone has a default for everything."""
    path = Path(__file__).parents[3] / "launch" / f"{script}.py"
    ended = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120, check=False)
    if script == "plan":
        assert (ended.returncode, ended.stderr) == (0, "")
    else:
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith("error: give ")
        assert ended.stderr.count("\n") == 1


def test_a_signal_before_the_command_can_report_it_ends_in_one_line():
    """As a rank has it that is interrupted while it starts: launchers start ranks with their signals blocked."""
    script = (
        "import os, signal, sys; from launch.cli.start import run_script; "
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}); os.kill(os.getpid(), signal.SIGINT); "
        "sys.exit(run_script('plan', []))"
    )
    ended = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "stopped\n")
